"""Everything that is read of a shard set may be of foreign making: whatever it holds, a value or one line comes of it.

A few hundred seeded cases a parser; BEITFORGE_NIGHTLY=1 has thousands. A case is run again by its number: it is in the
message. Sets are harmed consistently, digests and all, as somebody would who wants to be believed.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from beitforge.shards.errors import ShardError
from beitforge.shards.format import manifest as manifests
from beitforge.shards.format.index import index_path, open_index
from beitforge.shards.format.manifest import ImageManifest, TokenManifest, kind_of, write_manifest
from beitforge.shards.format.tokens import open_token_shard, token_path
from beitforge.shards.inspect.stats import image_stats, token_stats
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.inspect.verify_tokens import verify_tokens
from beitforge.shards.pack.adopt import adopt
from beitforge.shards.pack.tar_scan import read_tar, scan_tar
from beitforge.shards.storage import retry
from beitforge.shards.storage.reading import file_digest
from beitforge.shards.storage.tensors import open_tensors, write_tensors
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Stream
from beitforge.shards.stream.order import Order, OrderPolicy
from beitforge.shards.stream.view_sources import RecordedViews
from benchmarks.faults.corpus.sets import Stored, make_set
from tests.fuzzing import NIGHTLY, chance, ended, harmed, harmed_json, tried

SEED = 19
CASES = 4000 if NIGHTLY else 150
SLOW = CASES // 5  # of cases that read whole sets


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", ())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Stored:
    return make_set(tmp_path_factory.mktemp("whole"), 7)


@pytest.fixture
def case(whole, tmp_path) -> Iterator[Callable[[], Stored]]:
    """A fresh copy of the set for a case."""
    here = tmp_path / "case"

    def fresh() -> Stored:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(whole.folder, here)
        return Stored(here)

    yield fresh


def counts(ends: list[str], least_lines: float = 0.2) -> None:
    """Not all cases may end alike: then nothing was tried."""
    lines = sum(end != "value" for end in ends)
    assert lines >= least_lines * len(ends), Counter(ends).most_common(5)
    different = len({end.rpartition("/")[2] for end in ends})
    assert different > 2
    tried(len(ends), f"{lines} of them refused, with {different} different ends")


def ends(cases: int, seed: int, one: Callable[[int], Callable[[], object]]) -> list[str]:
    """How the cases of a parser end; `one` harms its file for the case of this number and gives what reads it."""
    found = []
    for number in range(cases):
        parse = one(number)
        found.append(ended(parse, ShardError, f"case {seed} {number}"))
    return found


def use(manifest: ImageManifest | TokenManifest) -> None:
    """What every reader does with a manifest."""
    assert len(manifest.fingerprint) == 32 and manifest.samples > 0
    Order([shard.samples for shard in manifest.shards], OrderPolicy()).locate(np.arange(5))


@pytest.mark.parametrize("kind", ["images", "tokens"])
@pytest.mark.parametrize("digest", ["kept", "made again", "left out"])
def test_manifests(whole, tmp_path, kind, digest):
    content = json.loads((whole.folder / kind / "manifest.json").read_text())
    read = {"images": manifests.read_image_manifest, "tokens": manifests.read_token_manifest}[kind]
    if digest == "left out":
        content.pop("digest")

    def one(number: int) -> Callable[[], object]:
        rng = chance(SEED, number)
        data = harmed_json(content, rng) if number % 4 else harmed(json.dumps(content).encode(), rng)
        if digest == "made again":
            data = signed(data)
        (tmp_path / "manifest.json").write_bytes(data)
        return lambda: (use(read(tmp_path)), kind_of(tmp_path))

    counts(ends(CASES, SEED, one))


def signed(data: bytes) -> bytes:
    """A manifest with the digest of what it now says, if it can have one."""
    try:
        content = json.loads(data)
        if isinstance(content, dict):
            content["digest"] = manifests._digest(content)
            return json.dumps(content).encode()
    except (ValueError, RecursionError):
        pass
    return data


def safetensors(data: bytes, number: int, seed: int) -> bytes:
    """A safetensors file harmed in its header's JSON, its length, or anywhere."""
    rng = chance(seed, number)
    if number % 3 == 0:
        return harmed(data, rng)
    length = int.from_bytes(data[:8], "little")
    text = harmed_json(json.loads(data[8 : 8 + length]), rng)
    told = rng.choice([len(text)] * 6 + [0, len(text) - 1, len(text) + 1, 2**60, 2**64 - 1])
    return told.to_bytes(8, "little") + text + data[8 + length :]


def test_safetensors_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": np.arange(40, dtype=np.uint16).reshape(2, 4, 5),
        "b": np.zeros(3, np.float32),
        "c": np.ones(0, bool),
    }
    write_tensors(path, tensors, {"by": "a test"})
    data = path.read_bytes()

    def one(number: int) -> Callable[[], object]:
        path.write_bytes(safetensors(data, number, SEED))
        return lambda: open_tensors(path)

    counts(ends(CASES, SEED, one))


