"""Plans of packings: equal files on one side of a split, and what earlier versions began ends as it was begun."""

import dataclasses
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image, JpegImagePlugin

from beitforge.shards.errors import ShardError
from beitforge.shards.pack.encode import EncodeOptions
from beitforge.shards.pack.plan import FIRST_FORMAT, PackOptions, make_plan
from beitforge.shards.pack.shard import pack_shard
from tests.shards.made_images import (
    contents,
    encoded,
    jpeg,
    photo,
    write_folder,
)
from tests.shards.pack.test_pack import run, samples_of


def copies_of(count: int, each: int) -> dict[str, bytes]:
    """`count` images, `each` times, under names that fall anywhere."""
    return {f"{k * 7919 % 97}/{i}-{k}.jpg": jpeg(i) for i in range(count) for k in range(each)}


@pytest.mark.parametrize("kind", ["copies", "hard links", "other names"])
def test_equal_files_never_lie_on_both_sides_of_a_split(tmp_path, kind):
    """Else a held-out image is one that was trained on. What is equal within a side is told."""
    files = copies_of(20, 4)
    if kind == "other names":
        files = {name + ("", ".jpeg", ".PNG", ".bak")[i % 4]: data for i, (name, data) in enumerate(files.items())}
    write_folder(tmp_path / "in", files)
    if kind == "hard links":
        for name in files:
            first = tmp_path / "in" / next(other for other in files if files[other] == files[name])
            if first != tmp_path / "in" / name:
                (tmp_path / "in" / name).unlink()
                os.link(first, tmp_path / "in" / name)
    options = PackOptions(samples_per_shard=9, labels="none", splits=(("heldout", 0.2), ("test", 0.2)))
    packed = run(tmp_path / "in", tmp_path / "out", options)
    found = {name: {s["jpg"] for s in samples_of(tmp_path / "out" / name)} for name in packed.manifests}
    assert sum(map(len, found.values())) == 20 == len(set().union(*found.values()))
    assert sum(manifest.samples for manifest in packed.manifests.values()) == 80
    assert packed.equal == [
        f"{name}: {3 * len(members)} of {4 * len(members)} images repeat the bytes of another"
        for name, members in found.items()
    ]
    assert run(tmp_path / "in", tmp_path / "out", options).kept == packed.shards


def test_a_split_goes_on_as_it_began(tmp_path):
    """Some shards of each side finished, some not: the same bytes as without interruption. A file changed meanwhile, to
    the same size and time, would leave images out or take them twice; it is refused."""
    images = write_folder(tmp_path / "in", copies_of(12, 3))
    options = PackOptions(samples_per_shard=4, labels="none", splits=(("heldout", 0.3),))
    run(images, tmp_path / "whole", options)
    plan = make_plan(images, tmp_path / "out", options)
    for job in list(plan.jobs(10))[::2]:
        pack_shard(job, lambda count: None)
    (tmp_path / "out/packing.json").write_text(json.dumps(plan.describe()))
    path = images / plan.files.paths[0]
    data, before = path.read_bytes(), path.stat()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        ShardError, match=r"the images differ \(names, sizes, times or which are equal; 36 then, 36 now\)"
    ):
        run(images, tmp_path / "out", options)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert 0 < run(images, tmp_path / "out", options).kept < plan.num_shards
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_images_that_become_equal_are_told(tmp_path):
    """Of unequal files the same pixels: only packing shows it."""
    pixels = {i: photo(seed=i) for i in range(12)}
    files = {
        f"{i}.{name}": encoded(pixels[i], format) for i in pixels for name, format in (("bmp", "BMP"), ("tif", "TIFF"))
    }
    write_folder(tmp_path / "in", files)
    packed = run(tmp_path / "in", tmp_path / "out", PackOptions(splits=(("heldout", 0.3),)))
    tars = {name: [s["png"] for s in samples_of(tmp_path / "out" / name)] for name in ("heldout", "train")}
    both = sum(data in tars["train"] for data in tars["heldout"])
    assert both > 0
    assert f"{both} of {len(tars['heldout'])} images of heldout are byte for byte in train, too" in packed.equal


def test_equal_images_with_other_labels_are_told(tmp_path):
    write_folder(tmp_path / "in", {"a/1.jpg": jpeg(1), "b/1.jpg": jpeg(1), "b/2.jpg": jpeg(2), "b/3.jpg": jpeg(2)})
    assert run(tmp_path / "in", tmp_path / "out").equal == [
        "out: 2 of 4 images repeat the bytes of another; 2 images have the bytes of one with another label"
    ]


def begun_by_the_first_version(folder: Path) -> Path:
    """A folder of images with fixed times."""
    for i, name in enumerate(["2018/a.jpg", "2018/b.PNG", "2019/deep/c.tif", "2019/photo.jfif", "2019/d.jpg"]):
        write_folder(folder, {name: b"\xff\xd8\xff\xe0 same" if i in (0, 4) else b"x" * i})
        os.utime(folder / name, ns=(10**18 + i, 10**18 + i))
    return folder


def test_a_plan_of_the_first_format_is_still_made(tmp_path):
    """Golden: what commit f6b2685 planned for these files. Extensions, classes and splits are by its rules."""
    images = begun_by_the_first_version(tmp_path / "in")
    options = PackOptions(samples_per_shard=2, splits=(("heldout", 0.4),), seed=3)
    plan = make_plan(images, tmp_path / "out", options, FIRST_FORMAT)
    assert plan.fingerprint == "5b8ecac2f0d49214218db99ea0df45b6"
    assert list(plan.files.paths) == ["2018/a.jpg", "2018/b.PNG", "2019/d.jpg", "2019/deep/c.tif"]
    assert (plan.classes, plan.labels.tolist()) == (["2018", "2019"], [0, 0, 1, 1])
    assert {name: order.tolist() for name, order in plan.orders.items()} == {"heldout": [3, 0], "train": [2, 1]}
    assert "format" not in plan.describe()
    now = make_plan(images, tmp_path / "out", options)
    assert now.fingerprint != plan.fingerprint and len(now.files) == 5 and now.classes == []


def awkward_folder(folder: Path) -> Path:
    """Names, links and files of every kind that listing tells apart, with fixed times. The images are in `in`."""
    names = ["n1/a.jpg", "n1/a.png", "n1/b.c.jpg", "n1/b", "n2/ü 猫.webp", f"n2/{'k' * 120}.jpg", "n2/100%.jpg"]
    names += [
        "__x__/a.jpg",
        "n3/x.jpg.bak",
        "n3/notes.txt",
        "n3/.hidden.jpg",
        "n2/A.JPG",
        os.fsdecode(b"n2/caf\xe9.jpg"),
    ]
    for i, name in enumerate([*names, "n4/README"]):
        head = b"" if name.endswith("README") else b"\xff\xd8\xff"
        write_folder(folder / "in", {name: head + b"x" * i if i % 3 else b"\xff\xd8\xff\xe0 same"})
        os.utime(folder / "in" / name, ns=(10**18 + i, 10**18 + i))
    write_folder(folder, {"far/y.jpg": b"yy"})
    os.utime(folder / "far/y.jpg", ns=(10**18, 10**18))
    (folder / "in/n4/link.jpg").symlink_to(folder / "far/y.jpg")
    (folder / "in/n4/again.jpg").symlink_to(folder / "in/n1/a.jpg")
    (folder / "in/n4/gone.png").symlink_to("nowhere")
    (folder / "in/n5").symlink_to("n1")
    return folder / "in"


