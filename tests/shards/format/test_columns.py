"""manifest.columns says what manifest.json says, or is not believed: then manifest.json is read as it always was."""

import dataclasses
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format import columns as columnar
from beitforge.shards.format import manifest as manifests
from beitforge.shards.format.columns import Held, Shards
from beitforge.shards.format.manifest import (
    ImageManifest,
    ImageShard,
    TokenManifest,
    TokenShard,
    read_image_manifest,
    read_token_manifest,
    write_manifest,
)
from beitforge.shards.format.tokens import check_pairing
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.reading import OpenFile
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.order import Order, OrderPolicy
from beitforge.shards.stream.view_sources import RecordedViews
from tests.shards.storage.servers import http_server

MANY = 3000


def names(count: int) -> list[str]:
    return [f"shard-{number:06d}" for number in range(count)]


def images(count: int = MANY, checks: str = "c") -> ImageManifest:
    shards = [
        ImageShard(
            name=name,
            samples=1 + number % 7,
            bytes=10240 + number,
            digest=f"{number:032x}",
            index_digest=f"{number + 1:032x}",
            checks_digest=checks,
        )
        for number, name in enumerate(names(count))
    ]
    return ImageManifest(shards=shards, classes=["cat", "dög"], made_by={"verb": "pack", "bad": 3})


def tokens(of: ImageManifest) -> TokenManifest:
    shards = [
        TokenShard(name=one.name, samples=one.samples, digest=f"{one.bytes:032x}", image_digest=one.digest)
        for one in of.shards
    ]
    identity = {"fingerprint": "f", "vocabulary": 8, "grid": [2, 2]}
    return TokenManifest(shards=shards, tokenizer=identity, policy={"seed": 1}, num_views=2, provenance={})


def columnwise(manifest: ImageManifest | TokenManifest) -> bool:
    return isinstance(manifest.shards, Shards)


@pytest.fixture
def refused(caplog):
    """Whether manifest.columns was left aside, by name."""

    def look() -> bool:
        found = ["manifest.columns is left aside" in record.getMessage() for record in caplog.records]
        caplog.clear()
        return any(found)

    caplog.set_level(logging.WARNING, logger=manifests.__name__)
    return look


