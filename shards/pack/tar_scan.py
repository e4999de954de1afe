"""Read a WebDataset tar strictly: which samples it holds, where their members lie, what the index says of each.

`tarfile`, and with it webdataset, takes a damaged header or a cut on a member boundary for the end of the archive and
says nothing. Here the tar must end as the format asks, and everything short of that is an error that names the place.
"""

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_BAD, FLAG_LABELLED, IndexRow
from beitforge.shards.format.levels import NO_TONES
from beitforge.shards.storage.reading import OpenFile

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL, JSON = "cls", "json"

_BLOCK = 512
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_MOST_HEADERS = 1 << 17  # bytes of one member's: a long name, what pax adds
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,9}) ")
_CURE = "the tar is damaged or was cut short: copy or download it again"


@dataclass(frozen=True)
class TarMember:
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """The members of one sample by lower-case extension."""

    key: str
    members: dict[str, TarMember]

    @property
    def image(self) -> TarMember:
        """The one image member."""
        return next(self.members[extension] for extension in IMAGE_EXTENSIONS if extension in self.members)


@dataclass(frozen=True)
class Facts:
    """What the index keeps of an image's bytes."""

    xxh3: int
    width: int
    height: int
    mean_grey: float
    flags: int
    tones: tuple[int, ...]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) of a member, exactly as webdataset cuts them; None where it skips the member."""
    match = _NAME.match(name)
    if not match or _META.match(name) or ("/" not in name and name.startswith("__") and name.endswith("__")):
        return None
    return match.group(1), match.group(2).lower()


def describe(data: bytes) -> Facts:
    """The facts of an image; of one that does not decode, its checksum and FLAG_BAD."""
    digest = xxhash.xxh3_64_intdigest(data)
    try:
        header, pixels = codec.read_image(data)
    except codec.ImageError:
        return Facts(digest, 0, 0, 0.0, FLAG_BAD, NO_TONES)
    return Facts(digest, header.width, header.height, codec.mean_grey(pixels), header.flags, codec.tones(pixels))


def index_row(sample: Sample, facts: Facts, label: int) -> IndexRow:
    """The index row of a sample. `label` counts only where the sample has a label member."""
    nowhere = TarMember(0, 0)
    labels, texts = sample.members.get(LABEL, nowhere), sample.members.get(JSON, nowhere)
    return IndexRow(
        key=sample.key,
        key_hash=hash_key(sample.key),
        image_offset=sample.image.offset,
        image_size=sample.image.size,
        label_offset=labels.offset,
        label_size=labels.size,
        json_offset=texts.offset,
        json_size=texts.size,
        image_xxh3=facts.xxh3,
        width=facts.width,
        height=facts.height,
        mean_grey=facts.mean_grey,
        tones=facts.tones,
        label=label if LABEL in sample.members else 0,
        flags=facts.flags | (FLAG_LABELLED if LABEL in sample.members else 0),
    )


def read_label(data: bytes, where: str) -> int:
    """The integer in a `.cls` member. Raises ShardError with `where` when it is none."""
    if not re.fullmatch(rb"\s*[+-]?[0-9]{1,18}\s*", data):
        raise ShardError(f"{where}: the .cls member holds {data[:40]!r}, not an integer: correct the set it came from")
    return int(data)


def scan_tar(path: Path, beat: Callable[[int], None]) -> list[IndexRow]:
    """Every index row of a tar, in tar order, each image decoded. `beat` is told each image's bytes.

    Raises ShardError for a damaged tar and for samples that are not WebDataset's (see `read_samples`). An image that
    does not decode is a row with FLAG_BAD, not an error.
    """
    rows, file = [], OpenFile(path)
    for sample in read_samples(path):
        facts = describe(read_member(file.descriptor, sample.image, path))
        label = 0
        if LABEL in sample.members:
            place = sample.members[LABEL]
            where = f"{path}: sample {sample.key} at byte {place.offset}"
            label = read_label(read_member(file.descriptor, place, path), where)
        rows.append(index_row(sample, facts, label))
        beat(sample.image.size)
    return rows


def read_member(descriptor: int, place: TarMember, path: Path) -> bytes:
    """A member's bytes. Raises ShardError when the tar has become shorter."""
    size = os.fstat(descriptor).st_size
    if place.offset + place.size > size:
        raise ShardError(f"{path} ends at byte {size}, inside a member: {_CURE}")
    data = os.pread(descriptor, place.size, place.offset)
    while len(data) < place.size:
        more = os.pread(descriptor, place.size - len(data), place.offset + len(data))
        if not more:
            raise ShardError(f"{path} ends at byte {place.offset + len(data)}, inside a member: {_CURE}")
        data += more
    return data


