"""What was fetched of remote shard sets, kept on this node for all its processes, within a size.

An entry is a file that appears by rename: it is whole, or it is not there. Its place is SET/NAME below the cache's
folder, SET being the fingerprint of the set it belongs to; nothing else in the folder is touched. When room is needed,
that goes first which is used last; whole files (indexes, tokens), which all parts of a shard share, go after all parts,
the least lately opened first.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.files import PARTIAL

PART = ".part"  # an entry that is a part of a tar; others are whole files
ALWAYS = float("-inf")  # in use before anything else
# When each of a set's parts is used next, f64 [n]: the larger, the sooner it goes.
Uses = Callable[[list[str]], np.ndarray]

_SET = re.compile(r"[0-9a-f]{16}")
_LOCKS = 256
_KEPT_SHARE = 0.95  # what is cleared out makes a little more room than asked for, so that it is rare
_OLD_SECONDS = 3600.0
_FAR = 2.0**50
_log = logging.getLogger(__name__)


class Cache:
    """A folder of entries. May be handed to worker processes; every method may be called by many at once, and raises
    ShardError where the folder fails."""

    def __init__(self, folder: Path, limit: int):
        """limit: bytes, of all sets together; less where the disk has no room for them."""
        self.folder, self.limit = folder, limit
        with self._told():
            (folder / ".locks").mkdir(parents=True, exist_ok=True)
            self._sweep()
            with self._locked("usage"):
                used = sum(info.st_size for _, info in self._files())
                self._write_used(used)
            room = used + int(_KEPT_SHARE * shutil.disk_usage(folder).free)
        if room < limit:
            _log.warning("%s has room for %.1f GB, less than data.cache_gb: it takes no more", folder, room / 1e9)
            self.limit = room

    def path(self, entry: str) -> Path:
        return self.folder / entry

    def read(self, entry: str, start: int, size: int) -> bytes | None:
        """Bytes of an entry from `start` on, at most `size`; None when it is not here, or its disk fails."""
        try:
            descriptor = os.open(self.path(entry), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, size, start)
            finally:
                os.close(descriptor)
        except OSError:
            return None

    def has(self, entry: str) -> bool:
        return self.path(entry).exists()

    def keep_part(
        self, entry: str, size: int, fetch: Callable[[], bytes], uses: Uses | None = None, before: float = ALWAYS
    ) -> bool:
        """See to it that a part is here, fetching it unless another process just did; False where there is no room.

        uses: says when each part of this set is used next; what is used later than `before` is evicted, and all of
        other sets. None: of this set the parts that came first make room.
        """
        with self._told(), self._locked_entry(entry):
            if self.has(entry):
                return True
            partial = self._reserve(entry, size, uses, before, alone=uses is None)
            if partial is not None:
                self._fill(partial, entry, size, fetch)
            return partial is not None

    def keep_whole(self, entry: str, fetch: Callable[[], bytes], uses: Uses | None = None) -> Path:
        """The path of a whole file, fetched unless it is here. Raises ShardError when it is larger than the cache."""
        path = self.path(entry)
        with self._told(), self._locked_entry(entry):
            if self.has(entry):
                os.utime(path)
                return path
            data = fetch()
            partial = self._reserve(entry, len(data), uses, ALWAYS, alone=False)
            if partial is None:
                raise ShardError(
                    f"{entry} has {len(data)} bytes, and the cache {self.folder} may take {self.limit} in all: raise "
                    f"data.cache_gb"
                )
            self._fill(partial, entry, len(data), lambda: data)
        return path

    def drop(self, entry: str) -> None:
        """Remove an entry that turned out to be damaged."""
        with self._told(), self._locked_entry(entry):
            self._forget(self.path(entry))

    def _fill(self, partial: Path, entry: str, size: int, fetch: Callable[[], bytes]) -> None:
        """Make an entry of what was reserved for it."""
        try:
            data = fetch()
            assert len(data) == size, "what was reserved is what comes"
            with open(partial, "r+b") as file:  # it keeps its size, which is counted, while it is written
                file.write(data)
            with self._locked("usage"):  # so that whoever counts sees it once
                os.replace(partial, self.path(entry))
        except BaseException:
            self._forget(partial)
            raise

    def _forget(self, path: Path) -> None:
        """Remove a file and its count, in one."""
        with self._locked("usage"), contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self._write_used(max(0, self._used() - size))

    def _reserve(self, entry: str, size: int, uses: Uses | None, before: float, alone: bool) -> Path | None:
        """A partial file of `size` bytes to be filled, which count from now on; None where no room can be made."""
        with self._locked("usage"):
            used = self._used()
            if used + size > self.limit:
                used = self._make_room(entry.partition("/")[0], size, uses, before, alone)
            fits = used + size <= self.limit
            self._write_used(used + size if fits else used)
            if not fits:
                return None
            partial = self.folder / f"{entry}{PARTIAL}{uuid.uuid4().hex[:8]}"
            partial.parent.mkdir(exist_ok=True)
            with open(partial, "wb") as file:
                file.truncate(size)
            return partial

    def _make_room(self, owner: str, size: int, uses: Uses | None, before: float, alone: bool) -> int:
        """Remove entries until `size` more fit, the last used first; the bytes that are left."""
        found = [(entry, info.st_size, info.st_mtime) for entry, info in self._files()]
        used = sum(length for _, length, _ in found)  # with what is on its way
        entries = [(entry, length, modified) for entry, length, modified in found if PARTIAL not in entry]
        next_use = np.array([_age(entry, modified, owner, alone) for entry, _, modified in entries])
        parts = [i for i, (entry, _, _) in enumerate(entries) if entry.startswith(f"{owner}/") and entry.endswith(PART)]
        if uses is not None and parts:
            next_use[parts] = uses([entries[i][0] for i in parts])
        for place in np.argsort(-next_use, kind="stable").tolist():
            if used + size <= self.limit * _KEPT_SHARE or next_use[place] <= before:
                break
            entry, length, _ = entries[place]
            self.path(entry).unlink(missing_ok=True)
            used -= length
        return used

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Entries, and partial files, of all sets."""
        for owner in os.scandir(self.folder):
            if owner.is_dir() and _SET.fullmatch(owner.name):
                for file in os.scandir(owner.path):
                    with contextlib.suppress(FileNotFoundError):
                        if file.is_file(follow_symlinks=False):
                            yield f"{owner.name}/{file.name}", file.stat()

    def _sweep(self) -> None:
        """Remove what killed processes left half written."""
        for entry, info in list(self._files()):
            if PARTIAL in entry and time.time() - info.st_mtime > _OLD_SECONDS:
                self.path(entry).unlink(missing_ok=True)

    def _used(self) -> int:
        """Bytes counted so far; counted anew where the count was cut short."""
        try:
            return int((self.folder / ".locks/used").read_text())
        except (FileNotFoundError, ValueError):
            return sum(info.st_size for _, info in self._files())

    def _write_used(self, used: int) -> None:
        (self.folder / ".locks/used").write_text(str(used))

    def _locked_entry(self, entry: str) -> contextlib.AbstractContextManager[None]:
        return self._locked(f"{zlib.crc32(entry.encode()) % _LOCKS:03d}")

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process, and one thread of it, at a time; the lock ends with the process, however it ends."""
        with open(self.folder / ".locks" / name, "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what the folder's disk cannot do."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "lower data.cache_gb, or set data.cache to another folder" if full else "set data.cache to another"
            raise ShardError(f"the cache folder {self.folder} cannot be used ({error}): {cure}") from error


def _age(entry: str, modified: float, owner: str, alone: bool) -> float:
    """Stands for the next use of an entry of which none is known: the longer ago it came, the sooner it goes; other
    sets' parts before all, whole files behind all. `alone`: only this set's parts may go."""
    if not entry.endswith(PART):
        return ALWAYS if alone else -_FAR - modified
    if entry.startswith(f"{owner}/"):
        return -modified
    return ALWAYS if alone else _FAR - modified