@pytest.mark.parametrize("count", [1, 5, MANY])
def test_columns_say_what_the_manifest_says(tmp_path, count):
    made, read = images(count), None
    write_manifest(tmp_path, made)
    read = read_image_manifest(tmp_path)
    assert columnwise(read) and read == made and made == read and list(read.shards) == made.shards
    assert (read.samples, read.fingerprint, read.counts.tolist()) == (made.samples, made.fingerprint, [*made.counts])
    assert all((read.column(field) == made.column(field)).all() for field in ("name", "bytes", "digest"))
    assert [read.shards[n] for n in (0, -1, count // 2)] == [made.shards[n] for n in (0, -1, count // 2)]
    assert read.shards[1:3] == made.shards[1:3] and len(read.shards) == count
    with pytest.raises(IndexError):
        read.shards[count]
    (tmp_path / columnar.NAME).unlink()
    alone = read_image_manifest(tmp_path)
    assert not columnwise(alone) and alone == made and alone.fingerprint == made.fingerprint
    again = pickle.loads(pickle.dumps(read))
    assert again == made and isinstance(again.shards.columns["name"], Held)


def test_columns_of_tokens(tmp_path):
    made = tokens(images())
    write_manifest(tmp_path, made)
    read = read_token_manifest(tmp_path)
    assert columnwise(read) and read == made and read.fingerprint == made.fingerprint
    other = dataclasses.replace(read, policy={"seed": 2})
    assert other.fingerprint == dataclasses.replace(made, policy={"seed": 2}).fingerprint != made.fingerprint


def spread(size: int, head: int) -> list[int]:
    """Places of every kind: the length, the header, each of its bytes here and there, the columns, the seal."""
    return sorted(
        {*range(16), *range(16, head, 37), *np.linspace(head, size - 17, 60, dtype=int), *range(size - 16, size)}
    )


@pytest.mark.parametrize("made", [images(40), tokens(images(40))], ids=["images", "tokens"])
def test_no_changed_byte_is_believed(tmp_path, made, refused):
    read = read_image_manifest if isinstance(made, ImageManifest) else read_token_manifest
    write_manifest(tmp_path, made)
    path = tmp_path / columnar.NAME
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for place in spread(len(whole), head):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = read(tmp_path)
        assert found == made and not columnwise(found) and refused(), place
    for damaged in (b"", whole[:7], whole[:head], whole[:-1], whole[:-16], whole + b"\0", whole[8:], bytes(len(whole))):
        path.write_bytes(damaged)
        assert read(tmp_path) == made and refused(), len(damaged)
    path.write_bytes(whole)
    assert columnwise(read(tmp_path)) and not refused()


def test_columns_of_another_set_or_an_earlier_one(tmp_path, refused):
    """Swapped, left from before, or of tokens: manifest.json decides."""
    one, other, old = images(30), images(31), images(30, checks="")
    write_manifest(tmp_path / "a", one)
    write_manifest(tmp_path / "b", other)
    write_manifest(tmp_path / "t", tokens(one))
    for foreign in ("b", "t"):
        shutil.copy(tmp_path / foreign / columnar.NAME, tmp_path / "a")
        found = read_image_manifest(tmp_path / "a")
        assert found == one and not columnwise(found) and refused()
    write_manifest(tmp_path / "a", old)
    shutil.copy(tmp_path / "a" / columnar.NAME, tmp_path / "kept")
    write_manifest(tmp_path / "a", one)
    shutil.copy(tmp_path / "kept", tmp_path / "a" / columnar.NAME)
    assert read_image_manifest(tmp_path / "a") == one and refused()


def test_a_manifest_edited_by_hand_counts(tmp_path, refused):
    """Whatever it keeps of its first line."""
    write_manifest(tmp_path, images(30))
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    del content["digest"]
    content["classes"] = ["cat", "dog"]
    path.write_text(json.dumps(content, indent=1))
    assert read_image_manifest(tmp_path).classes == ["cat", "dog"] and refused()
    content["classes"] = 7
    path.write_text(json.dumps(content, indent=1))
    with pytest.raises(ShardError, match="classes is '7'"):
        read_image_manifest(tmp_path)


def test_manifests_of_earlier_versions_have_no_columns(tmp_path, refused):
    """Nothing is said, and columns that lie there are not opened."""
    write_manifest(tmp_path, images(30))
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    del content["columns"]
    content["digest"] = manifests._digest(content)
    path.write_text(json.dumps(content, indent=1))
    found = read_image_manifest(tmp_path)
    assert found == images(30) and not columnwise(found) and not refused()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "shard-000001"),
        ("name", ""),
        ("name", ".."),
        ("name", "a/b"),
        ("name", "a\x1bb"),
        ("name", "a\x85b"),
        ("name", "a\u2028b"),
        ("digest", "a\nb"),
        ("samples", 0),
        ("samples", 2**53),
        ("bytes", 511),
    ],
    ids=repr,
)
def test_columns_that_say_what_no_shard_has(tmp_path, field, value, monkeypatch):
    """They belong to their manifest, and both are refused as the manifest alone is."""
    made = images(30)
    made.shards[7] = dataclasses.replace(made.shards[7], **{field: value})
    with monkeypatch.context() as patched:
        patched.setattr(columnar, "columns_of", unchecked)
        write_manifest(tmp_path, made)
    assert (tmp_path / columnar.NAME).exists()
    with pytest.raises(ShardError, match=r"manifest\.json is not what schema 1 asks for") as both:
        read_image_manifest(tmp_path)
    (tmp_path / columnar.NAME).unlink()
    with pytest.raises(ShardError) as alone:
        read_image_manifest(tmp_path)
    assert str(both.value) == str(alone.value)


