"""Files of this machine, read by offset: regular files alone, and all the bytes that were asked for.

Never a memory map: of a file that is cut while it is mapped the next look ends the process, where a read raises. And
never without a bound: what a file says of itself is believed as far as its size.
"""

import contextlib
import json
import os
import stat
import sys
import threading
from pathlib import Path

import xxhash

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.storage.retry import reread

_BLOCK = 1 << 20
_MOST_CONTAINERS = 1 << 20  # lists and objects in one JSON text
OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # of a FIFO it waits for no writer


class OpenFile:
    """A regular file, open for reading. Closed when it is forgotten; may be read by many threads at once."""

    def __init__(self, path: Path, descriptor: int | None = None):
        """path: opened unless its `descriptor` is given, which is then ours; also for messages. Raises ShardError where
        it is no regular file, OSError where it cannot be opened."""
        self.path = path
        self.descriptor = os.open(path, OPEN) if descriptor is None else descriptor
        found = os.fstat(self.descriptor)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            raise ShardError(f"{path} is no regular file: put the file itself there")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it could not be opened
            os.close(self.descriptor)

    def read(self, size: int, start: int) -> bytes:
        """`size` bytes from `start` on, all of them. Raises EOFError where the file ends before."""
        if start + size > self.size:
            raise EOFError(f"bytes {start} to {start + size} are asked for, it had {self.size} when it was opened")
        data = self._piece(size, start)
        if len(data) < size:
            data = self.up_to(size, start)
            if len(data) < size:
                raise EOFError(
                    f"it ends at byte {start + len(data)}, and had {self.size} bytes when it was opened: it was cut"
                )
        return data

    def _piece(self, size: int, start: int) -> bytes:
        """What one call gives; an error is met with a second one."""
        try:
            return os.pread(self.descriptor, size, start)
        except OSError:
            return os.pread(self.descriptor, size, start)

    def up_to(self, size: int, start: int) -> bytes:
        """The bytes from `start` on, `size` or as many as there are."""
        parts, size = [], min(size, max(0, os.fstat(self.descriptor).st_size - start))
        while size and (part := self._piece(size, start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)

    def digest(self, but_last: int = 0) -> str:
        """xxh3-128 of all of it, or all but the last bytes, hex. Guards against damage and mix-ups, not against an
        adversary."""
        state, start = xxhash.xxh3_128(), 0
        end = max(0, self.size - but_last) if but_last else sys.maxsize
        while start < end and (block := self._piece(min(_BLOCK, end - start), start)):
            state.update(block)
            start += len(block)
        return state.hexdigest()

    def forget(self) -> None:
        """Have what is read next come from the disk, not out of the page cache."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class Turns:
    """Locks by number, so that one thread opens what many ask for. Forks and copies have locks of their own: nobody
    would open those that other threads held."""

    _LOCKS = 64

    def __init__(self) -> None:
        self._process, self._locks = os.getpid(), [threading.Lock() for _ in range(self._LOCKS)]

    def __reduce__(self) -> tuple:
        return Turns, ()

    def of(self, number: int) -> threading.Lock:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        return self._locks[number % self._LOCKS]


def forget(path: Path) -> None:
    """`OpenFile.forget` of a file by its path, if it is there."""
    with contextlib.suppress(OSError, ShardError):
        OpenFile(path).forget()


def file_digest(path: Path) -> str:
    """xxh3-128 of a whole file, hex. Raises ShardError where it is no regular file."""
    return OpenFile(path).digest()


def read_whole(path: Path, most: int) -> bytes:
    """All of a regular file. Raises ShardError where it has more than `most` bytes, which no such file has."""
    file = OpenFile(path)
    if file.size > most:
        raise ShardError(f"{path} has {file.size} bytes, and may have {most}: it is not what its name says")
    return file.up_to(most, 0)


def parse_json(data: bytes) -> object:
    """What a JSON text of foreign making says, in time and memory of its length. Raises Damaged with the reason."""
    if data.count(b"{") + data.count(b"[") > _MOST_CONTAINERS:
        raise Damaged(f"it holds more than {_MOST_CONTAINERS} lists and objects")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # an unfinished text, another encoding, a number of 5,000 digits
        raise Damaged(str(error)) from error


def twice_read(file: OpenFile, size: int, start: int, digest: int) -> bytes:
    """Bytes whose xxh3-64 is `digest`; read again where it is not, at last from the disk. Raises Damaged, EOFError."""

    data = file.read(size, start)
    if xxhash.xxh3_64_intdigest(data) == digest:
        return data

    def read() -> bytes:
        data = file.read(size, start)
        if xxhash.xxh3_64_intdigest(data) != digest:
            file.forget()
            raise Damaged(f"bytes {start} to {start + size} of {file.path} are not what was written")
        return data

    file.forget()
    return reread(read)
