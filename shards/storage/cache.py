"""What was fetched of remote shard sets, kept on this node for all its processes, within a size.

An entry is a file that appears by rename: it is whole, or it is not there. Its place is SET/NAME below the cache's
folder, SET being the fingerprint of the set it belongs to; nothing else in the folder is touched. When room is needed,
that goes first which is used last; whole files (indexes, tokens), which all parts of a shard share, go after all parts,
the least lately opened first. What is being fetched is a partial file, whose room counts and whose lock its process
holds; one without is removed by whoever opens the cache or needs the room.

The folder belongs to one user, and only that user can write it (shards.storage.own_folder); its files are opened
below it, never by a path that somebody could turn elsewhere, and never through a link.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.files import PARTIAL, is_abandoned
from beitforge.shards.storage.own_folder import Folder, own_folder
from beitforge.shards.storage.reading import OpenFile

PART = ".part"  # an entry that is a part of a tar; others are whole files
ALWAYS = float("-inf")  # in use before anything else
# When each of a set's parts is used next, f64 [n]: the larger, the sooner it goes.
Uses = Callable[[list[str]], np.ndarray]

_SET = re.compile(r"[0-9a-f]{16}")
_LOCKS = 256
_KEPT_SHARE = 0.95  # what is cleared out makes a little more room than asked for, so that it is rare
_FAR = 2.0**50
_log = logging.getLogger(__name__)


class Cache:
    """A folder of entries. May be handed to worker processes; every method may be called by many at once, and raises
    ShardError where the folder fails."""

    def __init__(self, folder: Path, limit: int):
        """limit: bytes, of all sets together; less where the disk has no room for them. Raises ShardError for a folder
        that others can change."""
        self.folder, self.limit = folder, limit
        with self._told():
            self._top = own_folder(folder)
            self._locks = self._top.inner(".locks", folder / ".locks")
            with self._locked("usage"):
                used = sum(size for _, size, _ in self._files())  # without what dead processes left
                self._write_used(used)
            room = used + int(_KEPT_SHARE * shutil.disk_usage(self._top.number).free)
        if room < limit:
            _log.warning("%s has room for %.1f GB, less than data.cache_gb: it takes no more", folder, room / 1e9)
            self.limit = room

    def __reduce__(self) -> tuple:
        return Cache, (self.folder, self.limit)

    def path(self, entry: str) -> Path:
        """Where an entry is, for messages."""
        return self.folder / entry

    def open(self, entry: str) -> OpenFile:
        """An entry. Raises FileNotFoundError when it is not here."""
        owner, _, name = entry.partition("/")
        return OpenFile(self.path(entry), self._set(owner).file(name, os.O_RDONLY))

    def read(self, entry: str, start: int, size: int) -> bytes | None:
        """Bytes of an entry from `start` on, at most `size`; None when it is not here, or its disk fails."""
        try:
            return self.open(entry).up_to(size, start)
        except (OSError, ShardError):
            return None

    def has(self, entry: str) -> bool:
        return self._size(entry) is not None

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
            with self._reserved(entry, size, uses, before, alone=uses is None) as descriptor:
                if descriptor is not None:
                    _write(descriptor, fetch(), size)
                return descriptor is not None

    def keep_whole(self, entry: str, fetch: Callable[[], bytes], uses: Uses | None = None) -> None:
        """See to it that a whole file is here, fetching it unless it is. Raises ShardError when it is larger than the
        cache."""
        owner, _, name = entry.partition("/")
        with self._told(), self._locked_entry(entry):
            if self.has(entry):
                self._set(owner).touch(name)
                return
            data = fetch()
            with self._reserved(entry, len(data), uses, ALWAYS, alone=False) as descriptor:
                if descriptor is None:
                    raise ShardError(
                        f"{entry} has {len(data)} bytes, and the cache {self.folder} may take {self.limit} in all: "
                        f"raise data.cache_gb"
                    )
                _write(descriptor, data, len(data))

    def drop(self, entry: str) -> None:
        """Remove an entry that turned out to be damaged."""
        with self._told(), self._locked_entry(entry):
            self._forget(entry)

    def _set(self, owner: str) -> Folder:
        return self._top.inner(owner, self.folder / owner)

    def _size(self, entry: str) -> int | None:
        """Bytes of an entry or a partial file; None where there is none."""
        owner, _, name = entry.partition("/")
        try:
            found = self._set(owner).stat(name)
        except FileNotFoundError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _unlink(self, entry: str) -> None:
        owner, _, name = entry.partition("/")
        self._set(owner).unlink(name)

    def _forget(self, entry: str) -> None:
        """Remove a file and its count, in one."""
        with self._locked("usage"):
            size = self._size(entry)
            if size is not None:
                self._unlink(entry)
                self._write_used(max(0, self._used() - size))

    @contextlib.contextmanager
    def _reserved(self, entry: str, size: int, uses: Uses | None, before: float, alone: bool) -> Iterator[int | None]:
        """A partial file of `size` bytes, which count from now on, to be filled in the block: then it is the entry.
        None where no room can be made. Its lock is this process's until then."""
        owner, _, name = entry.partition("/")
        partial = f"{name}{PARTIAL}{uuid.uuid4().hex[:8]}"
        with self._locked("usage"):
            used = self._used()
            if used + size > self.limit:
                used = self._make_room(owner, size, uses, before, alone)
            descriptor = None
            if used + size <= self.limit:
                # under the lock of whoever sweeps, so that nobody sees it before it is held
                descriptor = self._set(owner).file(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.ftruncate(descriptor, size)
                used += size
            self._write_used(used)
        try:
            yield descriptor
            if descriptor is not None:
                with self._locked("usage"):  # so that whoever counts sees it once
                    self._set(owner).rename(partial, name)
        except BaseException:
            self._forget(f"{owner}/{partial}")
            raise
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _make_room(self, owner: str, size: int, uses: Uses | None, before: float, alone: bool) -> int:
        """Remove entries until `size` more fit, the last used first; the bytes that are left."""
        found = list(self._files())
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
            self._unlink(entry)
            used -= length
        return used

    def _files(self) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and time of entries and of partial files, of all sets; partial files of dead processes are
        removed. Under the lock of usage."""
        for owner in os.listdir(self._top.number):
            if not _SET.fullmatch(owner) or not stat.S_ISDIR(self._top.stat(owner).st_mode):
                continue
            folder = self._set(owner)
            for file in list(os.scandir(folder.number)):
                with contextlib.suppress(FileNotFoundError):
                    found = file.stat(follow_symlinks=False)
                    if not stat.S_ISREG(found.st_mode):
                        continue
                    if PARTIAL in file.name and _is_dead(file.name, folder):
                        folder.unlink(file.name)
                    else:
                        yield f"{owner}/{file.name}", found.st_size, found.st_mtime

    def _used(self) -> int:
        """Bytes counted so far; counted anew where the count was cut short."""
        with self._opened("used") as descriptor:
            text = os.pread(descriptor, 32, 0)
        return int(text) if text.isdigit() else sum(size for _, size, _ in self._files())

    def _write_used(self, used: int) -> None:
        with self._opened("used") as descriptor:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d" % used, 0)

    def _locked_entry(self, entry: str) -> contextlib.AbstractContextManager[None]:
        return self._locked(f"{zlib.crc32(entry.encode()) % _LOCKS:03d}")

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process, and one thread of it, at a time; the lock ends with the process, however it ends."""
        with self._opened(name) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """A file of the cache's own, open to be locked or written. One with a second name may be somebody's file."""
        descriptor = self._locks.file(name, os.O_RDWR | os.O_CREAT)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.getuid():
                raise ShardError(
                    f"{self.folder}/.locks/{name} is not the cache's own file: remove {self.folder}/.locks"
                )
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what the folder's disk cannot do."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "lower data.cache_gb, or set data.cache to another folder" if full else "set data.cache to another"
            raise ShardError(f"the cache folder {self.folder} cannot be used ({error}): {cure}") from error


def _write(descriptor: int, data: bytes, size: int) -> None:
    """Fill a partial file, which keeps its size, that is counted, meanwhile."""
    assert len(data) == size, "what was reserved is what comes"
    written, view = 0, memoryview(data)
    while written < size:
        written += os.pwrite(descriptor, view[written:], written)


def _is_dead(name: str, folder: Folder) -> bool:
    """Whether no process holds a partial file."""
    descriptor = folder.file(name, os.O_RDWR)
    try:
        return is_abandoned(descriptor)
    finally:
        os.close(descriptor)


def _age(entry: str, modified: float, owner: str, alone: bool) -> float:
    """Stands for the next use of an entry of which none is known: the longer ago it came, the sooner it goes; other
    sets' parts before all, whole files behind all. `alone`: only this set's parts may go."""
    if not entry.endswith(PART):
        return ALWAYS if alone else -_FAR - modified
    if entry.startswith(f"{owner}/"):
        return -modified
    return ALWAYS if alone else _FAR - modified