def unchecked(kind: type, shards: list) -> dict[str, np.ndarray]:
    found = {field.name: columnar.column_of(shards, field.name) for field in dataclasses.fields(kind)}
    return {
        name: column if column.dtype == np.int64 else column.view(np.uint8).reshape(len(column), -1)
        for name, column in found.items()
    }


def test_what_has_no_columns_is_written_without(tmp_path):
    """A text that is too long for one; the columns from before go."""
    write_manifest(tmp_path, images(5))
    made = images(5)
    made.shards[2] = dataclasses.replace(made.shards[2], digest="d" * 201)
    write_manifest(tmp_path, made)
    assert not (tmp_path / columnar.NAME).exists()
    assert read_image_manifest(tmp_path) == made


def test_names_of_all_lengths_and_scripts(tmp_path):
    made = images(6)
    given = ["a", "ü", "b" * 200, "画像-000001", ".hidden", "a b"]
    made.shards[:] = [dataclasses.replace(shard, name=name) for shard, name in zip(made.shards, given, strict=True)]
    write_manifest(tmp_path, made)
    read = read_image_manifest(tmp_path)
    assert columnwise(read) and [shard.name for shard in read.shards] == given and read.fingerprint == made.fingerprint


def test_killed_between_the_two(tmp_path, monkeypatch, refused):
    """manifest.json is written last, and closes the set: until then the one before counts."""

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(manifests, "write_text", killed)
        write_manifest(tmp_path, images(5))
    with pytest.raises(ShardError, match="unfinished"):
        read_image_manifest(tmp_path)
    write_manifest(tmp_path, images(5))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(manifests, "write_text", killed)
        write_manifest(tmp_path, images(6))
    assert read_image_manifest(tmp_path) == images(5) and refused()


def test_another_program_keeps_its_file(tmp_path):
    (tmp_path / columnar.NAME).write_bytes(b"columns of a hall")
    with pytest.raises(ShardError, match="was not written by beitforge"):
        manifests.refuse_other_manifest(tmp_path)


def test_pairs_are_compared_by_column(tmp_path):
    """With the messages that lists had."""
    of = images(50)
    write_manifest(tmp_path / "i", of)
    ours = read_image_manifest(tmp_path / "i")

    def refusal(change: Callable[[list], object]) -> str:
        made = tokens(of)
        change(made.shards)
        write_manifest(tmp_path / "t", made)
        with pytest.raises(ShardError) as error:
            check_pairing(ours, read_token_manifest(tmp_path / "t"), "T")
        return str(error.value)

    write_manifest(tmp_path / "t", tokens(of))
    check_pairing(ours, read_token_manifest(tmp_path / "t"), "T")
    set_at = lambda at, **new: lambda shards: shards.__setitem__(at, dataclasses.replace(shards[at], **new))  # noqa: E731
    assert "T: shard-000009 has 99 samples, its image shard 3" in refusal(set_at(9, samples=99))
    made_from_others = refusal(set_at(4, image_digest="0" * 31 + "x"))
    assert "T: shard-000004 was made from other images" in made_from_others and "a new folder" in made_from_others
    assert "(1 differ, first shard-000049)" in refusal(lambda shards: shards.pop())
    assert "the same names in another order" in refusal(lambda shards: shards.reverse())


def test_opening_makes_no_entry(tmp_path, monkeypatch):
    """No loop over the shards: neither an entry, nor a read, for each."""
    of = images()
    write_manifest(tmp_path / "i", of)
    write_manifest(tmp_path / "t", tokens(of))
    reads: list[int] = []
    real, made = OpenFile._piece, []

    def piece(self: OpenFile, size: int, start: int) -> bytes:
        reads.append(size)
        return real(self, size, start)

    monkeypatch.setattr(OpenFile, "_piece", piece)
    monkeypatch.setattr(Shards, "_some", lambda self, first, last: made.append((first, last)))
    monkeypatch.setattr(manifests, "parse_json", None)  # of manifest.json
    opened = ImageSet(tmp_path / "i")
    source = RecordedViews(opened, tmp_path / "t")
    order = Order(opened.manifest.counts, OrderPolicy())
    assert order.samples == of.samples == len(opened)
    assert (opened.manifest.fingerprint, source.tokens.manifest.fingerprint) == (of.fingerprint, tokens(of).fingerprint)
    size = sum(path.stat().st_size for path in tmp_path.glob("*/manifest.*"))
    assert not made and len(reads) < 60 and sum(reads) < 3 * size + 20 * (1 << 20)


