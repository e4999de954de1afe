"""Read a WebDataset tar: which samples it holds, where their members lie, what the index says of each, and how many
members of which kind belong to no sample.

A member is taken, or left out and counted, or the tar is refused with the member's name; nothing is passed over.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.bad_rows import BadRow, told
from beitforge.shards.format.index import FLAG_BAD, FLAG_LABELLED, MOST_IMAGE, SUFFIX, Index, IndexRow
from beitforge.shards.format.levels import NO_TONES
from beitforge.shards.pack.tar_members import FILE, HARD_LINK, Member, TarMember, read_members
from beitforge.shards.storage.reading import OpenFile

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "jpe")
LABEL, JSON = "cls", "json"
TEXT_LABEL = "labels that are no integer"

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_LABEL = re.compile(rb"\s*[+-]?[0-9]{1,18}\s*")
_MOST_LABEL = 4096  # bytes
_SHOWN, _LONGEST = 3, 80  # members in a message, characters of a name
_HIDDEN, _NAMELESS, _NO_IMAGE = "hidden files", "files whose names are no sample's", "samples without an image"
_OTHER_IMAGE, _TOO_LARGE = "images of other formats", "images of more than 2 GiB"
_APART, _TWICE = "files apart from their sample", "files that a sample has twice"
_OTHER_EXTENSIONS = {"gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2", "mpo", "ppm", "pgm", "pbm"}
_CURES = {
    HARD_LINK: "no reader of samples follows them: make the tar with `tar --hard-dereference`",
    "symbolic links": "no reader of samples follows them: make the tar with `tar --dereference`",
    "sparse files": "their bytes do not stand together in the tar: make it without `tar --sparse`",
    _NO_IMAGE: f"a sample has one image, KEY.{IMAGE_EXTENSIONS[0]}, .png or .webp",
    _OTHER_IMAGE: "tars are read with JPEG, PNG and WebP: unpack them and make a set with `pack`",
    TEXT_LABEL: "their images have no label here: write numbers from 0 on, or `pack` a folder per class",
    _APART: "the members of a sample must stand together: make the tar with `tar --sort=name`",
    _TOO_LARGE: "no image is as large",
}


@dataclass
class LeftOut:
    """What belongs to no sample, or is left out of one: how many of each kind, and the first's name."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str, count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.first.setdefault(
            kind, name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 4 :]}"
        )

    def add_all(self, others: "LeftOut") -> None:
        for kind, count in others.counts.items():
            self.add(kind, others.first[kind], count)

    def tell(self, index: Index) -> None:
        """Add those told in an index that this wrote (`as_metadata`); nothing for one of an earlier version."""
        tar = index.path.name.removesuffix(SUFFIX) + ".tar"
        for said in told(index, "left_out", kind=str, count=int, first=str):
            self.add(said["kind"], f"{tar} {said['first']}", said["count"])

    def as_metadata(self) -> dict[str, str]:
        """For the metadata of an index."""
        rows = [{"kind": kind, "count": count, "first": self.first[kind]} for kind, count in self.counts.items()]
        return {"left_out": json.dumps(rows)}

    def lines(self) -> list[str]:
        """One for each kind, for people: the number, the first, and where something is lost, how to keep it."""
        return [
            f"left out, {kind}: {count} ({self.first[kind]}{', …' if count > 1 else ''})"
            + (f"; {_CURES[kind]}" if kind in _CURES else "")
            for kind, count in sorted(self.counts.items())
        ]


@dataclass(frozen=True)
class Sample:
    """The members of one sample by lower-case extension, and which is the image."""

    key: str
    members: dict[str, TarMember]
    image: TarMember


@dataclass(frozen=True)
class Contents:
    """What the headers of a tar say: its samples in order, and what belongs to none."""

    samples: list[Sample]
    left_out: LeftOut


@dataclass(frozen=True)
class Facts:
    """What the index keeps of an image's bytes. reason: why it does not decode, "" where it does."""

    xxh3: int
    width: int
    height: int
    mean_grey: float
    flags: int
    tones: tuple[int, ...]
    reason: str = ""