def every_row(path: Path) -> None:
    index = open_index(path)
    index.check_places(1 << 20)
    for row in range(len(index)):
        index.row(row), index.key(row)
    bool(index.whole)


def test_indexes(whole, tmp_path):
    data = index_path(whole.images, "shard-000001").read_bytes()
    path = tmp_path / "x.index.safetensors"

    def one(number: int) -> Callable[[], object]:
        path.write_bytes(safetensors(data, number, SEED + 1))
        return lambda: every_row(path)

    counts(ends(CASES, SEED + 1, one))


def every_token(path: Path) -> None:
    shard = open_token_shard(path)
    for view in range(min(3, shard.shape[0])):
        for row in range(min(20, shard.shape[1])):
            shard.row(view, row)
    assert len(shard.tokens) == shard.shape[0] and shard.checks_digest is not None


def test_token_files(whole, tmp_path):
    data = token_path(whole.tokens, "shard-000001").read_bytes()
    path = tmp_path / "x.safetensors"

    def one(number: int) -> Callable[[], object]:
        path.write_bytes(safetensors(data, number, SEED + 2))
        return lambda: every_token(path)

    counts(ends(CASES, SEED + 2, one))


def test_tars(whole, tmp_path):
    """Headers, names, sizes and what follows the end; most harm is done near the headers."""
    data = (whole.images / "shard-000001.tar").read_bytes()
    path = tmp_path / "x.tar"

    def one(number: int) -> Callable[[], object]:
        rng = chance(SEED + 3, number)
        harm = harmed(data, rng)
        if number % 2:  # within a header, with its checksum made again
            harm = header_harmed(data, rng)
        path.write_bytes(harm)
        return lambda: (read_tar(path), scan_tar(path, lambda size: None))

    counts(ends(CASES, SEED + 3, one))