def read_samples(path: Path) -> list[Sample]:
    """The samples of a tar in order, from its headers alone.

    Raises ShardError naming tar, member and byte: a tar that does not end as tars end, members of one sample that do
    not stand together, a key used twice, a sample without or with several image members.
    """
    samples: list[Sample] = []
    extensions_of: dict[str, set[str]] = {}
    for name, place in _regular_members(path):
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        where = f"{path}: member {name} at byte {place.offset}"
        if samples and samples[-1].key == key:
            if extension in samples[-1].members:
                raise ShardError(f"{where}: the key has two .{extension} members: give every sample its own key")
        elif key in extensions_of:
            _refuse_return(where, key, extension, extensions_of[key])
        else:
            samples.append(Sample(key, {}))
            extensions_of[key] = set()
        samples[-1].members[extension] = place
        extensions_of[key].add(extension)
    for sample in samples:
        _check_image(path, sample)
    return samples


def _refuse_return(where: str, key: str, extension: str, before: set[str]) -> None:
    """A key that was left comes back: twice the same sample, or one sample torn apart."""
    if extension in before:
        raise ShardError(f"{where}: the key {key} is used by an earlier sample too: give every sample its own key")
    raise ShardError(
        f"{where}: the other members of {key} stand earlier, with other samples between; a sample's members must "
        "stand together: write the tar again, sorted by name"
    )


def _check_image(path: Path, sample: Sample) -> None:
    images = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        first = min(place.offset for place in sample.members.values())
        found = ", ".join(sorted(sample.members))
        wanted = "|".join(IMAGE_EXTENSIONS)
        raise ShardError(
            f"{path}: sample {sample.key} at byte {first} has {len(images)} image members ({found}), it must have one "
            f"of {wanted}: leave it out of the tar, or give its images keys of their own"
        )


def _regular_members(path: Path) -> Iterator[tuple[str, TarMember]]:
    """Name and place of every regular file in the tar; raises ShardError where the archive breaks off."""
    source = _Headers(path)
    size = source.size
    if size == 0:
        raise ShardError(f"{path} is empty (zero bytes): {_CURE}")
    last = "the start"
    try:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            while (member := _next_member(tar, source, last)) is not None:
                last = f"member {member.name}"
                blocks = -(-member.size // _BLOCK) if member.isreg() else 0
                if member.size < 0 or tar.offset <= member.offset:
                    raise ShardError(f"{path}: {last} at byte {member.offset} has {member.size} bytes: {_CURE}")
                if member.offset_data + blocks * _BLOCK > size:
                    raise ShardError(f"{path}: {last} at byte {member.offset_data} is cut off at byte {size}: {_CURE}")
                if member.issparse():
                    raise ShardError(f"{path}: {last} at byte {member.offset} is sparse: write the tar without -S")
                _check_long_names(path, member)
                if member.isreg():
                    yield member.name, TarMember(member.offset_data, member.size)
            end = tar.offset
    except tarfile.ReadError as error:
        raise ShardError(f"{path} is not a plain, uncompressed tar ({error}): {_CURE}, or unpack it first") from error
    _check_end(path, end, last)


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
