"""A disk that is full ends every command in one line that names the place, and loses nothing that was there."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from beitforge.pipeline.runs.checkpoints import newest
from tests.ranks import run_ranks

SIZES = (4, 24, 64, 160)  # KiB of the file system: for folders, a first file, some of the rest
ALONE = ["data.heldout_images=", "data.heldout_tokens="]
TRAINED = ["train.duration=6 steps", "checkpoint.every=2 steps", "log.every_steps=1", "log.positions=true", *ALONE]
COMMANDS = {
    "pack": "pack {tiny}/images/train {out} --samples-per-shard 4 --workers 1",
    "tokenize": "tokenize --rank {config} data.tokens={out} data.heldout_images= data.heldout_tokens=",
    "tokenizer": "tokenizer --rank {config} data.tokenizer={out} tokenizer.global_batch=8 tokenizer.micro_batch=4",
    "pretrain": "pretrain --rank {config} train.run={out} log.every_steps=1 checkpoint.every=1000~steps",
    "pretrain with TensorBoard": "pretrain --rank {config} train.run={out} log.every_steps=1 log.tensorboard=true",
    "export": "export {run} {out}",
    "import-tokenizer": "import-tokenizer {tiny}/tokenizer {out}",
    "report": "report {run} --out {out}.html",
    "probe": "probe {small} {tiny}/shards/train {tiny}/shards/test --samples 20",
    "slurm": "slurm {config} --gpus-per-node 1 --dry-run train.run={out}",
}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "run"
    words = ("beitforge", "pretrain", "--rank", tiny.config, f"train.run={folder}", *TRAINED)
    assert run_ranks(*words).returncode == 0
    return folder


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def grow(disk: Path, kibibytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a file system")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_that_names_the_place(tiny, run, disk, name):
    ended = 0
    places = {"tiny": tiny.folder, "config": tiny.config, "out": disk / "out", "run": run, "small": disk / "run"}
    for size in SIZES:
        for path in disk.iterdir():
            subprocess.run(["rm", "-r", path], check=True)
        grow(disk, size)
        if name == "probe":
            grow(disk, 4096)
            subprocess.run(["cp", "-r", run, disk / "run"], check=True)
            fill(disk)
        words = [word.replace("~", " ").format(**places) for word in COMMANDS[name].split()]
        done = run_ranks("beitforge", *words)
        if not done.returncode:
            break
        ended += 1
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        assert str(disk) in lines[0], lines[0]
        assert not list(disk.glob(".out.beitforge-*")), "what was half written went with its room"
    assert ended, "the disk was never full"


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a file system")
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(tiny, disk, asynchronous):
    """From the newest whole checkpoint: what was saved before stays whatever came in between."""
    grow(disk, 1600)
    words = ("beitforge", "pretrain", "--rank", tiny.config, f"train.run={disk}/run", *TRAINED)
    words = (*words, f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=9")
    done = run_ranks(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    found = newest(disk / "run", lambda _: None)
    assert found is not None and found[1].step in (2, 4)
    grow(disk, 8192)
    done = run_ranks(*words)
    assert done.returncode == 0 and f"from step {found[1].step}," in done.stderr, done.stderr