@dataclass(frozen=True)
class Scanned:
    """Every index row of a tar, those of them that are bad, and what was left out."""

    rows: list[IndexRow]
    bad: list[BadRow]
    left_out: LeftOut


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) of a member, exactly as webdataset cuts them; None where it skips the member."""
    match = _NAME.match(name)
    if not match or _META.match(name) or ("/" not in name and name.startswith("__") and name.endswith("__")):
        return None
    return match.group(1), match.group(2).lower()


def describe(data: bytes) -> Facts:
    """The facts of an image; of one that does not decode, its checksum, FLAG_BAD and the reason."""
    digest = xxhash.xxh3_64_intdigest(data)
    try:
        header, pixels = codec.read_image(data)
    except codec.ImageError as error:
        return Facts(digest, 0, 0, 0.0, FLAG_BAD, NO_TONES, str(error))
    return facts_of(digest, header, pixels)


def facts_of(digest: int, header: codec.Header, pixels: np.ndarray) -> Facts:
    """The facts of an image whose bytes have that xxh3-64."""
    mean_grey, tones = codec.greys(pixels)
    return Facts(digest, header.width, header.height, mean_grey, header.flags, tones)


def index_row(sample: Sample, facts: Facts, label: int | None) -> IndexRow:
    """The index row of a sample. label: None where its label member is none; counts only where it has one."""
    nowhere = TarMember(0, 0)
    labels, texts = sample.members.get(LABEL, nowhere), sample.members.get(JSON, nowhere)
    labelled = LABEL in sample.members and label is not None
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
        label=label if labelled and label is not None else 0,
        flags=facts.flags | (FLAG_LABELLED if labelled else 0),
    )


def read_label(descriptor: int, sample: Sample, path: Path) -> int | None:
    """The integer in the `.cls` member of a sample that has one; None where it holds anything else."""
    place = sample.members[LABEL]
    data = read_member(descriptor, place, path) if place.size <= _MOST_LABEL else b""
    return int(data) if _LABEL.fullmatch(data) else None


def scan_tar(path: Path, beat: Callable[[int], None]) -> Scanned:
    """Every index row of a tar, in tar order, each image decoded. `beat` is told each image's bytes.

    Raises ShardError for a damaged tar and for samples that are not WebDataset's (see `read_tar`). An image that does
    not decode is a row with FLAG_BAD, not an error.
    """
    contents, file = read_tar(path), OpenFile(path)
    scanned = Scanned([], [], contents.left_out)
    for sample in contents.samples:
        facts, label = describe(read_member(file.descriptor, sample.image, path)), None
        if LABEL in sample.members:
            label = read_label(file.descriptor, sample, path)
            if label is None:
                scanned.left_out.add(TEXT_LABEL, f"{sample.key}.{LABEL}")
        if facts.flags & FLAG_BAD:
            scanned.bad.append(BadRow(len(scanned.rows), sample.key, facts.reason))
        scanned.rows.append(index_row(sample, facts, label))
        beat(sample.image.size)
    return scanned


def read_member(descriptor: int, place: TarMember, path: Path) -> bytes:
    """A member's bytes. Raises ShardError when the tar has become shorter."""
    size = os.fstat(descriptor).st_size
    cure = "the tar was cut short: copy or download it again"
    if place.offset + place.size > size:
        raise ShardError(f"{path} ends at byte {size}, inside a member: {cure}")
    data = os.pread(descriptor, place.size, place.offset)
    while len(data) < place.size:
        more = os.pread(descriptor, place.size - len(data), place.offset + len(data))
        if not more:
            raise ShardError(f"{path} ends at byte {place.offset + len(data)}, inside a member: {cure}")
        data += more
    return data


def read_tar(path: Path) -> Contents:
    """The samples of a tar in order, and what belongs to none, from its headers alone.

    Raises ShardError naming tar, member and byte: a tar that does not end as tars end, members of one sample that do
    not stand together, a key used twice, a sample with several images.
    """
    left_out = LeftOut()
    by_key = _by_key(path, left_out)
    return Contents(list(_samples(path, by_key, left_out)), left_out)


def _by_key(path: Path, left_out: LeftOut) -> dict[str, dict[str, TarMember]]:
    """The members of every key, in the tar's order. What webdataset skips, and what it should, is left out."""
    by_key: dict[str, dict[str, TarMember]] = {}
    last = None
    for member in read_members(path):
        parts, place = split_name(member.name), member.place
        if member.kind == HARD_LINK and parts and (target := _target(member, parts[1], by_key)):
            place = target
        elif member.kind != FILE:
            left_out.add(member.kind, member.name)
            continue
        if member.name.rpartition("/")[2].startswith("."):
            left_out.add(_HIDDEN, member.name)
            continue
        if parts is None:
            left_out.add(_NAMELESS, member.name)
            continue
        key, extension = parts
        before = by_key.get(key, {})
        if key in by_key and (key != last or extension in before):
            beside = any(name in IMAGE_EXTENSIONS for name in before) and "." in extension
            if beside or not _belongs(extension):
                left_out.add(_TWICE if key == last else _APART, member.name)
                continue
            if key == last or any(map(_belongs, before)):
                _refuse(f"{path}: member {member.name} at byte {place.offset}", key, extension, before, key == last)
            left_out.add(_APART, f"{key}.{next(iter(before))}", len(before))
            del by_key[key]
        by_key.setdefault(key, {})[extension] = place
        last = key
    return by_key


def _target(link: Member, extension: str, by_key: dict[str, dict[str, TarMember]]) -> TarMember | None:
    """Where the bytes of a hard link lie, if it is a label or a JSON file and they stand before it. An image's place
    cannot be another's: images lie one behind the other."""
    parts = split_name(link.target)
    return by_key.get(parts[0], {}).get(parts[1]) if parts and extension in (LABEL, JSON) else None


def _is_image(extension: str) -> bool:
    """Whether a member of this extension is an image, if only by what stands behind its last dot."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _belongs(extension: str) -> bool:
    """Whether a member of this extension is one of those that make a sample."""
    return extension in (LABEL, JSON) or _is_image(extension)


def _refuse(where: str, key: str, extension: str, before: Iterable[str], together: bool) -> None:
    """A key has a member twice, or comes back when it was left: twice the same sample, or one sample torn apart."""
    why = ""
    if "." in extension:
        why = f" (names are cut at their first dot, so {key}.{extension} belongs to {key}: rename the files)"
    if extension in before and together:
        raise ShardError(f"{where}: the key has two .{extension} members{why}: give every sample its own key")
    if extension in before:
        raise ShardError(f"{where}: the key {key} is used by an earlier sample too{why}: give every sample its own key")
    raise ShardError(
        f"{where}: the other members of {key} stand earlier, with other samples between{why}; a sample's members must "
        "stand together: write the tar again, sorted by name"
    )


def _samples(path: Path, by_key: dict[str, dict[str, TarMember]], left_out: LeftOut) -> Iterator[Sample]:
    """Those of the keys that have one image."""
    for key, members in by_key.items():
        found = [extension for extension in members if extension in IMAGE_EXTENSIONS]
        found = found or [extension for extension in members if _is_image(extension)]
        if len(found) > 1:
            _refuse_images(path, key, members, found)
        if not found:
            names = ", ".join(sorted(members)[:_SHOWN])
            left_out.add(_OTHER_IMAGE if _OTHER_EXTENSIONS & members.keys() else _NO_IMAGE, f"{key}: {names}")
        elif members[found[0]].size > MOST_IMAGE:
            left_out.add(_TOO_LARGE, f"{key}.{found[0]}")
        else:
            yield Sample(key, members, members[found[0]])


def _refuse_images(path: Path, key: str, members: dict[str, TarMember], found: list[str]) -> None:
    first = min(place.offset for place in members.values())
    names = ", ".join(sorted(found)[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
    what = f"{path}: sample {key} at byte {first} has {len(found)} image members ({names})"
    if "." in found[0]:
        raise ShardError(
            f"{what}: names are cut at their first dot, so these count as one sample, which has one image: rename the "
            f"files ({key}_{found[0]}), or leave one of them"
        )
    raise ShardError(
        f"{what}, it must have one of {'|'.join(IMAGE_EXTENSIONS[:4])}: leave it out of the tar, or give its images "
        "keys of their own"
    )
