"""The errors that a user, a host or a disk can cause. Each is one line: what, where, the rule, the cure."""

import re

# control characters (C0, DEL, C1), the line separators of Unicode, and bytes that are no text (surrogates)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """A text as a message shows it: names of files may hold line breaks and what a terminal obeys; here they are
    escapes."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class ConfigError(ValueError):
    """What a user can cause with a config, a run folder or a command line: what, where, the rule, the cure."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class SharedError(ConfigError):
    """What every rank raises at the same place, so that the first says it for all."""


class HostError(ConfigError):
    """What is wrong with one host: its own ranks say so, not only the first of all."""
