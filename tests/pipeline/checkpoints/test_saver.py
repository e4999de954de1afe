"""Saving: what is kept, whether there is room, behind the run or at once; and weights that come out one at a time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from tests.conftest import ROOT
from tests.pipeline.checkpoints.large_export import beit
from tests.pipeline.training.test_trainer import trained, weights
from tests.ranks import run_ranks

ALONE = ["data.heldout_images=", "data.heldout_tokens=", "train.duration=8 steps"]


def steps(run: Path) -> set[int]:
    return {int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/state.json")}


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """The same run with checkpoints written at once, and written while it goes on; every third step stays for good."""
    runs = []
    for name in ("at-once", "behind"):
        run = tmp_path_factory.mktemp(name) / "run"
        settings = ["checkpoint.every=1 steps", "checkpoint.keep=2", "checkpoint.keep_every=3 steps"]
        trained(tiny, run, *ALONE, *settings, f"checkpoint.asynchronous={str(name == 'behind').lower()}")
        runs.append(run)
    return runs[0], runs[1]


def test_the_newest_and_every_nth_are_kept(pair):
    for run in pair:
        assert steps(run) == {3, 6, 7, 8}


def test_written_behind_the_run_is_what_is_written_at_once(pair):
    """Bit for bit, for every tensor of every file: the snapshot is of the step it is named for."""
    for step in (3, 6, 8):
        at_once, behind = (zero_layout.open_checkpoint(*_place(run, step)) for run in pair)
        assert at_once.step == behind.step == step
        for (name, a), (_, b) in zip(at_once.weights(), behind.weights(), strict=True):
            assert torch.equal(a, b), (step, name)
        for name, pieces in at_once.pieces.items():
            for ours, theirs in zip(pieces, behind.pieces[name], strict=True):
                assert ours.values.keys() == theirs.values.keys() == {"fp32", "exp_avg", "exp_avg_sq"}
                assert all(torch.equal(value, theirs.values[key]) for key, value in ours.values.items()), name


def _place(run: Path, step: int) -> tuple[Path, int, list[list[str]]]:
    folder = run / "checkpoints" / f"step-{step}"
    state = json.loads((folder / "state.json").read_text())
    return folder, state["zero_stage"], state["groups"]


def test_a_run_goes_on_from_what_was_written_behind_it(tiny, pair, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pair[1], run)
    shutil.rmtree(run / "checkpoints" / "step-8")
    assert "from step 7" in trained(tiny, run, *ALONE)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(pair[0]).items())


@pytest.fixture
def writer() -> Any:
    quiet_deepspeed()
    from beitforge.pipeline.distributed.file_writer import Writer

    return Writer()


def test_the_writer_copies_before_it_returns(tmp_path, writer):
    """What training changes while a file is being written is not in it."""
    tensor = torch.zeros(4)
    writer.asynchronous = True
    for number in range(20):
        writer.save({"state": {"nested": [tensor]}, "number": number}, str(tmp_path / f"{number}.pt"))
        tensor += 1
    assert writer.wait() == "" and not writer.busy
    for number in range(20):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert found["number"] == number and found["state"]["nested"][0].tolist() == [number] * 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fails_is_told_once_everything_was_tried(tmp_path, writer, asynchronous):
    writer.asynchronous = asynchronous
    writer.save({"a": torch.zeros(2)}, str(tmp_path / "missing" / "file.pt"))
    assert "No such file" in writer.wait()
    assert writer.wait() == ""


def test_a_full_disk_is_called_so(tmp_path, writer):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        writer.save({"a": torch.zeros(100_000)}, str(disk / "file.pt"))
        assert "No space left" in writer.wait()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("size", "kept"), [("900k", {1}), ("1600k", {7, 8})], ids=["refused", "the oldest goes first"])
def test_room_is_made_or_nothing_is_begun(tiny, tmp_path, size, kept):
    """Real file systems with room for one checkpoint, and for two beside each other but not for three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        run = disk / "run"
        settings = (*ALONE, "checkpoint.every=1 steps", "checkpoint.keep=2")
        output = trained(tiny, run, *settings, processes=1, code=0 if size == "1600k" else 2)
        assert steps(run) == kept and not (run / "checkpoints" / "step-2").exists()
        assert (size == "1600k") != ("MiB free, a checkpoint takes" in output), output
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_export_holds_one_tensor_at_a_time(tmp_path, stage):
    """43 MB of weights, in a file that is three times that; the largest tensor has 0.6 MB."""
    module = "tests.pipeline.checkpoints.large_export"
    saved = run_ranks(module, "save", tmp_path, stage)
    assert saved.returncode == 0, saved.stderr
    # a new interpreter: what a fork has inherited would blur its memory
    command = [sys.executable, "-W", "ignore", "-m", module, "export", tmp_path, str(stage), tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 6_000_000
    exported, ours = load_file(tmp_path / "out" / "model.safetensors"), beit().state_dict()
    assert exported.keys() == ours.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in ours.items())
