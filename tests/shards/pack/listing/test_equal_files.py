"""Files of equal bytes are found, all of them and no others, and few bytes are read for it."""

import os

import numpy as np
import pytest

from beitforge.shards.pack.listing import equal_files
from beitforge.shards.pack.listing.equal_files import SAMPLE, first_equals
from tests.shards.made_images import write_folder


def firsts(folder, files: dict[str, bytes]) -> list[int]:
    write_folder(folder, files)
    return first_equals(folder, list(files), np.array([len(data) for data in files.values()])).tolist()


@pytest.mark.parametrize("size", [1, 100, SAMPLE, SAMPLE + 1, 3 * SAMPLE, 5 * SAMPLE + 7])
def test_one_byte_anywhere_tells_two_files_apart(tmp_path, size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    files = {"0": data, "z/copy": data}
    for place in {0, size // 3, size // 2, size - 1}:
        files[f"at {place}"] = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    files |= {"shorter": data[:-1], "longer": data + b"x", "z/again": data}
    expected = [0, 0, *range(2, len(files) - 1), 0]
    if size == 1:
        expected = [0, 0, 2, 3, 4, 0]
    assert firsts(tmp_path, files) == expected


def test_random_folders_against_all_pairs(tmp_path):
    rng = np.random.default_rng(0)
    pool = [rng.integers(0, 2, int(rng.integers(1, 4)) * SAMPLE, dtype=np.uint8).tobytes() for _ in range(12)]
    files = {f"{i}": pool[int(rng.integers(len(pool)))] for i in range(80)}
    contents = list(files.values())
    assert firsts(tmp_path, files) == [contents.index(data) for data in contents]


def test_empty_and_unreadable_files_are_like_no_other(tmp_path):
    """An empty file is refused by itself, one that went away as well; neither joins a group by accident."""
    write_folder(tmp_path, {"a": b"", "b": b"", "c": b"x", "d": b"x"})
    (tmp_path / "d").unlink()
    os.symlink("nowhere", tmp_path / "d")
    assert first_equals(tmp_path, list("abcd"), np.array([0, 0, 1, 1])).tolist() == [0, 1, 2, 3]


def test_only_files_that_may_be_equal_are_read(tmp_path, monkeypatch):
    """A million files are not read once more: sizes first, then 4 KiB, and only what agrees in both from end to end."""
    large, other = bytes(2 * SAMPLE), b"y" * 2 * SAMPLE
    files = {"alone": b"abc", "like": large, "copy": large, "other": other, "small": b"12", "small too": b"12"}
    read: list[tuple[str, list[str]]] = []
    inner = equal_files.look_into

    def counted(folder, paths, digest, *more):
        read.append((digest.__name__, paths))
        return inner(folder, paths, digest, *more)

    monkeypatch.setattr(equal_files, "look_into", counted)
    assert firsts(tmp_path, files) == [0, 1, 1, 3, 4, 4]
    assert read == [("_sample", ["like", "copy", "other", "small", "small too"]), ("_whole", ["like", "copy"])]
