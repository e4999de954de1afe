"""Listing images: nothing missed, nothing twice, and keys that WebDataset takes as they are."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.decode.codec import ImageError
from beitforge.shards.errors import ShardError
from beitforge.shards.pack.encode import read_file
from beitforge.shards.pack.listing import keys
from beitforge.shards.pack.listing.image_files import RAW_EXTENSIONS, list_images, shown
from beitforge.shards.pack.listing.texts import texts_of
from tests.shards.made_images import encoded, jpeg, photo, write_folder


def listed(folder):
    images = list_images(folder, folder / "out")
    return {path: images.key(i) for i, path in enumerate(images.paths)}


def keys_of(paths):
    """Of each path, in the order in which they are given."""
    found = keys.keys_of(texts_of(paths))
    made = [keys.key_of(path, bool(whole)) for path, whole in zip(paths, found.whole, strict=True)]
    assert [made[i] for i in found.order] == sorted(made)
    assert found.hashes.tolist() == [hash_key(key) for key in made]
    return made


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
    assert keys_of(paths) == ["d/a%2Ejpg", "d/a%2Epng", "d/b", "e/a", "d/a%2Ejpg%2Epng", "d/A"]


PART = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=6).filter(
    lambda t: t not in (".", "..")
)
PATH = st.builds("/".join, st.lists(PART | st.sampled_from(["a", "a.jpg", "__m__", "%2E"]), min_size=1, max_size=3))
NAMES = st.builds(str.__add__, PATH, st.sampled_from([".jpg", ".JPG", ".png", ".tar.gif"]))


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, unique=True, min_size=1, max_size=8))
def test_keys_are_distinct_and_webdatasets_own(paths):
    """Whatever the names: distinct keys, each exactly what webdataset cuts from KEY.jpg, none that it skips."""
    found = keys_of(paths)
    assert len(set(found)) == len(paths)
    for key in found:
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
    assert [(one.kind, one.files) for one in images.others] == [("hidden", 3), (".txt", 2), ("without extension", 1)]
    assert images.others[1].first == "b/notes.txt"
    assert images.sizes.tolist() == [1] * len(names)
    found = [images.key(i) for i in range(len(images))]
    assert found == sorted(found)


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
    assert links == [("a/up", "."), ("far/back", "a")]


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
    assert files.links == [(link, taken)]


@pytest.mark.parametrize(("file", "folder"), [("d.jpg", "e"), ("e.jpg", "d")])
def test_a_link_to_a_file_and_one_to_its_folder(tmp_path, file, folder):
    """Whichever is met first, and only that file: another name of it is a file of its own."""
    write_folder(tmp_path, {"in/a.jpg": b"a", "far/x.jpg": b"x", "far/y.jpg": b"y"})
    os.link(tmp_path / "far/x.jpg", tmp_path / "far/z.jpg")
    (tmp_path / "in" / file).symlink_to("../far/x.jpg")
    (tmp_path / "in" / folder).symlink_to("../far")
    files = list_images(tmp_path / "in", tmp_path / "out")
    taken, left = sorted([file, f"{folder}/x.jpg"])
    assert set(files.paths) == {"a.jpg", taken, f"{folder}/y.jpg", f"{folder}/z.jpg"}
    assert files.links == [(left, taken)]


def test_a_link_with_too_long_a_name_leads_nowhere(tmp_path):
    write_folder(tmp_path, {"in/a.jpg": b"a"})
    for name in ("b.jpg", "c.txt"):
        (tmp_path / "in" / name).symlink_to("t" * 300)
    files = list_images(tmp_path / "in", tmp_path / "out")
    assert set(files.paths) == {"a.jpg", "b.jpg"}
    assert [(one.kind, one.first) for one in files.others] == [("a link that leads nowhere", "c.txt")]


def nested(folder: Path, length: int) -> None:
    """An image in folders within folders, the last of which has a path of at least `length` bytes."""
    here = os.open(folder, os.O_RDONLY)
    size = len(bytes(folder))
    while size < length:
        name = "d" * max(1, min(200, length - size - 1))
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here, size = below, size + 1 + len(name)
    with open(os.open("x" * 100 + ".jpg", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
        file.write(b"x")
    os.close(here)


def test_a_folder_whose_path_is_too_long_is_one_line(tmp_path):
    (tmp_path / "in").mkdir()
    nested(tmp_path / "in", 4200)
    with pytest.raises(ShardError, match=r"/in/d.* has a longer path than the system takes .*: move"):
        list_images(tmp_path / "in", tmp_path / "out")


def test_a_file_whose_path_is_too_long_is_no_image_that_can_be_used(tmp_path):
    write_folder(tmp_path, {"in/a.jpg": b"a"})
    nested(tmp_path / "in", 4090)
    (path,) = (path for path in list_images(tmp_path / "in", tmp_path / "out").paths if path.startswith("d"))
    with pytest.raises(ImageError, match="File name too long"):
        read_file(tmp_path / "in" / path)


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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no image: give the folder of the images"),
        ({"a.txt": b"x", "b.txt": b"x", ".c.jpg": b""}, r"it holds 3 other files \(\.txt 2, hidden 1\)"),
        ({"a-0.tar": b"", "a.json": b""}, "holds no image but tars: adopt those that are WebDataset's with `index`"),
    ],
)
def test_a_folder_without_images(tmp_path, files, message):
    """Said before anything is written."""
    write_folder(tmp_path, files)
    with pytest.raises(ShardError, match=message):
        list_images(tmp_path, tmp_path / "out")


def test_equal_hashes_are_refused(tmp_path, monkeypatch):
    """Token shards pair by 64-bit hash; two keys sharing one would be mixed up silently."""
    write_folder(tmp_path, {"a.jpg": b"x", "b.jpg": b"x"})
    monkeypatch.setattr(keys, "_hash", lambda key: 7)
    with pytest.raises(ShardError, match="the keys a and b have the same 64-bit hash"):
        list_images(tmp_path, tmp_path / "out")


HEADS = {
    "jpeg": jpeg(),
    "png": encoded(photo(), "PNG"),
    "webp": encoded(photo(), "WEBP"),
    "gif": encoded(photo(), "GIF"),
    "bmp": encoded(photo(), "BMP"),
    "tiff": encoded(photo(), "TIFF"),
    "avif": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "jxl": b"\xff\x0a\0\0",
    "psd": b"8BPS\0\1",
}
NAMES_ANYONE_GIVES = ["no_extension", "x.dat", "x.jpg.bak", "x.JPG~", "x.txt", "dir.v1/y", "x.jpg_large", "z.orig"]


@pytest.mark.parametrize("kind", HEADS)
def test_an_image_is_one_by_its_content_whatever_its_name(tmp_path, kind):
    """And a text is none, by the same names: those are counted by kind."""
    write_folder(tmp_path / "in", dict.fromkeys(NAMES_ANYONE_GIVES, HEADS[kind]))
    assert set(listed(tmp_path / "in")) == set(NAMES_ANYONE_GIVES)
    assert listed(tmp_path / "in")["dir.v1/y"] == "dir%2Ev1/y"
    write_folder(tmp_path / "text", {**dict.fromkeys(NAMES_ANYONE_GIVES, b"plain text"), "a.jpg": HEADS[kind]})
    files = list_images(tmp_path / "text", tmp_path / "out")
    assert list(files.paths) == ["a.jpg"] and sum(one.files for one in files.others) == len(NAMES_ANYONE_GIVES)


PROMISED = [".jfif", ".jpe", ".mpo", ".avif", ".heic", ".HEIF", ".jxl", ".jp2", ".psd", ".svg", ".ico", *RAW_EXTENSIONS]


def test_a_name_that_promises_an_image_is_listed_whatever_it_holds(tmp_path):
    """So that it is either packed or told with its reason, and no key depends on which decoders are installed."""
    names = {f"c/x{number}{extension}": b"?" for number, extension in enumerate(PROMISED)}
    write_folder(tmp_path, {**names, "notes.txt": b"?"})
    assert set(listed(tmp_path)) == set(names)


def test_a_million_side_cars_are_one_line(tmp_path):
    """Kinds are few whatever the names are."""
    write_folder(
        tmp_path, {"a.jpg": b"x", **{f"{i}.json": b"{}" for i in range(20)}, **{f"x.{i}": b"" for i in range(99)}}
    )
    others = list_images(tmp_path, tmp_path / "out").others
    assert (others[1].kind, others[1].files, others[1].first) == (".json", 20, "0.json")
    assert len(others) <= 51 and sum(one.files for one in others) == 119
    assert shown(others[1:2]) == ".json 20" and len(shown(others)) < 100


def test_what_is_neither_file_nor_readable_is_counted_and_harms_nothing(tmp_path):
    write_folder(tmp_path, {"a.jpg": b"x", "dir.jpg/b.jpg": b"x"})
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "zero").symlink_to("/dev/zero")
    files = list_images(tmp_path, tmp_path / "out")
    assert set(files.paths) == {"a.jpg", "dir.jpg/b.jpg"}
    assert {one.kind: one.files for one in files.others} == {
        "neither file nor folder": 3,
        "a link that leads nowhere": 1,
    }


def test_folders_without_an_image_are_named(tmp_path):
    write_folder(tmp_path, {"a/1.jpg": b"x", "b/film.mp4": b"x", "d/deep/2.jpg": b"x", ".git/x": b""})
    (tmp_path / "c").mkdir()
    (tmp_path / "e").symlink_to("a")
    assert list_images(tmp_path, tmp_path / "out").bare == ["b", "c"]


def test_folders_without_end_are_one_line(tmp_path):
    write_folder(tmp_path, {"d/" * 250 + "a.jpg": b"x"})
    with pytest.raises(ShardError, match="more than 200 folders deep"):
        list_images(tmp_path, tmp_path / "out")
