"""Samples into a tar, byte for byte as webdataset's own writer does it, and told where their members lie.

webdataset imports torch where that is installed, two hundred megabytes in each process that writes.
"""

import tarfile
from types import TracebackType
from typing import BinaryIO

import xxhash

from beitforge.shards.pack.tar_members import TarMember

# Any fixed time will do, but 0 makes GNU tar warn: 2020-01-01.
_MTIME = 1577836800
_MODE, _OWNER = 0o444, "bigdata"  # webdataset's
_LONGEST, _DIGITS = 100, 11  # of a name and of a size in the plain header (POSIX ustar)


class SampleWriter:
    """Writes a tar to an open file. `digest` is the xxh3-128 of what was written; of the whole tar once it is closed.

    Use as a context manager: what ends its block well ends the tar as the format asks.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._size, self._state = file, 0, xxhash.xxh3_128()

    def __enter__(self) -> "SampleWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._put(bytes(2 * tarfile.BLOCKSIZE))
            self._put(bytes(-self._size % tarfile.RECORDSIZE))

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._size

    @property
    def digest(self) -> str:
        """Hex."""
        return self._state.hexdigest()

    def write(self, key: str, members: dict[str, bytes]) -> dict[str, TarMember]:
        """Write `KEY.EXTENSION` for each of a sample's members by extension, sorted. Their places."""
        places = {}
        for extension, data in sorted(members.items()):
            self._put(_header(f"{key}.{extension}", len(data)))
            places[extension] = TarMember(self._size, len(data))
            self._put(data)
            self._put(bytes(-len(data) % tarfile.BLOCKSIZE))
        return places

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._state.update(data)
        self._size += len(data)


def _made_header(name: str, size: int) -> bytes:
    """By tarfile, with a pax header before it where the name asks for one."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode, member.uname, member.gname = size, _MTIME, _MODE, _OWNER, _OWNER
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_PLAIN = _made_header("", 0)
_BEFORE, _BETWEEN, _AFTER = _PLAIN[100:124], _PLAIN[135:148], _PLAIN[155:]
_SUM = sum(_BEFORE) + sum(_BETWEEN) + sum(_AFTER[1:]) + 8 * ord(" ")  # the checksum's own field counts as spaces


def _header(name: str, size: int) -> bytes:
    """The one block that `_made_header` gives for a short name, ten times as fast."""
    if len(name) > _LONGEST or not name.isascii() or size >= 8**_DIGITS:
        return _made_header(name, size)
    text, digits = name.encode().ljust(_LONGEST, b"\0"), b"%011o" % size
    return b"".join([text, _BEFORE, digits, _BETWEEN, b"%06o\0" % (_SUM + sum(text) + sum(digits)), _AFTER])
