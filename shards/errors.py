"""The error types for everything a user, a disk or a foreign file can cause."""

import contextlib
import os
from collections.abc import Iterator

_LONGEST = 2000  # characters of a message


class ShardError(ValueError):
    """One line for the person at the keyboard: what is wrong, where, the rule, and the cure.

    Names and keys out of foreign files may be in it: what does not print (a line break, a terminal's escape) is written
    as its escape sequence, and of what is very long the middle is left out.
    """

    def __init__(self, message: str = "", *details: object):
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 4 :]}"
        super().__init__(printable(message), *details)


class Damaged(ShardError):
    """What was read is not what was written. The disk, the memory or the network may have erred this once, so it is
    read again before it is believed (shards.storage.retry.reread)."""


def printable(text: str) -> str:
    """A text on one line: each character that does not print as Python's escape sequence for it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextlib.contextmanager
def about_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file: a write to a full disk knows only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise
