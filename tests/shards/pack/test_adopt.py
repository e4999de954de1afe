"""Adopting foreign tars: nothing rewritten, nothing trusted, nothing done twice."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import index_path, open_index
from beitforge.shards.format.manifest import read_image_manifest
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.pack.adopt import Adopted, adopt
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from beitforge.shards.pack.tar_scan import scan_tar
from beitforge.shards.storage.files import PARTIAL
from beitforge.shards.storage.reading import file_digest
from tests.shards.made_images import jpeg, two_classes


def write_tar(folder: Path, name: str, members: list[tuple[str, bytes]]) -> Path:
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(first: int, count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(first, first + count)
        for member in ((f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.cls", str(i % 3).encode()))
    ]


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Three tars as another tool leaves them, one without any sample."""
    write_tar(tmp_path, "00000", labelled(0, 4))
    write_tar(tmp_path, "00001", labelled(4, 3))
    write_tar(tmp_path, "00002", [])
    return tmp_path


def run(folder: Path, workers: int = 1) -> Adopted:
    return adopt(folder, workers)


def findings(folder: Path) -> list[str]:
    found: list[str] = []
    verify_images(folder, True, 1, found.append)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_adopted_tars_are_a_shard_set(foreign, workers):
    """The tars stay as they are to the byte; index and manifest make them a set that verifies."""
    before = {path.name: file_digest(path) for path in foreign.glob("*.tar")}
    adopted = run(foreign, workers)
    assert {path.name: file_digest(path) for path in foreign.glob("*.tar")} == before
    assert (adopted.manifest.samples, adopted.empty, adopted.num_bad, adopted.kept) == (7, ["00002"], 0, 0)
    assert [shard.name for shard in read_image_manifest(foreign).shards] == ["00000", "00001"]
    assert adopted.manifest.classes == ["0", "1", "2"]
    index = open_index(index_path(foreign, "00001"))
    assert [index.key(i) for i in range(3)] == ["00004", "00005", "00006"]
    assert index.label.tolist() == [1, 2, 0]
    (foreign / "00002.tar").unlink()
    assert findings(foreign) == []


def test_unlabelled_tars_have_no_classes(tmp_path):
    """One sample without a label, and there are no classes to train on."""
    write_tar(tmp_path, "a", [*labelled(0, 3), ("x.jpg", jpeg())])
    assert run(tmp_path).manifest.classes == []


def test_finished_tars_are_not_scanned_again(foreign, monkeypatch):
    """A killed adoption goes on, and a grown set is cheap: only new tars are decoded."""
    run(foreign)
    write_tar(foreign, "00003", labelled(20, 2))
    (foreign / f"00001.index.safetensors{PARTIAL}00000000").write_bytes(b"half")
    scanned: list[str] = []

    def scan(path, beat):
        scanned.append(path.name)
        return scan_tar(path, beat)

    monkeypatch.setattr("beitforge.shards.pack.adopt.scan_tar", scan)
    adopted = run(foreign)
    assert scanned == ["00003.tar"]
    assert (adopted.kept, adopted.manifest.samples) == (3, 9)
    assert not list(foreign.glob(f"*{PARTIAL}*"))


@pytest.mark.parametrize("harm", ["tar", "index", "index lost"])
def test_what_no_longer_fits_is_scanned_again(foreign, harm):
    """An index of other bytes, or one damaged since, must not be taken over into a new manifest."""
    run(foreign)
    path = index_path(foreign, "00000")
    good = path.read_bytes()
    if harm == "tar":
        write_tar(foreign, "00000", labelled(50, 4))
    elif harm == "index":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    else:
        path.unlink()
    assert run(foreign).kept == 2
    assert (path.read_bytes() == good) == (harm != "tar")
    (foreign / "00002.tar").unlink()
    assert findings(foreign) == []


def test_an_index_damaged_before_there_was_a_manifest_is_made_again(foreign):
    """A killed adoption leaves indexes that nothing vouches for but themselves; a bit decides key, label or size."""
    run(foreign)
    path = index_path(foreign, "00001")
    good = path.read_bytes()
    for place in range(8, len(good), 61):
        (foreign / "manifest.json").unlink()
        path.write_bytes(good[:place] + bytes([good[place] ^ 2]) + good[place + 1 :])
        assert run(foreign).kept == 2, f"byte {place}"
        assert path.read_bytes() == good


def test_keys_used_in_two_tars_are_listed(foreign):
    """Within a tar the scan finds them, across tars only the set does; all pairs are named."""
    write_tar(foreign, "00003", labelled(2, 3))
    with pytest.raises(ShardError, match=r"3 pairs do not: key 0000[234] in 0000. row . and 00003 row") as raised:
        run(foreign)
    assert all(f"key {key}" in str(raised.value) for key in ("00002", "00003", "00004"))
    assert not (foreign / "manifest.json").exists()


def test_keys_of_one_hash_are_listed(foreign, monkeypatch):
    """The token shards could not tell them apart."""
    monkeypatch.setattr("beitforge.shards.pack.tar_scan.hash_key", lambda key: int(key) // 6)
    with pytest.raises(ShardError, match="keys 00000 and 00001 with the same hash"):
        run(foreign)


def test_bad_images_are_counted(foreign):
    """They keep their rows, so the samples stay the tar's own."""
    write_tar(foreign, "00003", [("bad.jpg", b"no image"), ("good.jpg", jpeg(77))])
    adopted = run(foreign)
    assert (adopted.num_bad, adopted.manifest.samples) == (1, 9)


def test_a_damaged_tar_stops_it(foreign):
    """A set is whole or it has no manifest."""
    path = foreign / "00001.tar"
    os.truncate(path, 5000)
    with pytest.raises(ShardError, match=r"00001\.tar: member .* is cut off"):
        run(foreign)
    assert not (foreign / "manifest.json").exists()


def test_a_packed_set_keeps_its_class_names(tmp_path):
    """`index` repairs the index of a packed set too, and must not lose what only its manifest knows."""
    pack(two_classes(tmp_path / "in", 3), tmp_path / "set", PackOptions(), "1%", 1)
    before = read_image_manifest(tmp_path / "set")
    index_path(tmp_path / "set", "shard-000000").write_bytes(b"damaged")
    run(tmp_path / "set")
    after = read_image_manifest(tmp_path / "set")
    assert (after.classes, after.made_by, after.fingerprint) == (before.classes, before.made_by, before.fingerprint)
    assert findings(tmp_path / "set") == []


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, r"holds no \.tar"),
        (lambda folder: write_tar(folder, "a", []), "the 1 tars in .* hold no sample"),
        (lambda folder: (folder / "packing.json").write_text("{}"), "holds an unfinished packing"),
        (lambda folder: folder.rmdir(), "is not a folder"),
    ],
)
def test_folders_that_are_no_set(tmp_path, prepare, message):
    """Each with its own cure."""
    folder = tmp_path / "set"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(ShardError, match=message):
        run(folder)
