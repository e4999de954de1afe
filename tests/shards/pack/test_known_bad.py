"""Images of adopted tars that do not decode: listed with key and reason, known to every reader, never decoded again."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from beitforge.pipeline.cli import main
from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format import bad_rows as format_bad_rows
from beitforge.shards.format.bad_rows import BadRow, bad_metadata, bad_rows
from beitforge.shards.format.index import FLAG_BAD, index_path, open_index, write_index
from beitforge.shards.format.manifest import known_bad, read_image_manifest
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.pack.adopt import adopt
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from beitforge.shards.pack.tar_scan import scan_tar
from beitforge.shards.storage.reading import file_digest
from beitforge.shards.stream.image_set import ImageSet, KnownBad
from beitforge.shards.stream.loader import SequentialOrder, Stream
from beitforge.shards.stream.view_sources import CentralViews
from tests.shards.made_images import jpeg, two_classes
from tests.shards.pack.test_adopt import write_tar

CUT = jpeg()[:-200]


def spoiled(folder: Path) -> Path:
    """Tars 0 and 2 with two bad images each, 1 with one that is good, 3 with none. Every image has its number as label,
    modulo 4."""
    folder.mkdir(exist_ok=True)
    bad = {0: (3, 7), 1: (*range(11), *range(12, 16)), 2: (0, 15), 3: range(16)}
    for tar, rows in bad.items():
        members = []
        for row in range(16):
            data = jpeg(16 * tar + row) if row not in rows else b"" if row == 7 else CUT
            key = f"{16 * tar + row:05d}"
            members += [(f"{key}.cls", str(row % 4).encode()), (f"{key}.jpg", data)]
        write_tar(folder, str(tar), members)
    return folder


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_index_lists_them_and_verify_knows_them(tmp_path, capsys):
    """By key and reason, in the list, in the index, in words; the manifest has their number."""
    folder = spoiled(tmp_path / "set")
    for _ in range(2):
        assert main(["index", str(folder), "--workers", "1"]) == 0
        said = capsys.readouterr().out
        assert "bad image: 0 00003: does not decode: image file is truncated" in said
        assert "bad image: 0 00007: the file is empty (zero bytes)" in said
        assert "3.tar holds no image that decodes: left out of the manifest" in said
        assert "images that do not decode: 35, 19 of them in the set, with reasons in" in said
        rows = listed(folder)
        assert len(rows) == 35 and len({(row["shard"], row["key"]) for row in rows}) == 35
        assert rows[0] == {"shard": "0", "key": "00003", "reason": rows[0]["reason"]}
        assert "truncated" in rows[0]["reason"]
    manifest = read_image_manifest(folder)
    assert [shard.name for shard in manifest.shards] == ["0", "1", "2"]
    assert known_bad(manifest) == manifest.made_by["bad"] == 19
    assert main(["verify", str(folder), "--decode", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "48 samples in 3 shards, 19 of them known not to decode since they were indexed" in said
    assert said.count("bad image, known since it was indexed: ") == 10
    index = open_index(index_path(folder, "0"))
    assert [(row.row, row.key) for row in bad_rows(index)] == [(3, "00003"), (7, "00007")]


def test_a_decoder_that_finds_otherwise_is_a_finding_which_index_again_ends(tmp_path, monkeypatch):
    """Both ways; `index` alone keeps an index that fits its tar, so the cure names the option."""
    folder = spoiled(tmp_path / "set")
    right = codec.read_image

    def other(data: bytes):
        if data == jpeg(1):
            raise codec.ImageError("this version does not read it")
        return right(data)

    with monkeypatch.context() as patched:
        patched.setattr(codec, "read_image", other)
        adopt(folder, 1)
        assert {"shard": "0", "key": "00001", "reason": "this version does not read it"} in listed(folder)
    found: list[str] = []
    verify_images(folder, True, 1, found.append)
    assert len(found) == 1 and "00001" in found[0] and "run `index --again`" in found[0]
    assert adopt(folder, 1).num_bad == 20
    assert main(["index", str(folder), "--again", "--workers", "1"]) == 0
    found.clear()
    verify_images(folder, True, 1, found.append)
    assert found == [] and known_bad(read_image_manifest(folder)) == 19 and len(listed(folder)) == 35


def test_a_packed_set_and_its_list_stay(tmp_path):
    """`pack` lists what it left out; `index` adds only what does not decode, and its own lines go when that does."""
    images = two_classes(tmp_path / "in", 3)
    (images / "first" / "broken.jpg").parent.mkdir(exist_ok=True)
    (images / "first" / "broken.jpg").write_bytes(CUT)
    folder = tmp_path / "set"
    pack(images, folder, PackOptions(), "50%", 1)
    before, text = read_image_manifest(folder), (folder / "rejected.jsonl").read_bytes()
    assert b"broken.jpg" in text and known_bad(before) == 0
    own = b'{"shard": "shard-000000", "key": "gone", "reason": "x"}\n'
    (folder / "rejected.jsonl").write_bytes(own + text + b"a note of somebody's\n")
    adopt(folder, 1, again=True)
    assert (folder / "rejected.jsonl").read_bytes() == text + b"a note of somebody's\n"
    after = read_image_manifest(folder)
    assert (after.made_by, after.fingerprint) == (before.made_by, before.fingerprint)
    assert pack(images, folder, PackOptions(), "50%", 1).kept == 1  # its index still says which packing made it


def test_no_image_at_all_that_decodes(tmp_path):
    """Refused with the first reason, and the list is there."""
    write_tar(tmp_path, "0", [("a.jpg", CUT), ("b.jpg", b"")])
    with pytest.raises(
        ShardError, match=r"none of the 2 images in .* decodes \(0 a: does not decode: .*rejected.jsonl"
    ):
        adopt(tmp_path, 1)
    assert [row["key"] for row in listed(tmp_path)] == ["a", "b"]


def test_reasons_take_bounded_room_and_rows_keep_their_marks(tmp_path, monkeypatch):
    """An index's header is bounded; so are keys and reasons in it."""
    monkeypatch.setattr(format_bad_rows, "_MOST", 1000)
    tar = write_tar(tmp_path, "0", [(f"{i:03d}{'k' * 50}.jpg", CUT) for i in range(40)] + [("good.jpg", jpeg())])
    adopted = adopt(tmp_path, 1)
    assert adopted.num_bad == len(adopted.bad) == 40
    reasons = [row["reason"] for row in adopted.bad]
    assert "truncated" in reasons[0] and reasons[-1] == "does not decode"
    assert len(bad_metadata(scan_tar(tar, lambda size: None).bad)["bad"]) < 2000
    assert len(bad_metadata([BadRow(0, "k", "r" * 10_000)])["bad"]) < 1000


