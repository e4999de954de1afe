"""Packing: nothing lost, nothing twice, the same bytes however it was interrupted or spread over processes."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from beitforge.shards import counter_rng
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import index_path, open_index
from beitforge.shards.format.manifest import read_image_manifest, write_manifest
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.pack.encode import EncodeOptions
from beitforge.shards.pack.pack import Packed, pack, rejection_limit
from beitforge.shards.pack.plan import PackOptions, make_plan
from beitforge.shards.pack.shard import TooManyRejected, finished_shard
from tests.shards.made_images import (
    bomb,
    contents,
    encoded,
    exif,
    jpeg,
    photo,
    png_16_bit,
    read_with_webdataset,
    stamps,
    two_classes,
    write_folder,
)

SMALL = PackOptions(samples_per_shard=7)


def run(images: Path, target: Path, options: PackOptions = SMALL, workers: int = 1, limit: str = "1%") -> Packed:
    return pack(images, target, options, limit, workers)


def samples_of(folder: Path) -> list[dict]:
    return read_with_webdataset(*(folder / f"{shard.name}.tar" for shard in read_image_manifest(folder).shards))


def findings(folder: Path) -> list[str]:
    found: list[str] = []
    verify_images(folder, True, 1, found.append)
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return two_classes(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory) -> Path:
    """The 24 images in four shards, packed without interruption by one process. Do not write here."""
    target = tmp_path_factory.mktemp("packed") / "set"
    run(images, target)
    return target


def test_webdataset_reads_every_image_once(images, packed):
    """The tars are plain WebDataset: same keys, same bytes, same labels, through its default reader."""
    read = {sample["__key__"]: sample for sample in samples_of(packed)}
    assert len(read) == 24
    for number, name in enumerate(("cat", "dog")):
        for i in range(12):
            sample = read[f"{name}/{i}"]
            assert sample["jpg"] == (images / name / f"{i}.jpg").read_bytes()
            assert sample["cls"] == str(number).encode()
            assert json.loads(sample["json"]) == {"source": f"{name}/{i}.jpg", "width": 48, "height": 32}
    assert read_image_manifest(packed).classes == ["cat", "dog"]


def test_every_digest_row_and_pixel_is_as_the_manifest_says(packed):
    """What pack writes, verify with decoding finds clean."""
    manifest = read_image_manifest(packed)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        (f"shard-{i:06d}", samples) for i, samples in enumerate((7, 7, 7, 3))
    ]
    assert findings(packed) == []


def test_order_is_a_hash_of_the_key(packed):
    """Neighbours in a folder are not neighbours in a shard, and the order needs no state to repeat."""
    keys = [sample["__key__"] for sample in samples_of(packed)]
    hashes = np.array([counter_rng.hash_key(key) for key in keys], np.uint64)
    bits = counter_rng.bits(counter_rng.PACK_ORDER, 0, hashes)
    assert np.all(bits[1:] > bits[:-1])
    assert keys != sorted(keys)


def test_seed_changes_the_order_alone(images, packed, tmp_path):
    """Another seed, the same samples in other places."""
    run(images, tmp_path / "set", PackOptions(samples_per_shard=7, seed=1))
    ours, theirs = ([s["__key__"] for s in samples_of(folder)] for folder in (packed, tmp_path / "set"))
    assert ours != theirs and sorted(ours) == sorted(theirs)


def test_any_number_of_workers_packs_the_same_bytes(images, packed, tmp_path):
    """Processes share out the work, never the result."""
    run(images, tmp_path / "set", workers=3)
    assert contents(tmp_path / "set") == contents(packed)


AWKWARD = {
    "a/x.jpg": jpeg(1),
    "a/x.png": encoded(photo(seed=2), "PNG"),
    "a/x.y z.JPEG": jpeg(3),
    "b/ü 猫.webp": encoded(photo(seed=4), "WEBP"),
    "b/really a png.jpg": encoded(photo(seed=5), "PNG"),
    "b/turned.jpg": jpeg(6, exif=exif(6)),
    "b/deep.png": png_16_bit(np.full((4, 4), 40000, np.uint16)),
    "c/scan.TIF": encoded(photo(seed=7), "TIFF"),
    "c/" + "long" * 50 + ".gif": encoded(photo(seed=8), "GIF"),
    "__MACOSX__/odd.bmp": encoded(photo(seed=9), "BMP"),
    "c/cmyk%20.jpg": encoded(photo(seed=9)[..., [0, 1, 2, 0]].copy(), "PNG"),
}


def test_every_awkward_image_and_name_arrives(tmp_path):
    """Mixed formats, shared stems, dots, spaces, unicode, undecodable bytes: each is one sample for webdataset too."""
    write_folder(tmp_path / "in", AWKWARD)
    with open(os.fsencode(tmp_path) + b"/in/a/caf\xe9.jpg", "wb") as file:
        file.write(jpeg(10))
    packed = run(tmp_path / "in", tmp_path / "out", PackOptions(encoding=EncodeOptions(to_rgb8=True)))
    assert packed.rejected == []
    read = {sample["__key__"]: {name for name in sample if name[0] != "_"} for sample in samples_of(tmp_path / "out")}
    assert {key: (extensions - {"cls", "json"}).pop() for key, extensions in read.items()} == {
        "a/x%2Ejpg": "jpg",
        "a/x%2Epng": "png",
        "a/x%2Ey z": "jpg",
        "a/caf%E9": "jpg",
        "b/ü 猫": "webp",
        "b/really a png": "png",
        "b/turned": "jpg",
        "b/deep": "png",
        "c/scan": "png",
        "c/" + "long" * 50: "png",
        "%5F_MACOSX__/odd": "png",
        "c/cmyk%2520": "png",
    }
    assert findings(tmp_path / "out") == []
    turned = [s for s in samples_of(tmp_path / "out") if s["__key__"] == "b/turned"]
    assert (json.loads(turned[0]["json"])["width"], json.loads(turned[0]["json"])["height"]) == (32, 48)


UNUSABLE = {
    "bad/empty.jpg": b"",
    "bad/cut.jpg": jpeg(1, 200, 200)[:-3000],
    "bad/bomb.png": bomb(),
    "bad/page.jpg": b"<html></html>",
}


def test_unusable_images_are_listed_with_the_reason(tmp_path):
    """The rest is packed; every image is either a sample or a line in rejected.jsonl."""
    write_folder(tmp_path / "in", UNUSABLE)
    two_classes(tmp_path / "in", 3)
    packed = run(tmp_path / "in", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert lines == packed.rejected
    reasons = {line["path"]: line["reason"] for line in lines}
    assert list(reasons) == sorted(UNUSABLE)
    assert "zero bytes" in reasons["bad/empty.jpg"] and "truncated" in reasons["bad/cut.jpg"]
    assert "20000x20000" in reasons["bad/bomb.png"] and "not an image" in reasons["bad/page.jpg"]
    assert read_image_manifest(tmp_path / "out").samples == 6


def test_a_shard_of_rejects_alone_is_no_shard(tmp_path):
    """It leaves no tar and no line in the manifest, and webdataset never meets an empty tar."""
    write_folder(tmp_path / "in", {**UNUSABLE, "a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    run(tmp_path / "in", tmp_path / "out", PackOptions(samples_per_shard=1))
    manifest = read_image_manifest(tmp_path / "out")
    assert [shard.samples for shard in manifest.shards] == [1, 1]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert findings(tmp_path / "out") == []
    assert run(tmp_path / "in", tmp_path / "out", PackOptions(samples_per_shard=1)).kept == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_past_the_limit_packing_stops_and_goes_on_when_allowed(tmp_path, workers):
    """A wrong folder or a broken copy must not end as a small set; what is finished stays."""
    bad = {f"bad/{i}.jpg": b"no" for i in range(6)}
    write_folder(two_classes(tmp_path / "in", 10), bad)
    with pytest.raises(TooManyRejected, match=r"more than 3 images .*bad/\d\.jpg: not an image.*--max-rejected"):
        run(tmp_path / "in", tmp_path / "out", workers=workers, limit="3")
    assert not (tmp_path / "out/manifest.json").exists()
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert len(lines) >= 4 and len(lines) == len(set(lines))
    run(tmp_path / "in", tmp_path / "out", limit="6")
    run(tmp_path / "in", tmp_path / "alone", limit="6")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_all_rejected(tmp_path):
    """No set is better than an empty one."""
    write_folder(tmp_path / "in", UNUSABLE)
    with pytest.raises(ShardError, match=r"none of the 4 images for .*out can be used: see .*rejected\.jsonl"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "count", "limit"),
    [("0", 10**6, 0), ("25", 10, 25), ("1%", 100, 10), ("1%", 5000, 50), ("0.5%", 10**4, 50), ("0%", 10, 10)],
)
def test_rejection_limit(text, count, limit):
    """A count is a count; a share never forbids the first ten."""
    assert rejection_limit(text, count) == limit


@pytest.mark.parametrize("text", ["-1", "x", "", "%", "-2%", "nan%", "1.5", "inf%"])
def test_rejection_limit_refuses(text):
    """Nothing that is neither becomes a limit by accident."""
    with pytest.raises(ShardError, match="--max-rejected is"):
        rejection_limit(text, 100)


def test_splits(images, tmp_path):
    """Every image lies in one split; where it lies depends on its key alone, so adding images moves none."""
    options = PackOptions(samples_per_shard=7, splits=(("val", 0.3), ("test", 0.2)))
    packed = run(images, tmp_path / "out", options)
    keys = {name: {s["__key__"] for s in samples_of(tmp_path / "out" / name)} for name in ("train", "val", "test")}
    assert sum(len(members) for members in keys.values()) == len(set().union(*keys.values())) == 24
    assert {name: manifest.samples for name, manifest in packed.manifests.items()} == {
        name: len(members) for name, members in keys.items()
    }
    uniform = counter_rng.uniform(
        counter_rng.SPLIT, 0, np.array([counter_rng.hash_key(key) for key in sorted(keys["val"])], np.uint64)
    )
    assert np.all(uniform < 0.3)
    assert {tuple(read_image_manifest(tmp_path / "out" / name).classes) for name in keys} == {("cat", "dog")}
    more = two_classes(tmp_path / "more", 20)
    run(more, tmp_path / "out2", options)
    assert keys["val"] < {s["__key__"] for s in samples_of(tmp_path / "out2/val")}
    assert run(images, tmp_path / "out", options).kept == packed.shards


def test_a_class_of_unusable_images_keeps_its_number(tmp_path):
    """HEIC without its decoder, a raw file, a vector graphic: each is listed with its reason and counted, the class is
    named, and the labels of the classes after it are what they would be."""
    files = {
        "a/1.jpg": jpeg(1),
        "b/1.svg": b"<svg/>",
        "b/2.nef": encoded(photo(), "TIFF"),
        "c/1": jpeg(2),
        "c/2.txt": b"",
    }
    write_folder(tmp_path / "in", {**files, "d/readme.md": b"x", "c/3.jfif": jpeg(3)})
    packed = run(tmp_path / "in", tmp_path / "out")
    assert packed.emptied == ["b"] and packed.plan.files.bare == ["d"]
    assert packed.manifests[""].classes == ["a", "b", "c"]
    labels = {s["__key__"]: int(s["cls"]) for s in samples_of(tmp_path / "out")}
    assert labels == {"a/1": 0, "c/1": 2, "c/3": 2}
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["b/1.svg", "b/2.nef", "d/readme.md", "c/2.txt"]
    assert "not an image" in lines[0]["reason"] and "a camera's sensor" in lines[1]["reason"]
    assert (lines[3]["kind"], lines[3]["files"]) == (".txt", 1) and "no image" in lines[2]["reason"]
    with pytest.raises(TooManyRejected, match=r"more than 1 images cannot be used \(b/"):
        run(tmp_path / "in", tmp_path / "strict", limit="1")


def test_links_left_out_are_in_the_list(tmp_path):
    write_folder(tmp_path / "in", {"a.jpg": jpeg(1)})
    (tmp_path / "in/b.jpg").symlink_to("a.jpg")
    run(tmp_path / "in", tmp_path / "out")
    (line,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert line == {"path": "b.jpg", "reason": "a link to a.jpg, which is taken already"}


def test_an_empty_split_is_refused(images, tmp_path):
    """A validation set of nothing would be found out much later."""
    with pytest.raises(ShardError, match="split val would get none of the 24 images"):
        run(images, tmp_path / "out", PackOptions(splits=(("val", 1e-9),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PackOptions(samples_per_shard=0), "--samples-per-shard is 0"),
        (PackOptions(encoding=EncodeOptions(max_side=-1)), "--max-side is -1"),
        (PackOptions(encoding=EncodeOptions(quality=101)), "--quality is 101"),
        (PackOptions(name="a/b"), "--name has the name 'a/b'"),
        (PackOptions(splits=(("train", 0.1),)), "--split names must differ"),
        (PackOptions(splits=(("val", 0.1), ("val", 0.1))), "--split names must differ"),
        (PackOptions(splits=(("val", 0.6), ("test", 0.4))), "--split fractions"),
        (PackOptions(splits=(("val", float("nan")),)), "--split fractions"),
        (PackOptions(splits=(("..", 0.1),)), r"--split has the name '\.\.'"),
    ],
)
def test_impossible_options(images, tmp_path, options, message):
    """One line with option, value and rule, before anything is read or written."""
    with pytest.raises(ShardError, match=message):
        run(images, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [".", ".."])
def test_images_inside_the_shard_folder(tmp_path, target):
    """Packing into the images' own folder, or one above, would mix both."""
    write_folder(tmp_path / "in/deep", {"a.jpg": jpeg()})
    with pytest.raises(ShardError, match="lie inside the shard folder"):
        run(tmp_path / "in/deep", tmp_path / "in/deep" / target)


def test_a_finished_set_is_left_as_it_is(images, packed, tmp_path):
    """The same command again is quick and writes nothing, so it is safe in a script."""
    target = shutil.copytree(packed, tmp_path / "set", copy_function=shutil.copy2)
    before = stamps(target)
    again = run(images, target)
    assert again.kept == again.shards == 4
    assert stamps(target) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PackOptions(samples_per_shard=8), "samples_per_shard was 7, is 8"),
        (PackOptions(samples_per_shard=7, encoding=EncodeOptions(max_side=20)), "max_side was 0, is 20"),
        (PackOptions(samples_per_shard=7, splits=(("val", 0.5),)), r"splits was \[\], is \[\['val', 0.5\]\]"),
    ],
)
def test_other_options_do_not_mix(images, packed, tmp_path, options, message):
    """Half a set of one kind and half of another would pass for whole."""
    target = shutil.copytree(packed, tmp_path / "set")
    before = contents(target)
    with pytest.raises(ShardError, match=f"holds shards of another packing: {message}"):
        run(images, target, options)
    assert contents(target) == before


def test_other_images_do_not_mix(images, packed, tmp_path):
    """An image added, or changed in place, makes another set."""
    target = shutil.copytree(packed, tmp_path / "set")
    changed = shutil.copytree(images, tmp_path / "in", copy_function=shutil.copy2)
    os.utime(changed / "cat/3.jpg", (1, 1))
    with pytest.raises(ShardError, match="the images differ"):
        run(changed, target)
    manifest = read_image_manifest(target)  # as an earlier version made it, which had not all of today's options
    del manifest.made_by["options"]["picture"]["to_rgb8"]
    write_manifest(target, manifest)
    with pytest.raises(ShardError, match="another packing: the images differ"):
        run(changed, target)


@pytest.mark.parametrize("splits", [(), (("val", 0.5),)])
def test_finished_sets_below_the_folder_are_not_mixed_with_another(images, tmp_path, splits):
    """A folder of sets is no set; with other splits beside them, readers would take train for the whole."""
    target = tmp_path / "sets"
    run(images, target, PackOptions(splits=(("heldout", 0.3),)))
    run(images, tmp_path / "elsewhere/a")
    before = contents(target)
    with pytest.raises(ShardError, match=r"holds (finished sets already \(heldout, train\)|shards of another packing)"):
        run(images, target, PackOptions(splits=splits))
    with pytest.raises(ShardError, match=r"holds finished sets already \(a\): give a new folder"):
        run(images, tmp_path / "elsewhere", PackOptions(splits=splits))
    assert contents(target) == before
    assert run(images, target, PackOptions(splits=(("heldout", 0.3),))).kept > 0


def test_foreign_tars_are_never_overwritten(images, tmp_path):
    """A folder with someone's tars is refused even where the names would collide."""
    write_folder(tmp_path / "set", {"shard-000000.tar": b"precious"})
    with pytest.raises(ShardError, match=r"shard-000000\.tar but nothing says which packing made it"):
        run(images, tmp_path / "set")
    assert contents(tmp_path / "set") == {"shard-000000.tar": b"precious"}


@pytest.mark.parametrize("lost", ["shard-000001.tar", "shard-000002.index.safetensors", "manifest.json"])
def test_a_lost_file_is_made_again(images, packed, tmp_path, lost):
    """Whatever is missing comes back with the same bytes; the other shards are not touched."""
    target = shutil.copytree(packed, tmp_path / "set", copy_function=shutil.copy2)
    before = stamps(target)
    (target / lost).unlink()
    run(images, target)
    assert contents(target) == contents(packed)
    untouched = [name for name in before if name.endswith(".tar") and name[:12] != lost[:12]]
    assert {name: stamps(target)[name] for name in untouched} == {name: before[name] for name in untouched}


def test_an_index_of_another_plan_does_not_count(images, packed):
    """A shard copied in from a set of other options is packed again, not taken for ours."""
    job = next(make_plan(images, packed, SMALL).jobs(0))
    assert finished_shard(job) is not None
    assert finished_shard(dataclasses.replace(job, plan="another")) is None


def test_index_files_are_safetensors(packed):
    """Anyone's safetensors reader opens them."""
    from safetensors import safe_open

    path = index_path(packed, "shard-000000")
    with safe_open(path, "numpy") as theirs:
        ours = open_index(path)
        assert set(theirs.keys()) == set(ours.columns)
        assert theirs.metadata() == ours.metadata
        for name, column in ours.columns.items():
            np.testing.assert_array_equal(theirs.get_tensor(name), column)