BY_FOLDER = PackOptions(
    samples_per_shard=3,
    splits=(("heldout", 0.3),),
    seed=5,
    labels="folder",
    encoding=EncodeOptions(short_side=320, quality=90),
)
GOLDEN = [  # format, options, fingerprint, number of images, the first of the order
    (2, PackOptions(samples_per_shard=4), "daeabaa8d289e6e43eb01fdc4bea371d", 14, [6, 10, 4, 11]),
    (2, BY_FOLDER, "c597ce5db27f359909383b0311a3808f", 14, [11, 0, 2, 12, 9]),
    (1, PackOptions(samples_per_shard=4), "07c064db6379e1fc61161ee7fe6e3054", 11, [5, 3, 2, 7]),
    (1, BY_FOLDER, "8a749e6ee5426fc8e493d9595e4be84d", 11, [0, 2, 9, 8]),
]


@pytest.mark.parametrize(("format", "options", "fingerprint", "images", "first"), GOLDEN)
def test_a_plan_is_what_earlier_versions_made_of_it(tmp_path, format, options, fingerprint, images, first):
    """Golden: what commit 841ce6c planned. A packing that it began goes on."""
    plan = make_plan(awkward_folder(tmp_path), tmp_path / "out", options, format)
    order = next(iter(plan.orders.values())).tolist()
    assert (plan.fingerprint, len(plan.files), order[: len(first)]) == (fingerprint, images, first)
    assert plan.files.links == [("n4/again.jpg", "n1/a.jpg"), ("n5", "n1")]
    job = next(plan.jobs(0))
    assert [(one.path, one.key) for one in job.planned] == [
        (plan.files.paths[i], plan.files.key(i)) for i in order[: options.samples_per_shard]
    ]
    assert [plan.classes[one.label] for one in job.planned] == [
        one.path.split("/")[0] for one in job.planned
    ] or not plan.classes


def test_an_option_of_later_is_part_of_the_plan_where_it_is_asked_for(tmp_path):
    """And refused, by name, in a packing that was begun without it, and the other way round."""
    images = write_folder(tmp_path / "in", {"a.jpg": jpeg(1, 60, 40), "b.jpg": jpeg(2, 60, 40)})
    plain, other = (PackOptions(encoding=EncodeOptions(max_side=50, subsampling=one)) for one in ("444", "420"))
    assert "subsampling" not in json.dumps(plain.recorded()) and "subsampling" in json.dumps(other.recorded())
    for ours, theirs, message in (
        (plain, other, "subsampling was 444, is 420"),
        (other, plain, "subsampling was 420, is 444"),
    ):
        target = tmp_path / ours.encoding.subsampling
        run(images, target, ours)
        with pytest.raises(ShardError, match=message):
            run(images, target, theirs)
    stored = [sample["jpg"] for name in ("444", "420") for sample in samples_of(tmp_path / name)]
    assert [JpegImagePlugin.get_sampling(Image.open(io.BytesIO(data))) for data in stored] == [0, 0, 2, 2]


@pytest.mark.parametrize("what", ["a marker", "shards alone", "all of it"])
def test_a_packing_of_the_first_format_ends_by_its_rules(tmp_path, what):
    """Half of the shards by one rule and half by another would be images lost, or twice."""
    images = write_folder(tmp_path / "in", {**copies_of(10, 2), "7/x.jfif": jpeg(99)})
    options = PackOptions(samples_per_shard=3, splits=(("heldout", 0.4),))
    older = make_plan(images, tmp_path / "out", options, FIRST_FORMAT)
    for job in list(older.jobs(10))[:: 1 if what == "all of it" else 2]:
        pack_shard(job, lambda count: None)
    if what != "shards alone":
        (tmp_path / "out/packing.json").write_text(json.dumps(older.describe()))
    packed = run(images, tmp_path / "out", options)
    assert (
        packed.plan.format == FIRST_FORMAT
        and packed.kept == (packed.shards if what == "all of it" else packed.kept) > 0
    )
    assert sum(manifest.samples for manifest in packed.manifests.values()) == 20
    assert packed.manifests["train"].classes == older.classes != []
    assert run(images, tmp_path / "out", options).kept == packed.shards
    with pytest.raises(ShardError, match="seed was 0, is 1"):
        run(images, tmp_path / "out", dataclasses.replace(options, seed=1))
