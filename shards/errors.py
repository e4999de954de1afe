"""The one error type for everything a user, a disk or a foreign file can cause."""


class ShardError(ValueError):
    """One line for the person at the keyboard: what is wrong, where, the rule, and the cure."""