def header_harmed(data: bytes, rng) -> bytes:
    """One header of a tar changed, as somebody would who knows what its checksum is."""
    starts = [at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(starts)
    block = bytearray(data[at : at + 512])
    field, size = rng.choice(
        [(0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (156, 1), (156, 1), (345, 155), (257, 8)]
    )
    values = [b"77777777777\0", b"\x80" + b"\0" * 10 + b"\1", b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"-0000000001\0"]
    values += [
        b"L",
        b"K",
        b"x",
        b"g",
        b"S",
        b"1",
        b"2",
        b"5",
        b"\0",
        b"Z",
        b"../../../etc/passwd\0",
        b"a\nb.jpg\0",
        b"\xff.jpg",
    ]
    values += [
        b"__meta__.jpg\0",
        b"x" * 100,
        b"00000001000\0",
        b"00000000000\0",
        bytes(rng.randrange(256) for _ in range(8)),
    ]
    value = rng.choice(values)[:size]
    block[field : field + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


@pytest.mark.parametrize("kind", ["L", "x", "g", "K"])
def test_long_names_without_end(tmp_path, kind):
    """A header that claims an exabyte, one of negative size, and a thousand one in another."""
    path = tmp_path / "x.tar"
    for size in (b"\x80" + (1 << 60).to_bytes(11, "big"), b"\xff" * 12, b"77777777777\0", b"00000200000\0"):
        block = bytearray(512)
        block[:5], block[100:108], block[108:124], block[124:136] = b"a.jpg", b"0000644\0", b"0000000\0" * 2, size
        block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind.encode(), b"ustar\x0000"
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        for times in (1, 3000):
            path.write_bytes(bytes(block) * times + bytes(1024))
            line = ended(lambda: read_tar(path), ShardError, f"{size!r} {times}", seconds=10)
            assert line != "value"


def resigned(here: Stored) -> None:
    """Manifests that vouch for what the files now are."""
    images = manifests.read_image_manifest(here.images)
    shards = [
        dataclasses.replace(
            shard,
            digest=file_digest(here.images / f"{shard.name}.tar"),
            bytes=(here.images / f"{shard.name}.tar").stat().st_size,
            index_digest=file_digest(index_path(here.images, shard.name)),
        )
        for shard in images.shards
    ]
    write_manifest(here.images, dataclasses.replace(images, shards=shards))
    tokens = manifests.read_token_manifest(here.tokens)
    entries = []
    for entry, shard in zip(tokens.shards, shards, strict=True):
        path = token_path(here.tokens, entry.name)
        try:
            checks = open_token_shard(path).checks_digest
        except ShardError:
            checks = entry.checks_digest
        entries.append(
            dataclasses.replace(entry, digest=file_digest(path), image_digest=shard.digest, checks_digest=checks)
        )
    write_manifest(here.tokens, dataclasses.replace(tokens, shards=entries))


def other_values(path: Path, rng, checks: bool) -> None:
    """A safetensors file of ours with other values in one of its tensors; with the checksums of token rows made
    again."""
    tensors, metadata = open_tensors(path)
    name = rng.choice(sorted(tensors))
    value = tensors[name].copy()
    flat = value.reshape(-1)
    for _ in range(rng.choice((1, 1, 5, len(flat)))) if len(flat) else ():
        bits = rng.choice((0, 1, 2**7, 2**15, 2**31, 2**53, 2**63, 2**64 - 1, rng.getrandbits(64)))
        flat.view(f"u{flat.itemsize}")[rng.randrange(len(flat))] = bits & (2 ** (8 * flat.itemsize) - 1)
    tensors[name] = value
    if checks and "checks" in tensors:
        fields = ("tokens", "boxes", "flips", "jitters", "orders")
        sums = tensors["checks"].copy()
        for view, row in np.ndindex(*sums.shape):
            parts = [tensors[field][view, row].tobytes() for field in fields] + [tensors["bad"][row].tobytes()]
            sums[view, row] = xxhash.xxh3_64_intdigest(b"".join(parts))
        tensors["checks"] = sums
    write_tensors(path, tensors, metadata)


def read_set(here: Stored) -> None:
    """An epoch of a set with its tokens, as training reads it."""
    images = ImageSet(here.images)
    places = Order([shard.samples for shard in images.manifest.shards], OrderPolicy(chunk=4, window=2, lanes=4))
    stream = Stream(
        images=images, places=places, source=RecordedViews(images, here.tokens), size=(16, 16), resample="lanczos"
    )
    batch = stream.batch(np.arange(len(images)))
    assert batch.tokens.min() >= 0 and bool(torch.isfinite(batch.jitters).all())


def test_sets_that_vouch_for_what_they_hold(case):
    """Offsets beyond the tar, boxes beyond the image, tokens beyond the vocabulary, jitters that are not finite."""

    def one(number: int) -> Callable[[], object]:
        rng, here = chance(SEED + 4, number), case()
        name = f"shard-00000{rng.randrange(3)}"
        path = index_path(here.images, name) if number % 2 else token_path(here.tokens, name)
        other_values(path, rng, checks=True)
        resigned(here)
        return lambda: read_set(here)

    counts(ends(SLOW, SEED + 4, one))


def test_sets_harmed_anywhere(case):
    """One file of a set, and everything that reads sets of a folder."""

    def one(number: int) -> Callable[[], object]:
        rng, here = chance(SEED + 5, number), case()
        path = rng.choice(sorted(path for path in here.folder.rglob("*") if path.is_file()))
        path.write_bytes(harmed(path.read_bytes(), rng))
        verbs: list[Callable[[], object]] = [
            lambda: read_set(here),
            lambda: verify_images(here.images, True, 1, line),
            lambda: verify_tokens(here.tokens, here.images, True, 1, line),
            lambda: (image_stats(here.images), token_stats(here.tokens)),
            lambda: adopt(here.images, 1),
        ]
        return verbs[number % len(verbs)]

    counts(ends(SLOW, SEED + 5, one), least_lines=0.1)


def line(finding: str) -> None:
    assert finding and "\n" not in finding, finding


def test_keys_of_any_kind_are_one_line(tmp_path, whole):
    """A key may hold line breaks and a terminal's commands; a message holds neither."""
    folder = tmp_path / "images"
    shutil.copytree(whole.images, folder)
    path = index_path(folder, "shard-000000")
    tensors, metadata = open_tensors(path)
    text = tensors["key_text"].copy()
    text[:] = ord("\n")
    text[::2] = 0x1B
    write_tensors(path, {**tensors, "key_text": text}, metadata)
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(tensors["image_offset"][0]) + 40] ^= 1
    tar.write_bytes(data)
    manifest = manifests.read_image_manifest(folder)
    first = dataclasses.replace(manifest.shards[0], index_digest=file_digest(path))
    write_manifest(folder, dataclasses.replace(manifest, shards=[first, *manifest.shards[1:]]))
    assert "checksum" in ended(lambda: ImageSet(folder).read(0, 0), ShardError, "keys")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path, whole):
    """A terabyte of nothing costs no time where its size cannot be right."""
    folder = tmp_path / "set"
    shutil.copytree(whole.folder, folder)
    for path in [
        folder / "images" / "manifest.json",
        index_path(folder / "images", "shard-000000"),
        token_path(folder / "tokens", "shard-000000"),
        folder / "images" / "shard-000000.tar",
    ]:
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.truncate(1 << 40)
        assert ended(lambda: read_set(Stored(folder)), ShardError, path.name) != "value"
        with open(path, "r+b") as file:
            file.truncate(size)
    read_set(Stored(folder))
