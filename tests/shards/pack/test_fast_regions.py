"""`pack --fast-regions`: the same pixels in other bytes, whatever is given, and a set that all else reads as before."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from beitforge.shards.decode import codec, jpegtran
from beitforge.shards.decode.jpegtran import ASIDE, FROM_PROGRESSIVE, REWRITTEN
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_PROGRESSIVE, FLAG_REGIONS, index_path, open_index
from beitforge.shards.format.manifest import read_image_manifest
from beitforge.shards.inspect.stats import image_stats
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.pack.adopt import adopt
from beitforge.shards.pack.encode import EncodeOptions, encode
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions, make_plan
from beitforge.shards.stream.image_set import ImageSet
from tests.shards.made_images import encoded, exif, jpeg, photo, resampled_jpeg, write_folder

FAST = EncodeOptions(fast_regions=True)
needs_jpegtran = pytest.mark.skipif(shutil.which("jpegtran") is None, reason="needs libjpeg-turbo's jpegtran")
PHOTO = Image.fromarray(photo(83, 67))
JPEGS = {
    "4:2:0": jpeg(1, 83, 67),
    "4:2:2": jpeg(2, 83, 67, subsampling=1),
    "4:4:0": resampled_jpeg(0x12, 83, 67),
    "4:4:4": jpeg(3, 83, 67, subsampling=0),
    "grey": encoded(PHOTO.convert("L"), "JPEG"),
    "stored as RGB": encoded(PHOTO, "JPEG", keep_rgb=True),
    "progressive": jpeg(4, 83, 67, progressive=True),
    "progressive and grey": encoded(PHOTO.convert("L"), "JPEG", progressive=True),
    "with other restarts": jpeg(5, 83, 67, restart_marker_rows=1),
    "with a profile and EXIF": jpeg(6, 83, 67, exif=exif(1), comment=b"of mine", icc_profile=b"\0" * 70_000),
    "to be turned": jpeg(7, 83, 67, exif=exif(6)),
    "one pixel": jpeg(8, 1, 1),
}
OTHERS = {
    "4:1:1": (resampled_jpeg(0x41, 83, 67), f"{ASIDE} (JPEG of another kind or sampling)"),
    "CMYK": (encoded(PHOTO.convert("CMYK"), "JPEG"), f"{ASIDE} (JPEG of another kind or sampling)"),
    "PNG": (encoded(PHOTO, "PNG"), f"{ASIDE} (png)"),
    "WebP": (encoded(PHOTO, "WEBP"), f"{ASIDE} (webp)"),
}


def canonical(data: bytes) -> bytes:
    """The same coefficients, coded in one way whatever the JPEG was."""
    return subprocess.run(
        ["jpegtran", "-optimize", "-copy", "none"], input=data, capture_output=True, check=True
    ).stdout


@needs_jpegtran
@pytest.mark.parametrize("name", JPEGS)
def test_the_same_coefficients_and_pixels(name):
    plain, rewritten = encode(JPEGS[name], EncodeOptions()), encode(JPEGS[name], FAST)
    assert rewritten.facts.flags == plain.facts.flags & ~FLAG_PROGRESSIVE | FLAG_REGIONS
    assert rewritten.conversions[-1] == (FROM_PROGRESSIVE if "progressive" in name else REWRITTEN)
    assert rewritten.conversions[:-1] == plain.conversions
    assert canonical(rewritten.data) == canonical(plain.data)
    assert np.array_equal(codec.decode(rewritten.data), codec.decode(plain.data))
    assert (rewritten.facts.mean_grey, rewritten.facts.tones) == (plain.facts.mean_grey, plain.facts.tones)
    assert encode(rewritten.data, FAST).data == rewritten.data


@needs_jpegtran
@pytest.mark.parametrize("how", [("-optimize",), ("-rotate", "90", "-trim"), ("-progressive",)], ids=" ".join)
def test_an_image_out_of_such_a_set_that_was_rewritten(how):
    stored = encode(JPEGS["4:2:0"], FAST).data
    command = ["jpegtran", *how, "-copy", "all"]
    changed = subprocess.run(command, input=stored, capture_output=True, check=True).stdout
    assert not encode(changed, EncodeOptions()).facts.flags & FLAG_REGIONS
    again = encode(changed, FAST)
    assert again.facts.flags & FLAG_REGIONS and again.data.count(b"beitforge.mcus") == 1
    assert np.array_equal(codec.decode(again.data), codec.decode(changed))


@needs_jpegtran
@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_rewritten_stays_and_is_counted(name):
    data, kind = OTHERS[name]
    options = EncodeOptions(fast_regions=True, to_rgb8=True)
    found = encode(data, options)
    assert found.data == data
    assert found.conversions[-1] == kind
    assert not found.facts.flags & FLAG_REGIONS


@needs_jpegtran
def test_a_set_of_both_from_pack_to_its_numbers(tmp_path):
    files = {f"a/{i}.jpg": data for i, data in enumerate(JPEGS.values())} | {"a/x.png": OTHERS["PNG"][0]}
    write_folder(tmp_path / "images", files)
    for name, encoding in (("plain", EncodeOptions()), ("fast", FAST)):
        packed = pack(tmp_path / "images", tmp_path / name, PackOptions(encoding=encoding), "0", 2)
    count = len(JPEGS)
    assert packed.conversions[REWRITTEN] + packed.conversions[FROM_PROGRESSIVE] == count
    assert packed.conversions[f"{ASIDE} (png)"] == 1
    findings: list[str] = []
    assert verify_images(tmp_path / "fast", True, 1, findings.append).regions == count
    assert findings == []
    assert image_stats(tmp_path / "fast")["flags"]["fast regions"] == count
    plain, fast = ImageSet(tmp_path / "plain"), ImageSet(tmp_path / "fast")
    for row in range(count + 1):
        one, other = plain.read(0, row), fast.read(0, row)
        assert np.array_equal(codec.decode(one), codec.decode(other))
    before = open_index(index_path(tmp_path / "fast", "shard-000000")).flags
    assert adopt(tmp_path / "fast", 1, again=True).regions == count
    assert np.array_equal(open_index(index_path(tmp_path / "fast", "shard-000000")).flags, before)


@needs_jpegtran
def test_damage_of_a_table_is_found(tmp_path):
    """By the checksum of the image; and where that was made to fit, by decoding."""
    write_folder(tmp_path / "images", {"a.jpg": JPEGS["4:2:0"]})
    pack(tmp_path / "images", tmp_path / "set", PackOptions(encoding=FAST), "0", 1)
    name = read_image_manifest(tmp_path / "set").shards[0].name
    tar = tmp_path / "set" / f"{name}.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"beitforge.mcus") + 20] ^= 1
    tar.write_bytes(bytes(data))
    findings: list[str] = []
    verify_images(tmp_path / "set", True, 1, findings.append)
    assert any("checksum differs" in finding for finding in findings)


def test_plans_without_the_option_are_as_before_there_was_one(tmp_path):
    write_folder(tmp_path / "images", {"a.jpg": JPEGS["4:2:0"]})
    recorded = make_plan(tmp_path / "images", tmp_path / "set", PackOptions()).describe()["options"]["picture"]
    assert recorded == {"max_side": 0, "short_side": 0, "quality": 95, "reencode": "never", "to_rgb8": False}


@needs_jpegtran
@pytest.mark.parametrize(("first", "then"), [(EncodeOptions(), FAST), (FAST, EncodeOptions())])
def test_another_choice_does_not_go_on_with_a_set(tmp_path, first, then):
    write_folder(tmp_path / "images", {"a.jpg": JPEGS["4:2:0"]})
    pack(tmp_path / "images", tmp_path / "set", PackOptions(encoding=first), "0", 1)
    with pytest.raises(ShardError, match=f"fast_regions was {first.fast_regions}, is {then.fast_regions}"):
        pack(tmp_path / "images", tmp_path / "set", PackOptions(encoding=then), "0", 1)


def test_without_jpegtran_it_is_one_line(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", {"a.jpg": JPEGS["4:2:0"]})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShardError, match=r"needs the program jpegtran.*apt-get install libjpeg-turbo-progs"):
        pack(tmp_path / "images", tmp_path / "set", PackOptions(encoding=FAST), "0", 1)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("does", ["exit 1", "cat", "head -c 100", "echo no JPEG"])
def test_another_program_of_that_name_is_not_used(tmp_path, monkeypatch, does):
    program = tmp_path / "jpegtran"
    program.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ShardError, match="needs libjpeg-turbo's jpegtran"):
        jpegtran.check_tool()


def test_other_pixels_are_not_taken(monkeypatch):
    """A program that writes what is asked, of another image."""
    other = encoded(photo(83, 67, seed=5), "JPEG", restart_marker_blocks=1)
    monkeypatch.setattr(jpegtran, "_rewritten", lambda _: other)
    found = encode(JPEGS["4:2:0"], FAST)
    assert found.data == JPEGS["4:2:0"]
    assert found.conversions == (f"{ASIDE} (not the same image when rewritten)",)
