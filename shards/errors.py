"""The one error type for everything a user, a disk or a foreign file can cause."""

import contextlib
import os
from collections.abc import Iterator


class ShardError(ValueError):
    """One line for the person at the keyboard: what is wrong, where, the rule, and the cure."""


@contextlib.contextmanager
def about_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file: a write to a full disk knows only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise
