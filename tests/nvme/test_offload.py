"""Offloading the optimizer to NVMe: the numbers of an offload to the CPU, and checkpoints of the same form."""

import math
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.runs.checkpoints import State, newest
from beitforge.pipeline.runs.jsonl import read_metrics
from tests.conftest import TinySet
from tests.ranks import run_ranks

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="minutes: BEITFORGE_NIGHTLY=1")
# wide enough that a rank of two has tensors of more than 1 MiB, below which DeepSpeed leaves them in memory
WIDE = ("model.width=192", "model.heads=3", "train.zero_stage=3")
SHORT = ("train.duration=4 steps", "checkpoint.every=2 steps", "log.every_steps=1", "optimizer.warmup=1 steps")
SHORT += ("data.heldout_images=", "data.heldout_tokens=", *WIDE)


def section(folder: Path | None, **more: Any) -> str:
    to = {"device": "nvme", "nvme_path": str(folder), **more} if folder else {"device": "cpu"}
    zero = {"sub_group_size": 250_000, "offload_optimizer": {**to, "pin_memory": False}}
    return f"deepspeed.zero_optimization={zero}"


def started(tiny: TinySet, run: Path, *words: str, processes: int = 1) -> subprocess.CompletedProcess:
    verb = ("beitforge", "pretrain", "--rank", tiny.config, f"train.run={run}")
    return run_ranks(*verb, *SHORT, *words, processes=processes)


def train(tiny: TinySet, run: Path, *words: str, processes: int = 1) -> list[float]:
    done = started(tiny, run, *words, processes=processes)
    assert done.returncode == 0, done.stderr
    return [line["loss"] for line in read_metrics(run, "train")]


def newest_of(run: Path) -> tuple[State, dict[str, torch.Tensor]]:
    folder, state = newest(run, print)
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {*state.files, "state.json"}, "every file of it has a digest"
    saved, values = zero_layout.open_checkpoint(folder, state.zero_stage, state.groups, state.files), {}
    for name, shape in saved.shapes.items():
        whole = {value: torch.empty(math.prod(shape)) for value in ("fp32", *zero_layout.ADAM)}
        saved.fill(name, zero_layout.Piece(0, whole))
        values |= {f"{name} {value}": tensor for value, tensor in whole.items()}
    return state, values


def test_nvme(tiny, tmp_path):
    """The losses, weights and moments of an offload to the CPU; resumed bit for bit; resumed by two processes."""
    on_cpu, run, disk = tmp_path / "cpu", tmp_path / "run", tmp_path / "disk"
    expected = train(tiny, on_cpu, section(None))
    begin = disk / f"beitforge-offload-{socket.gethostname()}-"
    for name in ("left/zero_stage_3/optimizer", "theirs/thesis"):
        Path(f"{begin}{name}").mkdir(parents=True)
    assert train(tiny, run, section(disk)) == expected and len(expected) == 4
    assert list(disk.iterdir()) == [Path(f"{begin}theirs")], "what a process puts, or has left there, is removed"
    state, values = newest_of(run)
    plain, wanted = newest_of(on_cpu)
    assert state.files.keys() == plain.files.keys()
    assert values.keys() == wanted.keys() and all(torch.equal(values[name], wanted[name]) for name in wanted)

    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.copytree(run, tmp_path / "two")
    assert train(tiny, run, section(disk)) == expected
    assert newest_of(run)[0].files == state.files, "the same bytes"

    piped = section(disk, pipeline_read=True, pipeline_write=True, buffer_count=12)
    assert train(tiny, tmp_path / "two", piped, processes=2) == pytest.approx(expected, rel=1e-5)


@nightly
def test_to_and_from_other_stages(tiny, tmp_path):
    """A checkpoint of NVMe is resumed under ZeRO-1 and two processes, that one on NVMe again; and it is exported."""
    run, disk, other = tmp_path / "run", tmp_path / "disk", tmp_path / "other"
    expected = train(tiny, run, section(disk), "checkpoint.asynchronous=true", "train.precision=bf16")
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints" / "step-4")
    plain = ("train.zero_stage=1", "checkpoint.every=1 steps", "train.precision=bf16")
    train(tiny, other, *plain, processes=2)
    shutil.rmtree(other / "checkpoints" / "step-4")
    found = train(tiny, other, section(disk), "train.precision=bf16")
    assert found == pytest.approx(expected, rel=5e-3)
    done = run_ranks("beitforge", "export", other, tmp_path / "weights")
    assert done.returncode == 0, done.stderr


def test_a_disk_that_cannot_be_used_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    done = started(tiny, tmp_path / "run", section(tmp_path / "file"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert "nvme_path: " in line and str(tmp_path / "file") in line and "device: cpu" in line
