"""Damage to whole shard sets: what disks, copies and people do to the files after packing.

Each function takes a generator and a copy of a set (sets.linked) and changes the copy; `other` is a set of the same
shard names and sizes that holds other images. Bytes alone are changed here: nothing of shards' own code is used.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.faults.corpus.sets import Stored, rewrite

Thing = TypeVar("Thing")
Damage = Callable[[np.random.Generator, Stored, Stored], None]

BLOCK = 512
# Where `other` keeps tokens of our own images by another tokenizer.
OTHER_TOKENS = "tokens_of_another_tokenizer"
_OTHER_VALUES: tuple[Any, ...] = (None, "", "x", 0, -1, 1.5, True, [], [1], {}, 10**30, float("nan"))


def one_of(rng: np.random.Generator, things: list[Thing]) -> Thing:
    """One of a list, by the generator."""
    return things[int(rng.integers(len(things)))]


def tar_of(rng: np.random.Generator, stored: Stored) -> Path:
    """One of the set's tars."""
    return stored.images / f"{one_of(rng, stored.names)}.tar"


def index_of(rng: np.random.Generator, stored: Stored) -> Path:
    """One of the set's indexes."""
    return stored.images / f"{one_of(rng, stored.names)}.index.safetensors"


def tokens_of(rng: np.random.Generator, stored: Stored) -> Path:
    """One of the set's token files."""
    return stored.tokens / f"{one_of(rng, stored.names)}.safetensors"


def manifest_of(rng: np.random.Generator, stored: Stored) -> Path:
    """One of the two manifests."""
    return (stored.images, stored.tokens)[int(rng.integers(2))] / "manifest.json"


def any_of(rng: np.random.Generator, stored: Stored) -> Path:
    """Any file of the set, each kind equally often."""
    return (tar_of, index_of, tokens_of, manifest_of)[int(rng.integers(4))](rng, stored)


