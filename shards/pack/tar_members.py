"""The members of a tar, read strictly from its headers alone: what each is, and where its bytes lie.

`tarfile`, and with it webdataset, takes a damaged header or a cut on a member boundary for the end of the archive and
says nothing. Here the tar must end as the format asks, and everything short of that is an error that names the place.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.reading import OpenFile

FILE, HARD_LINK = "files", "hard links"
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}

_BLOCK = 512
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_KINDS = {
    tarfile.LNKTYPE: HARD_LINK,
    tarfile.SYMTYPE: "symbolic links",
    tarfile.DIRTYPE: "folders",
    tarfile.CHRTYPE: "devices",
    tarfile.BLKTYPE: "devices",
    tarfile.FIFOTYPE: "FIFOs",
}
_MOST_HEADERS = 1 << 17  # bytes of one member's: a long name, what pax adds
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,9}) ")
_LFS = b"version https://git-lfs"
_CURE = "the tar is damaged or was cut short: copy or download it again"


@dataclass(frozen=True)
class TarMember:
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class Member:
    """One member. kind: FILE, or what else it is, in the plural. target: of a link, the member it names."""

    name: str
    kind: str
    place: TarMember
    target: str = ""


def read_members(path: Path) -> Iterator[Member]:
    """Every member of the tar, in its order. Raises ShardError where the archive breaks off, or is none."""
    source = _Headers(path)
    size = source.size
    if size == 0:
        raise ShardError(f"{path} is empty (zero bytes): {_CURE}, or remove it")
    last = "the start"
    try:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            while (member := _next_member(tar, source, last)) is not None:
                last = f"member {member.name}"
                if member.size < 0 or tar.offset <= member.offset:
                    raise ShardError(f"{path}: {last} at byte {member.offset} has {member.size} bytes: {_CURE}")
                if tar.offset > size:
                    raise ShardError(f"{path}: {last} at byte {member.offset_data} is cut off at byte {size}: {_CURE}")
                sparse = member.issparse()
                if not sparse:  # what stands before the data of such a file is more than names
                    _check_long_names(path, member)
                kind = "sparse files" if sparse else _kind(member)
                yield Member(member.name, kind, TarMember(member.offset_data, member.size), member.linkname)
            end = tar.offset
    except tarfile.ReadError as error:
        raise ShardError(f"{path} is not a plain, uncompressed tar: {_what_else(source, error)}") from error
    _check_end(path, end, last)


def _kind(member: tarfile.TarInfo) -> str:
    return FILE if member.isreg() else _KINDS.get(member.type, "members of other types")


def _what_else(source: "_Headers", error: tarfile.ReadError) -> str:
    """What a file that is no tar seems to be, and the cure."""
    source.left = _MOST_HEADERS
    source.seek(0)
    head = source.read(64)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return f"it is compressed ({name}), and images are read at their places in the tar: decompress it"
    if head.startswith(_LFS):
        return "it is what Git LFS leaves in the place of a file: get the file with `git lfs pull`"
    return f"{error}: {_CURE}"


class _Headers(io.RawIOBase):
    """A tar for tarfile to read headers from, which believes what they say of their length: no more than headers have
    is read for one member."""

    def __init__(self, path: Path):
        """Raises ShardError where it is no regular file."""
        file = OpenFile(path)
        self.path, self.file, self.size, self.place, self.left = path, file, file.size, 0, _MOST_HEADERS

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = 0) -> int:
        assert whence == 0, "tarfile seeks from the start"
        self.place = place
        return place

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of over {_MOST_HEADERS} bytes")
        data = self.file.up_to(size, self.place)
        self.place, self.left = self.place + len(data), self.left - size
        return data


def _next_member(tar: tarfile.TarFile, source: _Headers, last: str) -> tarfile.TarInfo | None:
    source.left = _MOST_HEADERS
    tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
    try:
        return tar.next()
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        place = f"{source.path}: no whole header after {last} near byte {tar.offset}"
        raise ShardError(f"{place} ({error}): {_CURE}") from error


def _check_long_names(path: Path, member: tarfile.TarInfo) -> None:
    """What stands before a member's header when its name is too long for it has no checksum, and tarfile passes over
    what it cannot read there: the member would go by another name, and then perhaps not be a sample's any more."""
    if member.offset_data - member.offset == _BLOCK:
        return
    with open(path, "rb") as file:
        file.seek(member.offset)
        blocks = file.read(member.offset_data - _BLOCK - member.offset)
    while blocks:
        try:
            head = tarfile.TarInfo.frombuf(blocks[:_BLOCK], "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            head = tarfile.TarInfo()
        if head.size < 0:
            raise ShardError(f"{path}: the long name before byte {member.offset_data} is damaged: {_CURE}")
        end = _BLOCK + -(-head.size // _BLOCK) * _BLOCK
        text, padding = blocks[_BLOCK : _BLOCK + head.size], blocks[_BLOCK + head.size : end]
        name = text.rstrip(b"\0")  # GNU's
        whole = _is_pax(text) if head.type in _PAX_TYPES else name and b"\0" not in name
        if not whole or any(padding) or end > len(blocks):
            raise ShardError(f"{path}: the long name before byte {member.offset_data} is damaged: {_CURE}")
        blocks = blocks[end:]


def _is_pax(text: bytes) -> bool:
    """Whether these are pax records and nothing else: each "LENGTH KEYWORD=VALUE\\n", LENGTH counting all of itself."""
    position = 0
    while position < len(text):
        length = _PAX_LENGTH.match(text, position)
        end = position + int(length.group(1)) if length else 0
        if not length or not length.end() < end <= len(text) or text[end - 1] != ord("\n"):
            return False
        if b"=" not in text[length.end() : end]:
            return False
        position = end
    return position > 0


def _check_end(path: Path, end: int, last: str) -> None:
    """Behind the last member there must be at least one block, and nothing but zeros."""
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
        if not block:
            raise ShardError(f"{path} ends at byte {end} after {last}, without an end-of-archive block: {_CURE}")
        if len(block) < _BLOCK:
            raise ShardError(f"{path} ends at byte {end + len(block)}, inside the header after {last}: {_CURE}")
        if any(block):
            raise ShardError(f"{path}: the header at byte {end}, after {last}, is damaged: {_CURE}")
        position = end + _BLOCK
        while block := file.read(1 << 20):
            if any(block):
                raise ShardError(
                    f"{path}: data behind the end-of-archive block (byte {position} on) after {last}: a zeroed header, "
                    f"or tars joined with `cat`, which every reader stops at: {_CURE}, or keep the tars apart"
                )
            position += len(block)