@pytest.mark.parametrize("text", ["{", "[1]", '[{"row": "a", "key": "b", "reason": "c"}]', '{"row": 1}', "[" * 99_999])
@pytest.mark.parametrize("name", ["bad", "left_out"])
def test_metadata_of_foreign_making_are_refused_in_one_line(tmp_path, name, text):
    folder = spoiled(tmp_path / "set")
    adopt(folder, 1)
    path, rows = index_path(folder, "0"), scan_tar(folder / "0.tar", lambda size: None).rows
    write_index(path, rows, {**open_index(path).metadata, name: text})
    found: list[str] = []
    verify_images(folder, False, 1, found.append)
    assert any(f"what it says of '{name}' is damaged: make it again with `index --again`" in line for line in found)


def stream(folder: Path) -> Stream:
    images = ImageSet(folder)
    places = SequentialOrder([shard.samples for shard in images.manifest.shards])
    return Stream(images=images, places=places, source=CentralViews(), size=(16, 16))


def test_they_are_replaced_unread_and_alike_however_samples_are_batched(tmp_path, monkeypatch):
    """A pure function of the sample, also in a shard of which one image in sixteen can be used; none is decoded, nor is
    its place in the tar looked at."""
    folder = spoiled(tmp_path / "set")
    adopt(folder, 1)
    images = ImageSet(folder)
    places = {
        (images.row(s, r).image_offset, s) for s in range(3) for r in range(16) if images.row(s, r).flags & FLAG_BAD
    }
    read: list[int] = []
    monkeypatch.setattr(
        "beitforge.shards.stream.image_set.twice_read",
        lambda file, size, at, digest: (read.append((at, int(Path(file.path).stem))), file.read(size, at))[1],
    )
    whole = stream(folder).batch(np.arange(48))
    assert len(whole.bad) == 19 and all(bad.known and "known since it was indexed" in bad.reason for bad in whole.bad)
    assert {bad.substitute for bad in whole.bad if bad.shard == "1"} == {"00027"}
    assert not places & set(read) and len(read) == 48
    for world in (1, 2, 3, 4, 5):
        for rank in range(world):
            mine = stream(folder).batch(np.arange(rank, 48, world))
            assert mine.bad == [bad for bad in whole.bad if bad.sample % world == rank]
            assert np.array_equal(mine.pixels, whole.pixels[rank::world])


def test_a_shard_of_only_known_bad_images_of_an_earlier_version_ends_in_one_line(tmp_path):
    """Such a set was adopted before; its samples have no substitute."""
    folder = spoiled(tmp_path / "set")
    adopt(folder, 1)
    for name in ("0", "1", "2"):
        os.remove(folder / f"{name}.tar")
    write_tar(folder, "4", [("y.jpg", jpeg())])
    adopt(folder, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    size, index = (folder / "3.tar").stat().st_size, open_index(index_path(folder, "3"))
    entry = {"name": "3", "samples": 16, "bytes": size, "digest": file_digest(folder / "3.tar")}
    manifest["shards"].insert(0, {**entry, "index_digest": index.digest})
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(KnownBad):
        ImageSet(folder).read(0, 0)
    with pytest.raises(ShardError, match="32 samples tried for 00048, none usable"):
        stream(folder).batch(np.arange(4))
