"""Tars as webdataset's own writer makes them, to the byte, and where what was written lies."""

import io
import subprocess
import sys
import tarfile

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from beitforge.shards.pack import tar_writing
from beitforge.shards.pack.tar_scan import read_tar
from beitforge.shards.pack.tar_writing import SampleWriter
from tests.shards.made_images import two_classes

MTIME = 1577836800

KEYS = {
    "a folder": "n01440764/0001",
    "the longest of one block": "k" * 96,
    "one more": "k" * 97,
    "no ASCII": "b/ü 猫",
    "no ASCII and long": "猫" * 60,
    "escaped": "a%2Ejpg",
}


def by_webdataset(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=MTIME) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return file.getvalue()


def ours(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    file = io.BytesIO()
    with SampleWriter(file) as writer:
        places = [writer.write(key, members) for key, members in samples]
    written = file.getvalue()
    assert (writer.size, writer.digest) == (len(written), xxhash.xxh3_128_hexdigest(written))
    for (_, members), of_sample in zip(samples, places, strict=True):
        found = {name: written[place.offset : place.offset + place.size] for name, place in of_sample.items()}
        assert found == members
    return written


@pytest.mark.parametrize("case", KEYS)
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 9000])
def test_the_bytes_are_webdatasets(case, size):
    samples = [(KEYS[case], {"jpg": b"x" * size, "json": b"{}", "cls": b"7"})]
    assert ours(samples) == by_webdataset(samples)


NAME = st.text(st.characters(exclude_characters="\0./", exclude_categories=("Cs",)), min_size=1, max_size=120)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NAME, st.integers(0, 3000)), max_size=20))
def test_any_names_and_sizes(parts):
    """The end, too: two blocks of zeros, and a whole record of twenty."""
    samples = [(f"{number}/{name}", {"png": bytes(size)}) for number, (name, size) in enumerate(parts)]
    written = ours(samples)
    assert written == by_webdataset(samples) and len(written) % tarfile.RECORDSIZE == 0


def test_a_size_that_needs_more_than_its_digits():
    """From 8 GiB on the field is binary: tarfile's business."""
    assert tar_writing._header("a.png", 8**11) == tar_writing._made_header("a.png", 8**11)
    assert tar_writing._header("a.png", 8**11 - 1) == tar_writing._made_header("a.png", 8**11 - 1)


def test_a_block_that_fails_leaves_no_end(tmp_path):
    """What was cut short must not look like a whole tar."""
    path = tmp_path / "a.tar"
    with pytest.raises(KeyError), open(path, "wb") as file, SampleWriter(file) as writer:
        writer.write("a", {"png": b"1"})
        raise KeyError
    assert path.stat().st_size == 1024
    with open(path, "wb") as file, SampleWriter(file) as writer:
        writer.write("a", {"png": b"1"})
    assert [sample.key for sample in read_tar(path).samples] == ["a"]


@pytest.mark.parametrize(
    ("verb", "processes"), [("pack", 3), ("index", 3), ("verify", 3), ("stats", 1), ("simulate", 1)]
)
def test_no_process_imports_torch(tmp_path, verb, processes):
    """Neither the main process nor a worker of any verb of shard sets loads what costs 200 MB and is not needed: a
    finder put before all others writes down what every process asks for."""
    images = two_classes(tmp_path / "images", 5)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Asked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'deepspeed', 'webdataset', 'triton', 'numpy'):\n"
        f"            with open({str(tmp_path / 'asked')!r}, 'a') as file:\n"
        "                print(os.getpid(), name, file=file)\n"
        "sys.meta_path.insert(0, Asked())\n"
    )
    words = {
        "pack": [str(images), str(tmp_path / "set"), "--samples-per-shard", "4", "--workers", "2"],
        "simulate": ["--samples", "1000"],
    }
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"}
    if verb != "pack":
        run(["pack", *words["pack"]], environment)
        (tmp_path / "asked").unlink()
    run([verb, *words.get(verb, [str(tmp_path / "set"), "--workers", "2"])], environment)
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert {name for _, name in asked} == {"numpy"}
    assert (len({process for process, _ in asked}) > 1) == (verb in ("pack", "index", "verify"))


def run(words: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "beitforge", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
