"""Listing images: nothing missed, nothing twice, and keys that WebDataset takes as they are."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from beitforge.shards.errors import ShardError
from beitforge.shards.pack.image_files import classes_of, keys_of, list_images
from tests.shards.made_images import write_folder


def listed(folder):
    images = list_images(folder, folder / "out")
    return dict(zip(images.paths, images.keys, strict=True))


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("cat/a.jpg", "cat/a"),
        ("a b/ü – 猫.png", "a b/ü – 猫"),
        ("a.b.c.jpg", "a%2Eb%2Ec"),
        ("v1.2/a.jpg", "v1%2E2/a"),
        ("100%.jpg", "100%25"),
        ("a\nb\tc\x7f.jpg", "a%0Ab%09c%7F"),
        (os.fsdecode(b"\xff\xe9.jpg"), "%FF%E9"),
        ("\x85.jpg", "%C2%85"),
        ("__x__/a.jpg", "%5F_x__/a"),
    ],
)
def test_keys(path, key):
    """Spaces and every script stay; what cuts a key, breaks a line or is no text is percent-encoded."""
    assert keys_of([path]) == [key]


def test_shared_stems_keep_their_extensions():
    """a.jpg and a.png are two samples; even a file that is named like another's long key gets one of its own."""
    paths = ["d/a.jpg", "d/a.png", "d/b.jpg", "e/a.jpg", "d/a.jpg.png", "d/A.jpg"]
    keys = keys_of(paths)
    assert keys == ["d/a%2Ejpg", "d/a%2Epng", "d/b", "e/a", "d/a%2Ejpg%2Epng", "d/A"]