def members_of(data: bytes) -> list[tarfile.TarInfo]:
    """The members of a whole tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def ends_of(member: tarfile.TarInfo) -> tuple[int, int]:
    """Where a member's header begins and where its last block ends."""
    return member.offset, member.offset_data + -(-member.size // BLOCK) * BLOCK


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    """One to four bits turned over."""
    changed = bytearray(data)
    for place in rng.integers(len(data), size=int(rng.integers(1, 5))).tolist():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def filled(data: bytes, start: int, filling: bytes) -> bytes:
    """`data` with other bytes from `start` on."""
    return data[:start] + filling + data[start + len(filling) :]


def flip_tar(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = tar_of(rng, stored)
    rewrite(path, flipped(rng, path.read_bytes()))


def flip_images(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """A bit in each of one to five images of a tar."""
    path = tar_of(rng, stored)
    data = path.read_bytes()
    members = [member for member in members_of(data) if not member.name.endswith((".json", ".cls"))]
    for number in rng.choice(len(members), int(rng.integers(1, 6)), replace=False).tolist():
        place = members[number].offset_data + int(rng.integers(members[number].size))
        data = filled(data, place, bytes([data[place] ^ (1 << int(rng.integers(8)))]))
    rewrite(path, data)


def flip_index(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = index_of(rng, stored)
    rewrite(path, flipped(rng, path.read_bytes()))


def flip_tokens(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = tokens_of(rng, stored)
    rewrite(path, flipped(rng, path.read_bytes()))


def flip_manifest(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = manifest_of(rng, stored)
    rewrite(path, flipped(rng, path.read_bytes()))


def retype_manifest(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """A value of a manifest is of another type, as after an edit by hand."""
    path = manifest_of(rng, stored)
    content = json.loads(path.read_text())
    place: Any = one_of(rng, [content, *content["shards"], content["shards"], content.get("tokenizer", content)])
    name = one_of(rng, list(range(len(place))) if isinstance(place, list) else sorted(place))
    place[name] = one_of(rng, list(_OTHER_VALUES))
    rewrite(path, json.dumps(content).encode())


def cut_in_data(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = tar_of(rng, stored)
    data = path.read_bytes()
    member = one_of(rng, members_of(data))
    rewrite(path, data[: member.offset_data + int(rng.integers(1, max(2, member.size)))])


def cut_on_boundary(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """Where tarfile, and webdataset with it, takes what is left for a whole tar."""
    path = tar_of(rng, stored)
    data = path.read_bytes()
    rewrite(path, data[: one_of(rng, members_of(data)).offset])


def cut_in_header(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = tar_of(rng, stored)
    data = path.read_bytes()
    rewrite(path, data[: one_of(rng, members_of(data)).offset + int(rng.integers(1, BLOCK))])


def zero_header(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = tar_of(rng, stored)
    data = path.read_bytes()
    rewrite(path, filled(data, one_of(rng, members_of(data)).offset, bytes(BLOCK)))


def garbage_header(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = tar_of(rng, stored)
    data = path.read_bytes()
    rewrite(path, filled(data, one_of(rng, members_of(data)).offset, rng.bytes(BLOCK)))


def zero_blocks(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """What a file system leaves of a page that was never written: one to eight blocks of zeros, in any file."""
    path = any_of(rng, stored)
    data = path.read_bytes()
    start = int(rng.integers(-(-len(data) // BLOCK))) * BLOCK
    rewrite(path, filled(data, start, bytes(min(BLOCK * int(rng.integers(1, 9)), len(data) - start))))


def swap_same_size(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """The bytes of two images of one size stand in each other's place, headers and all sizes untouched."""
    pairs = []
    for name in stored.names:
        path = stored.images / f"{name}.tar"
        members = [member for member in members_of(path.read_bytes()) if member.name.endswith(".png")]
        pairs += [(path, a, b) for a in members for b in members if a.offset < b.offset and a.size == b.size]
    path, a, b = one_of(rng, pairs)
    data = path.read_bytes()
    first, second = (data[member.offset_data : member.offset_data + member.size] for member in (a, b))
    rewrite(path, filled(filled(data, a.offset_data, second), b.offset_data, first))


def swap_members(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """Two whole members change places, header and data: as long as before, all between them moved."""
    path = tar_of(rng, stored)
    data = path.read_bytes()
    members = members_of(data)
    a, b = sorted(rng.choice(len(members), 2, replace=False).tolist())
    (start_a, end_a), (start_b, end_b) = ends_of(members[a]), ends_of(members[b])
    parts = data[:start_a], data[start_b:end_b], data[end_a:start_b], data[start_a:end_a], data[end_b:]
    rewrite(path, b"".join(parts))


def append(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    path = any_of(rng, stored)
    more = int(rng.integers(1, 2048))
    rewrite(path, path.read_bytes() + (rng.bytes(more) if rng.integers(2) else bytes(more)))


def index_of_another(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """The index of the same shard of another set, or of another shard of this one."""
    path = index_of(rng, stored)
    sources = [other.images / path.name, *(p for p in stored.images.glob("*.index.safetensors") if p != path)]
    rewrite(path, one_of(rng, sorted(sources)).read_bytes())


def index_and_manifest_of_another(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """Another set's manifest with all of its indexes, or alone, beside our tars."""
    beside = sorted(other.images.glob("*.index.safetensors")) if rng.integers(2) else []
    for path in [other.images / "manifest.json", *beside]:
        rewrite(stored.images / path.name, path.read_bytes())


def tar_of_another(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """The same shard of another set, sometimes brought to our length."""
    path = tar_of(rng, stored)
    data, length = (other.images / path.name).read_bytes(), path.stat().st_size
    rewrite(path, data[:length].ljust(length, b"\0") if rng.integers(2) else data)


def tokens_of_another(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """A token file or the manifest of a set that belongs to other images, or to these but by another tokenizer."""
    source = (other.tokens, other.folder / OTHER_TOKENS)[int(rng.integers(2))]
    name = tokens_of(rng, stored).name if rng.integers(2) else "manifest.json"
    rewrite(stored.tokens / name, (source / name).read_bytes())


def missing(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    any_of(rng, stored).unlink()


def cut_short(rng: np.random.Generator, stored: Stored, other: Stored) -> None:
    """An index, token file or manifest that ends too early, or at once."""
    path = (index_of, tokens_of, manifest_of)[int(rng.integers(3))](rng, stored)
    data = path.read_bytes()
    rewrite(path, data[: int(rng.integers(len(data))) * int(rng.integers(4) > 0)])


# The kinds of damage, in the order of the table.
STORED: tuple[tuple[str, Damage], ...] = (
    ("bits flipped anywhere in a tar", flip_tar),
    ("bits flipped in images", flip_images),
    ("bits flipped in an index", flip_index),
    ("bits flipped in a token file", flip_tokens),
    ("bits flipped in a manifest", flip_manifest),
    ("a manifest's value of another type", retype_manifest),
    ("tar cut inside data", cut_in_data),
    ("tar cut on a member boundary", cut_on_boundary),
    ("tar cut inside a header", cut_in_header),
    ("header zeroed", zero_header),
    ("header garbage", garbage_header),
    ("blocks zeroed in any file", zero_blocks),
    ("images of one size swapped", swap_same_size),
    ("members swapped", swap_members),
    ("bytes appended to any file", append),
    ("index of another shard or set", index_of_another),
    ("manifest (and indexes) of another set", index_and_manifest_of_another),
    ("tar of another set", tar_of_another),
    ("token file or manifest of another set", tokens_of_another),
    ("any file missing", missing),
    ("index, token file or manifest cut short", cut_short),
)