def test_a_file_that_is_replaced_or_damaged_later(tmp_path):
    """Read again by its path; what manifest.json says stays, and another manifest.json ends it."""
    made = images(2000)
    write_manifest(tmp_path, made)
    read = read_image_manifest(tmp_path)
    path = tmp_path / columnar.NAME
    whole = path.read_bytes()
    os.truncate(path, 0)
    path.unlink()
    path.write_bytes(whole)
    assert read.shards[3] == made.shards[3]
    with open(path, "r+b") as file:  # in place: the open file, too
        file.seek(len(whole) // 2)
        file.write(bytes(len(whole) // 4))
    assert list(read.shards) == made.shards, "out of manifest.json"
    read = read_image_manifest(tmp_path)
    write_manifest(tmp_path, made)
    read = read_image_manifest(tmp_path)
    write_manifest(tmp_path, images(2001))
    assert read.shards[1999] == made.shards[1999], "the file that was open"
    read = read_image_manifest(tmp_path)
    os.truncate(path, 100)
    write_manifest(tmp_path, images(2002))
    with pytest.raises(ShardError, match=r"manifest\.json was changed while it was read: start again"):
        list(read.shards)


def test_columns_behind_a_url(tmp_path, refused, monkeypatch):
    """Once into the node's cache; damaged there they are fetched again, and damaged in the store left aside."""
    made = images(300)
    write_manifest(tmp_path / "set", made)
    cache, asked = Cache(tmp_path / "cache", 10**9), []
    real = manifests.Remote.whole
    monkeypatch.setattr(
        manifests.Remote, "whole", lambda self, name, most: asked.append(name) or real(self, name, most)
    )
    with http_server(tmp_path) as root:
        url = f"{root}/set"
        for _ in range(3):
            found = read_image_manifest(url, cache)
            assert columnwise(found) and found == made
        assert sorted(asked) == ["manifest.columns", *["manifest.json"] * 3]
        (kept,) = (tmp_path / "cache").glob("*/manifest.columns")
        kept.write_bytes(bytes(kept.stat().st_size))
        assert columnwise(read_image_manifest(url, cache))
        assert not columnwise(read_image_manifest(url)), "without a cache"
        asked.clear()
        path = tmp_path / "set" / columnar.NAME
        path.write_bytes(path.read_bytes()[:-17] + bytes(17))
        kept.unlink()
        found = read_image_manifest(url, cache)
        assert found == made and not columnwise(found) and refused()
        path.unlink()
        found = read_image_manifest(url, cache)
        assert found == made and not columnwise(found)
        assert asked.count("manifest.json") == 2, "once each, whatever came of the columns"


USS = """
    import sys
    from pathlib import Path
    from beitforge.shards.stream.image_set import ImageSet
    from beitforge.shards.stream.view_sources import RecordedViews

    def uss():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024

    before = uss()
    images = ImageSet(Path(sys.argv[1]) / "i")
    source = RecordedViews(images, Path(sys.argv[1]) / "t")
    print(uss() - before, len(images))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="of Linux")
def test_memory_of_a_process(tmp_path):
    """A list of these shards takes over 20 MB."""
    of = images(20_000)
    write_manifest(tmp_path / "i", of)
    write_manifest(tmp_path / "t", tokens(of))

    def megabytes() -> float:
        words = [sys.executable, "-c", textwrap.dedent(USS), str(tmp_path)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        used, samples = done.stdout.split()
        assert int(samples) == of.samples
        return float(used)

    with_columns = megabytes()
    for path in tmp_path.glob("*/manifest.columns"):
        path.unlink()
    assert with_columns < 8 and megabytes() > with_columns + 10
