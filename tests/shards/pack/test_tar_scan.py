"""Scanning: what webdataset reads, we read; what it drops silently, we name."""

import gzip
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import (
    FLAG_BAD,
    FLAG_JPEG,
    FLAG_LABELLED,
    FLAG_NOT_RGB,
    FLAG_PNG,
    open_index,
    write_index,
)
from beitforge.shards.pack.tar_scan import read_tar, scan_tar, split_name
from tests.shards.made_images import encoded, jpeg, photo, read_with_webdataset

Members = list[tuple[str, bytes]]
PNG = encoded(photo(seed=9)[..., 0], "PNG")


def write_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, seed: int = 0, label: int = 1) -> Members:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", jpeg(seed)), (f"{key}.json", b"{}")]


def five(path: Path) -> Path:
    return write_tar(path, [member for i in range(5) for member in sample(f"d/{i}", i, i)])


def headers(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def scan(path: Path):
    return scan_tar(path, lambda count: None).rows


@given(st.text(st.sampled_from("a.b/_X \n"), max_size=9) | st.text(max_size=9))
def test_names_are_cut_as_webdataset_cuts_them(name):
    """Keys must be webdataset's own, or two readers of one tar see different samples."""
    key, extension = base_plus_ext(name)
    skipped = re.match(r"__[^/]*__($|/)", name) or ("/" not in name and name.startswith("__") and name.endswith("__"))
    assert split_name(name) == (None if key is None or skipped else (key, extension.lower()))


def test_rows_say_where_and_what(tmp_path):
    """Every column, against the tar itself: the index is what makes a tar random access."""
    path = write_tar(tmp_path / "x.tar", [*sample("d/a", 3, -7), ("d/b.PNG", PNG), ("README", b"no sample")])
    first, second = scan(path)
    raw = path.read_bytes()
    for row, data in ((first, jpeg(3)), (second, PNG)):
        assert raw[row.image_offset : row.image_offset + row.image_size] == data
        assert row.image_xxh3 == xxhash.xxh3_64_intdigest(data)
        assert row.key_hash == hash_key(row.key)
        assert row.mean_grey == codec.greys(codec.decode(data))[0]
        assert (row.width, row.height) == (48, 32)
    assert raw[first.label_offset : first.label_offset + first.label_size] == b"-7"
    assert raw[first.json_offset : first.json_offset + first.json_size] == b"{}"
    assert (first.key, first.label, first.flags) == ("d/a", -7, FLAG_JPEG | FLAG_LABELLED)
    assert (second.key, second.label, second.flags) == ("d/b", 0, FLAG_PNG | FLAG_NOT_RGB)
    assert second.label_size == second.json_size == 0


def test_index_round_trip(tmp_path):
    """Rows written and mapped again are the rows; the same rows always give the same file."""
    rows = scan(five(tmp_path / "x.tar"))
    metadata = {name: name for name in "zyxwvu"}
    for name in ("a", "b"):
        write_index(tmp_path / name, rows, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    index = open_index(tmp_path / "a")
    assert [index.key(i) for i in range(len(index))] == [row.key for row in rows]
    for column in ("image_offset", "image_xxh3", "label", "width", "flags"):
        assert getattr(index, column).tolist() == [getattr(row, column) for row in rows]
    np.testing.assert_array_equal(index.mean_grey, np.array([row.mean_grey for row in rows], np.float32))
    assert index.metadata == {**metadata, "digest": index.metadata["digest"]}
    assert index.whole


LONG = "deep/" * 60 + "é" * 40


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("key", ["plain", "with space/ü 猫", LONG, "../up", "/absolute/a", "a.dir/b"])
def test_any_tar_dialect_gives_webdatasets_samples(tmp_path, key, format):
    """Foreign tars come in both dialects with names of any length: same keys, same bytes as webdataset."""
    path = write_tar(tmp_path / "x.tar", [*sample(key, 1), *sample("next", 2)], format)
    theirs = [(s["__key__"], s["jpg"]) for s in read_with_webdataset(path)]
    raw = path.read_bytes()
    ours = [(row.key, raw[row.image_offset : row.image_offset + row.image_size]) for row in scan(path)]
    assert ours == theirs
    assert len(ours) == 2


@pytest.mark.parametrize("harm", ["zeros", "noise", "one byte"])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("number", range(3))
def test_a_damaged_long_name_is_refused(tmp_path, format, number, harm):
    """tarfile reads on with a name cut short: the label, or the whole sample, would be passed over as a stranger."""
    members = [(f"{'folder/' * 20}{name}", data) for name, data in sample("a", 1)]
    path = write_tar(tmp_path / "x.tar", members, format)
    at = headers(path)[number].offset + 512
    noise = np.random.default_rng(number).bytes(512)
    overwrite(path, at, {"zeros": bytes(512), "noise": noise, "one byte": b"\0"}[harm])
    with pytest.raises(ShardError, match=r"x\.tar.*(long name before byte \d+ is damaged|no whole header)"):
        scan(path)


def test_a_image_that_does_not_decode_is_a_row(tmp_path):
    """It keeps its place, so that rows stay the tar's samples, and says that it is bad."""
    rows = scan(write_tar(tmp_path / "x.tar", [("a.jpg", b"no image"), ("b.jpg", jpeg())]))
    assert (rows[0].flags, rows[0].width, rows[0].height, rows[0].mean_grey) == (FLAG_BAD, 0, 0, 0.0)
    assert rows[0].image_xxh3 == xxhash.xxh3_64_intdigest(b"no image")
    assert rows[1].flags == FLAG_JPEG


def test_no_samples(tmp_path):
    """A tar of zero members is whole; what it means is the caller's business."""
    assert scan(write_tar(tmp_path / "x.tar", [])) == []


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def overwrite(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


def damage_inside_data(path: Path) -> str:
    cut(path, headers(path)[7].offset_data + 100)
    return r"member d/2.jpg at byte \d+ is cut off"


def damage_inside_padding(path: Path) -> str:
    member = headers(path)[7]
    cut(path, member.offset_data + member.size)
    return r"member d/2.jpg at byte \d+ is cut off"


def damage_on_member_boundary(path: Path) -> str:
    cut(path, headers(path)[6].offset)
    return r"ends at byte \d+ after member d/1.json, without an end-of-archive block"


def damage_inside_a_sample(path: Path) -> str:
    cut(path, headers(path)[7].offset)
    return "after member d/2.cls, without an end-of-archive block"


def damage_inside_header(path: Path) -> str:
    cut(path, headers(path)[6].offset + 200)
    return "inside the header after member d/1.json"


def damage_zeroed_header(path: Path) -> str:
    overwrite(path, headers(path)[6].offset, bytes(512))
    return "data behind the end-of-archive block .* after member d/1.json"


def damage_garbage_header(path: Path) -> str:
    overwrite(path, headers(path)[6].offset, b"\xa5" * 512)
    return r"the header at byte \d+, after member d/1.json, is damaged"


def damage_one_bit_of_a_header(path: Path) -> str:
    at = headers(path)[6].offset + 3
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 1]))
    return r"the header at byte \d+, after member d/1.json, is damaged"


