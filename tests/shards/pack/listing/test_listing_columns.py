"""Millions of files are held by columns, in no other order and under no other names than one by one."""

import os
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beitforge.shards.pack.listing import image_files, keys
from beitforge.shards.pack.listing.folders import Folders
from beitforge.shards.pack.listing.image_files import list_images
from beitforge.shards.pack.listing.keys import key_of, keys_of
from beitforge.shards.pack.listing.labels import labels_of
from beitforge.shards.pack.listing.texts import Texts, texts_of
from tests.shards.made_images import write_folder

LETTERS = st.characters(exclude_characters="\0", exclude_categories=("Cs",)) | st.just("\udcff")
TEXT = st.text(LETTERS, max_size=9)


@pytest.mark.parametrize("step", [1, 3, 1 << 14])
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, max_size=20), data=st.data())
def test_texts_are_what_they_were(step, texts, data):
    """Undecodable bytes, too; in any order; whatever is looked at in one go."""
    order = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=30)) if texts else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("beitforge.shards.pack.listing.texts._STEP", step)
        patch.setattr("beitforge.shards.pack.listing.texts._BYTES", step)
        column = texts_of(texts)
        assert list(column) == texts and len(column) == len(texts)
        assert column[: len(texts) // 2] == texts[: len(texts) // 2]
        assert column.longest() == max((len(text.encode("utf-8", "surrogateescape")) for text in texts), default=0)
        assert b"".join(part for _, part in column.parts()) == column.blob
        assert list(column.taken(np.array(order, np.int64))) == [texts[i] for i in order]
        assert list(column.taken(np.arange(len(texts)))) == texts
    with pytest.raises(IndexError):
        column[len(texts)]


def plainly(paths: list[str]) -> dict[str, str]:
    """Key by path, by the rule in its shortest form."""
    whole: set[str] = set()
    while True:
        found = {path: key_of(path, path in whole) for path in paths}
        counts = Counter(found.values())
        shared = {path for path, key in found.items() if counts[key] > 1} - whole
        if not shared:
            return found
        whole |= shared


NAME = st.text(st.sampled_from("ab.%_é\udce9 \x7f-"), min_size=1, max_size=5)
PATHS = st.lists(st.builds("/".join, st.lists(NAME, min_size=1, max_size=3)), unique=True, min_size=1, max_size=12)
LONG = st.builds(lambda path, count: "/".join([f"{'f' * 30}"] * count + [path]), NAME, st.integers(0, 3))


@settings(max_examples=300, deadline=None)
@given(paths=PATHS | st.lists(LONG, unique=True, min_size=1, max_size=12), wide=st.integers(1, 60))
def test_keys_in_bulk_are_keys_one_by_one(paths, wide):
    """Sorted as Python sorts them, however many of their bytes are compared first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_WIDTH", wide)
        found = keys_of(texts_of(paths))
    expected = plainly(paths)
    assert [key_of(path, bool(whole)) for path, whole in zip(paths, found.whole, strict=True)] == list(
        expected.values()
    )
    assert [paths[i] for i in found.order] == sorted(paths, key=lambda path: expected[path])


def test_a_list_holds_no_object_for_each_file(tmp_path):
    """A hundred bytes a file, the path's and the key's among them; tuples and strings were four times that. Files are
    read from their folder, and none is opened whose name promises an image."""
    for folder in range(20):
        (tmp_path / f"n{folder:08d}").mkdir()
    write_folder(tmp_path, {"n00000000/n00000000_0.JPEG": b"x"})
    for number in range(1, 6000):
        os.link(
            tmp_path / "n00000000/n00000000_0.JPEG", tmp_path / f"n{number % 20:08d}/n{number % 20:08d}_{number}.JPEG"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "_is_image", lambda descriptor: pytest.fail("opened"))
        tracemalloc.start()
        try:
            files = list_images(tmp_path, tmp_path / "out")
            labels = labels_of(files.paths, files.folders, "auto")
            held, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(files) == 6000 and len(labels.classes) == 20
    assert held < 120 * 6000 and most < 600 * 6000
    assert np.bincount(labels.of).tolist() == [300] * 20


def test_folders_that_come_again_are_one():
    paths = ["b/1", "a/1", "b/2", "0"]
    folders = Folders.of(paths)
    assert folders.names == ["b/", "a/", ""] and folders.within.tolist() == [0, 1, 0, 2]


def test_no_texts():
    assert len(Texts(b"")) == 0 and list(Texts(b"").parts()) == []


def test_a_file_that_vanishes_meanwhile_is_told_by_packing(tmp_path, monkeypatch):
    """As a link that leads nowhere is: listed if its name promises an image, else counted."""
    write_folder(tmp_path, {"a.jpg": b"x", "b.jpg": b"x", "c.txt": b"x"})
    monkeypatch.setattr("beitforge.shards.pack.listing.walk._facts", lambda entry: None)
    files = list_images(tmp_path, tmp_path / "out")
    assert list(files.paths) == ["a.jpg", "b.jpg"] and files.sizes.tolist() == [0, 0]
    assert [(one.kind, one.files) for one in files.others] == [("a link that leads nowhere", 1)]
