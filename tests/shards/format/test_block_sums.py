"""An index whose checksums a manifest vouches for is not read through, and no changed byte of it is believed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import xxhash

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.format.index import Index, IndexRow, index_path, open_index, write_index
from beitforge.shards.format.manifest import ImageManifest, ImageShard, read_image_manifest, write_manifest
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.reading import OpenFile, file_digest
from beitforge.shards.storage.tensors import BLOCK_SUMS, TensorFile, laid_out, open_tensors, with_checks, write_tensors
from beitforge.shards.stream.image_set import ImageSet
from tests.shards.storage.servers import http_server

ROWS = 2000
ROW = IndexRow(
    key="", key_hash=1, image_offset=0, image_size=512, image_xxh3=7, width=9, height=9, mean_grey=1, flags=1
)


def rows(count: int = ROWS) -> list[IndexRow]:
    return [
        dataclasses.replace(ROW, key=f"key-{n:06d}", key_hash=n, image_offset=1024 * n, mean_grey=n % 256, label=n)
        for n in range(count)
    ]


def make_set(folder: Path, given: list[IndexRow]) -> ImageManifest:
    """A set of one shard, whose tar is a hole."""
    folder.mkdir(exist_ok=True)
    with open(folder / "a.tar", "wb") as tar:
        tar.truncate(1024 * len(given))
    write_index(index_path(folder, "a"), given, {"tar_bytes": "0"})
    return close(folder, len(given))


def close(folder: Path, count: int) -> ImageManifest:
    index = open_index(index_path(folder, "a"))
    entry = ImageShard(
        name="a",
        samples=count,
        bytes=1024 * count,
        digest="d",
        index_digest=file_digest(index.path),
        checks_digest=index.checks_digest,
    )
    made = ImageManifest(shards=[entry], classes=[], made_by={})
    write_manifest(folder, made)
    return made


@pytest.fixture
def read_bytes(monkeypatch) -> list[int]:
    """Of each read."""
    found: list[int] = []
    real = OpenFile._piece

    def piece(self: OpenFile, size: int, start: int) -> bytes:
        data = real(self, size, start)
        found.append(len(data))
        return data

    monkeypatch.setattr(OpenFile, "_piece", piece)
    return found


@pytest.mark.parametrize("length", [0, 1, 500, 4000, 4096, 5000, 400_000])
def test_the_sums_are_those_of_the_file(tmp_path, length):
    """Whatever the header's length does to their number; and the reference reader takes the file."""
    path, given = tmp_path / "f", {"a": np.arange(length, dtype=np.uint8), "b": np.arange(3, dtype=np.int64)}
    write_tensors(path, with_checks(given, {"m": "x" * length}), {"m": "x" * length}, BLOCK_SUMS)
    data, file = path.read_bytes(), TensorFile(path)
    sums = file.tensors[BLOCK_SUMS]
    blocks = [data[: sums.start][at : at + 4096] for at in range(0, sums.start, 4096)]
    assert sums.whole().tolist() == [xxhash.xxh3_64_intdigest(block) for block in blocks]
    assert sums.start + 8 * len(blocks) == len(data) and file.checks_hold
    tensors, _ = open_tensors(path)
    assert (tensors["a"] == given["a"]).all() and (tensors["b"] == given["b"]).all()
    assert not file.vouched("0" * 32) and file.vouched(file.checks_digest)
    assert (file.tensors["a"].whole() == given["a"]).all()


def test_other_tensors_of_that_name_are_no_sums(tmp_path):
    """Of another type, another number, or not at the end."""
    for wrong in (np.zeros(1, np.int64), np.zeros(2, np.uint64), np.zeros((1, 1), np.uint64)):
        write_tensors(
            tmp_path / "f", {"a": np.zeros(9), BLOCK_SUMS: wrong} | {"a": np.zeros(9, np.uint8)}, {}, BLOCK_SUMS
        )
        assert TensorFile(tmp_path / "f").checks_digest == ""
    write_tensors(tmp_path / "f", {BLOCK_SUMS: np.zeros(1, np.uint64), "a": np.zeros(9, np.uint8)}, {})
    assert TensorFile(tmp_path / "f").checks_digest == "" and TensorFile(tmp_path / "f").checks_hold
    assert len(laid_out({"a": np.zeros(9, np.uint8)}, {})) == 2


def test_an_index_is_not_read_through(tmp_path, read_bytes):
    made = make_set(tmp_path / "set", rows(20_000))
    size = index_path(tmp_path / "set", "a").stat().st_size
    images = ImageSet(tmp_path / "set")
    read_bytes.clear()
    assert images.row(0, 0).key_hash == 0 and images.index(0).vouched
    assert sum(read_bytes) < size / 40, "64 rows and the checksums"
    assert images.row(0, 19_999).label == 19_999 and images.index(0).key(7) == "key-000007"
    assert sum(read_bytes) < size / 20
    read_bytes.clear()
    listed = dataclasses.replace(made.shards[0], checks_digest="")
    write_manifest(tmp_path / "set", dataclasses.replace(made, shards=[listed]))
    images = ImageSet(tmp_path / "set")
    assert images.row(0, 0).key_hash == 0 and not images.index(0).vouched
    assert sum(read_bytes) > size, "as those of earlier versions are"