PART = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=6).filter(lambda t: t not in (".", ".."))
PATH = st.builds("/".join, st.lists(PART | st.sampled_from(["a", "a.jpg", "__m__", "%2E"]), min_size=1, max_size=3))
NAMES = st.builds(str.__add__, PATH, st.sampled_from([".jpg", ".JPG", ".png", ".tar.gif"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, unique=True, min_size=1, max_size=8))
def test_keys_are_distinct_and_webdatasets_own(paths):
    """Whatever the names: distinct keys, each exactly what webdataset cuts from KEY.jpg, none that it skips."""
    keys = keys_of(paths)
    assert len(set(keys)) == len(paths)
    for key in keys:
        assert base_plus_ext(f"{key}.jpg") == (key, "jpg")
        assert not re.match(r"__[^/]*__($|/)", key)


def test_every_image_is_found_and_others_counted(tmp_path):
    """Any case of the extension, any depth; hidden files ignored; files that are no images are counted, not lost."""
    names = ["a.JPG", "b/c.jpeg", "b/d/e.Tif", "f.webp", "g.gif", "h.bmp", "i.png", "j.tiff"]
    others = ["README", "b/notes.txt", "k.jpg.txt"]
    hidden = [".l.jpg", ".git/m.jpg", "b/._c.jpeg"]
    write_folder(tmp_path, dict.fromkeys(names + others + hidden, b"x"))
    images = list_images(tmp_path, tmp_path / "out")
    assert sorted(images.paths) == sorted(names)
    assert images.others == len(others)
    assert images.sizes.tolist() == [1] * len(names)
    assert images.keys == sorted(images.keys)


def test_links_are_followed_but_no_image_comes_twice(tmp_path):
    """Image folders are often linked together; a loop must end, and what lies in the folder keeps its own name."""
    write_folder(tmp_path, {"in/a/x.jpg": b"x", "far/y.jpg": b"y"})
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/far").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "in/a")
    (tmp_path / "in/gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in/pipe.jpg")
    assert set(listed(tmp_path / "in")) == {"a/x.jpg", "far/y.jpg", "gone.jpg"}
    links = list_images(tmp_path / "in", tmp_path / "out").links
    assert links == ["a/up → .", "far/back → a"]


LINKS = {  # link: (target, what it brings in or the name that its target has already)
    "a folder beside, sorted before": ("a0", "b", "b"),
    "a folder above": ("b/up", "..", "."),
    "a file in the folder": ("a/x.jpg", "b/y.jpg", "b/y.jpg"),
    "a second link to the same file outside": ("z/again.jpg", "FAR/far.jpg", "c/first.jpg"),
    "a second link to the same folder outside": ("z", "FAR/deep", "d"),
    "a folder within a linked one": ("z", "FAR/deep/er", "d/er"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_to_what_is_taken_already_are_named(tmp_path, case):
    link, target, taken = LINKS[case]
    (tmp_path / "far/deep/er").mkdir(parents=True)
    write_folder(tmp_path, {"in/b/y.jpg": b"y", "far/far.jpg": b"f", "far/deep/v.jpg": b"v", "far/deep/er/w.jpg": b"w"})
    for inner in ("c", Path(link).parent):
        (tmp_path / "in" / inner).mkdir(exist_ok=True)
    (tmp_path / "in/c/first.jpg").symlink_to(tmp_path / "far/far.jpg")
    (tmp_path / "in/d").symlink_to(tmp_path / "far/deep")
    outside = target.replace("FAR", str(tmp_path / "far"))
    (tmp_path / "in" / link).symlink_to(outside if outside != target or target == ".." else tmp_path / "in" / target)
    files = list_images(tmp_path / "in", tmp_path / "out")
    assert set(files.paths) == {"b/y.jpg", "c/first.jpg", "d/v.jpg", "d/er/w.jpg"}
    assert files.links == [f"{link} → {taken}"]


def test_hard_links_are_files_of_their_own(tmp_path):
    write_folder(tmp_path, {"a/x.jpg": b"x"})
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a/x.jpg", tmp_path / "b/x.jpg")
    assert set(listed(tmp_path)) == {"a/x.jpg", "b/x.jpg"}


def test_a_link_to_a_hidden_folder_brings_it_in(tmp_path):
    write_folder(tmp_path, {".pool/x.jpg": b"x"})
    (tmp_path / "a").symlink_to(".pool")
    assert set(listed(tmp_path)) == {"a/x.jpg"}


def test_the_shard_folder_inside_the_images_is_left_out(tmp_path):
    """Shards may lie below the images they are made of."""
    write_folder(tmp_path, {"a.jpg": b"x", "out/b.jpg": b"x"})
    assert set(listed(tmp_path)) == {"a.jpg"}


def test_undecodable_names_are_read(tmp_path):
    """A Latin-1 file name from an old disk is an image like any other."""
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    assert list(listed(tmp_path).values()) == ["caf%E9"]


@pytest.mark.parametrize(("files", "message"), [({}, "holds no image"), ({"a.txt": b"x"}, "it holds 1 other files")])
def test_a_folder_without_images(tmp_path, files, message):
    """Said before anything is written."""
    write_folder(tmp_path, files)
    with pytest.raises(ShardError, match=message):
        list_images(tmp_path, tmp_path / "out")


def test_no_folder(tmp_path):
    """A mistyped path is named."""
    with pytest.raises(ShardError, match=r"missing is not a folder"):
        list_images(tmp_path / "missing", tmp_path / "out")


def test_equal_hashes_are_refused(tmp_path, monkeypatch):
    """Token shards pair by 64-bit hash; two keys sharing one would be mixed up silently."""
    write_folder(tmp_path, {"a.jpg": b"x", "b.jpg": b"x"})
    monkeypatch.setattr("beitforge.shards.pack.image_files.hash_key", lambda key: 7)
    with pytest.raises(ShardError, match="the keys a and b have the same 64-bit hash"):
        list_images(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("paths", "labels", "expected"),
    [
        (["b/1.jpg", "a/x/2.jpg", "b/3.jpg"], "auto", (["a", "b"], [1, 0, 1])),
        (["a/1.jpg", "a/2.jpg"], "auto", ([], [])),
        (["a/1.jpg", "a/2.jpg"], "folder", (["a"], [0, 0])),
        (["a/1.jpg", "b/2.jpg", "3.jpg"], "auto", ([], [])),
        (["a/1.jpg", "b/2.jpg"], "none", ([], [])),
    ],
)
def test_classes(paths, labels, expected):
    """The first folder is the class, when that is unambiguous or asked for; class numbers follow sorted names."""
    assert classes_of(paths, labels) == expected


def test_folder_labels_refuse_a_stray_image():
    """Asked for classes, an image without one is an error and not class 0."""
    with pytest.raises(ShardError, match=r"3\.jpg lies in no sub-folder"):
        classes_of(["a/1.jpg", "3.jpg"], "folder")
