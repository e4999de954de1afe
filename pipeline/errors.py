"""The errors that a user, a host or a disk can cause. Each is one line: what, where, the rule, the cure."""


class ConfigError(ValueError):
    """What a user can cause with a config, a run folder or a command line: what, where, the rule, the cure."""


class SharedError(ConfigError):
    """What every rank raises at the same place, so that the first says it for all."""


class HostError(ConfigError):
    """What is wrong with one host: its own ranks say so, not only the first of all."""
