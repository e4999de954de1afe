"""Whole files or none: atomic writes.

A file that exists under its final name is complete. Partial files carry a `.partial-` infix, are never read, and are
harmless wherever a killed process left them. Whoever writes one holds a lock on it, which ends with the process: one
that nobody holds is a dead one's.
"""

import contextlib
import errno
import fcntl
import os
import resource
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from beitforge.shards.errors import ShardError

PARTIAL = ".partial-"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a partial path beside `path`; flush it to disk and rename it into place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        with _held(partial):
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(
                f"no space left while writing {path}; free some and run the same command again: what is finished stays"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Make a partial file and hold its lock."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: then nobody sweeps there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # else swept, between its making and its lock
                yield
                return
        finally:
            os.close(descriptor)


def is_abandoned(descriptor: int) -> bool:
    """Whether nobody writes an open partial file; if so, nobody does until it is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or there are no locks, and nobody can tell
        return False
    return True


def sweep_partials(partials: Iterable[Path]) -> None:
    """Remove the partial files that killed processes left, and none that is being written."""
    for partial in partials:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if is_abandoned(descriptor):
                    partial.unlink()
            finally:
                os.close(descriptor)


def open_files(each: int) -> int:
    """How many things with `files` open files each a process may keep open, leaving half of its limit to others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(32, min(soft, 65536) // 2 // each)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave what was there."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