def test_no_changed_byte_is_believed(tmp_path):
    """In the length, the header, each column, the checksums: noticed when it is opened or when its row is read, or
    never asked for."""
    make_set(tmp_path / "set", rows(300))
    path = index_path(tmp_path / "set", "a")
    whole, noticed, places = path.read_bytes(), 0, []

    def all_of_it() -> list:
        images = ImageSet(tmp_path / "set")
        return [(images.row(0, row), images.index(0).key(row)) for row in range(300)]

    expected = all_of_it()
    file = TensorFile(path)
    for tensor in file.tensors.values():
        places += [tensor.start, tensor.start + tensor.rows[0] // 2, tensor.start + tensor.rows[0] - 1]
    places += [0, 3, 7, 8, 40, *range(100, 1000, 97)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert all_of_it() == expected, place
        except ShardError as error:
            assert "a.index" in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 0.6 * len(places)
    path.write_bytes(whole)
    assert all_of_it() == expected


def test_damage_that_comes_later_is_noticed(tmp_path):
    """Once the checksums did not hold the index is read through: the message says what that found."""
    make_set(tmp_path / "set", rows())
    images = ImageSet(tmp_path / "set")
    path = index_path(tmp_path / "set", "a")
    assert images.index(0).vouched
    place = TensorFile(path).tensors["label"].start + 8 * 1000
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\x77")
    assert images.row(0, 0).label == 0, "in another block"
    with pytest.raises(Damaged, match=r"is not the index that .*manifest\.json lists"):
        images.row(0, 1000)


def test_checksums_that_were_damaged_before_the_set_was_closed(tmp_path):
    """They fit nothing, and the index is read through, as its own digest asks for: the set stays readable. `verify`
    says so."""
    make_set(tmp_path / "set", rows(300))
    path = index_path(tmp_path / "set", "a")
    start = TensorFile(path).tensors[BLOCK_SUMS].start
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\x01\x02")
    assert not open_index(path).whole
    close(tmp_path / "set", 300)
    images = ImageSet(tmp_path / "set")
    assert images.row(0, 299).label == 299 and not images.index(0).vouched
    found: list[str] = []
    verify_images(tmp_path / "set", False, 1, found.append)
    assert any("has other checksums of itself than the manifest lists" in line for line in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_grey": float("nan")}, "mean grey that no image has"),
        ({"mean_grey": 256.0}, "mean grey that no image has"),
        ({"image_size": 1 << 40}, "the image of row 150"),
        ({"image_size": 1025}, "the image of row 150"),
        ({"image_offset": 1 << 60}, "the image of row 150"),
    ],
    ids=str,
)
def test_rows_that_no_index_has(tmp_path, change, message):
    """Vouched for all the same: looked at when they are read."""
    given = rows(300)
    given[150] = dataclasses.replace(given[150], **change)
    make_set_unchecked(tmp_path / "set", given)
    images = ImageSet(tmp_path / "set")
    assert images.row(0, 0).label == 0 and images.index(0).vouched
    with pytest.raises(ShardError, match=message):
        images.row(0, 150)


def make_set_unchecked(folder: Path, given: list[IndexRow]) -> None:
    make_set(folder, rows(len(given)))
    path = index_path(folder, "a")
    write_index(path, given, {"tar_bytes": "0"})
    entry = dataclasses.replace(
        read_image_manifest(folder).shards[0],
        index_digest=file_digest(path),
        checks_digest=TensorFile(path).checks_digest,
    )
    write_manifest(folder, ImageManifest(shards=[entry], classes=[], made_by={}))


def test_keys_that_end_where_they_cannot(tmp_path):
    path = tmp_path / "i"
    write_index(path, rows(10), {})
    tensors, metadata = open_tensors(path)
    ends = tensors["key_end"].copy()
    ends[4] = 3
    del tensors[BLOCK_SUMS]
    write_tensors(path, with_checks({**tensors, "key_end": ends}, metadata), metadata, BLOCK_SUMS)
    index = Index(TensorFile(path), TensorFile(path).checks_digest)
    assert index.key(3) == "key-000003"
    with pytest.raises(Damaged, match="where its keys end cannot be"):
        index.key(4)


def test_verify_compares_the_columns(tmp_path):
    """Those of another set are named; missing ones are no finding."""
    make_set(tmp_path / "set", rows(30))
    make_set(tmp_path / "other", rows(40))
    found: list[str] = []
    path = tmp_path / "set" / "manifest.columns"
    verify_images(tmp_path / "set", False, 1, found.append)
    assert not [line for line in found if "manifest.columns" in line]
    path.write_bytes((tmp_path / "other" / "manifest.columns").read_bytes())
    verify_images(tmp_path / "set", False, 1, found.append)
    assert [line for line in found if "manifest.columns does not belong to its manifest.json" in line]
    found.clear()
    path.unlink()
    verify_images(tmp_path / "set", False, 1, found.append)
    assert not [line for line in found if "manifest.columns" in line]


def test_behind_a_url_neither(tmp_path, read_bytes):
    """The index in the node's cache is hashed by whoever fetched it; once it is damaged there, it is fetched again."""
    make_set(tmp_path / "set", rows(20_000))
    size = index_path(tmp_path / "set", "a").stat().st_size
    cache = Cache(tmp_path / "cache", 10**9)
    with http_server(tmp_path) as root:
        assert ImageSet(f"{root}/set", cache).row(0, 5).label == 5
        images = ImageSet(f"{root}/set", cache)
        read_bytes.clear()
        assert images.row(0, 700).label == 700
        assert sum(read_bytes) < size / 20
        (kept,) = (tmp_path / "cache").glob("*/a.index.safetensors")
        kept.write_bytes(bytes(size - 4096) + kept.read_bytes()[-4096:])
        assert ImageSet(f"{root}/set", cache).row(0, 9).label == 9
        with open(kept, "r+b") as file:
            file.seek(TensorFile(kept).tensors["label"].start + 8 * 9000)
            file.write(b"\x01\x02")
        assert images.row(0, 9000).label == 9000 and ImageSet(f"{root}/set", cache).row(0, 9000).label == 9000