def damage_first_header(path: Path) -> str:
    overwrite(path, 0, b"\xa5" * 512)
    return "not a plain, uncompressed tar"


def damage_no_end(path: Path) -> str:
    last = headers(path)[-1]
    cut(path, last.offset_data + 512)
    return "after member d/4.json, without an end-of-archive block"


def damage_empty(path: Path) -> str:
    cut(path, 0)
    return "empty"


def damage_joined_with_cat(path: Path) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "tars joined with `cat`"


DAMAGES = [function for name, function in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    """Where webdataset ends early without a word, the error has tar, member, byte, and what to do."""
    path = five(tmp_path / "some set-000007.tar")
    message = damage(path)
    with pytest.raises(ShardError, match=message) as raised:
        scan(path)
    assert "some set-000007.tar" in str(raised.value)
    assert "copy or download it again" in str(raised.value)


def test_cut_in_the_long_name_of_a_member(tmp_path):
    """A member with an extended header is three blocks before its data; a cut between them is found too."""
    path = write_tar(tmp_path / "x.tar", [*sample("a"), *sample(LONG)])
    before = headers(path)[3]
    for at in range(before.offset + 512, before.offset_data, 512):
        short = tmp_path / f"{at}.tar"
        short.write_bytes(path.read_bytes()[:at])
        with pytest.raises(ShardError, match=r"no whole header after member a\.json|is cut off|inside the header"):
            scan(short)


def test_compressed_tar_is_refused(tmp_path):
    """Offsets into a gzip stream mean nothing."""
    path = five(tmp_path / "x.tar")
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ShardError, match=r"x\.tar is not a plain, uncompressed tar"):
        scan(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"0"), ("b.cls", b"0")],
            r"a\.cls at byte .* must stand together",
        ),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")], r"a\.jpg at byte .* used by an earlier sample"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], r"two \.jpg members"),
        ([("a.jpg", b"1"), ("a.JPG", b"2")], r"two \.jpg members"),
        ([("a.jpg", b"1"), ("a.png", b"2")], r"sample a at byte \d+ has 2 image members \(jpg, png\)"),
    ],
)
def test_samples_that_are_not_webdatasets(tmp_path, members, message):
    """webdataset makes half samples of interleaved keys and takes two samples of one key; we refuse both."""
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ShardError, match=rf"x\.tar: .*{message}"):
        read_tar(path)


def test_label_with_newline_and_other_members(tmp_path):
    """Files made with `echo 3 > a.cls` and members we do not know are fine."""
    members = [("a.cls", b"3\n"), ("a.jpg", jpeg()), ("a.seg.png", PNG), ("a.txt", b"caption")]
    (row,) = scan(write_tar(tmp_path / "x.tar", members))
    assert row.label == 3
    assert row.image_size == len(jpeg())
