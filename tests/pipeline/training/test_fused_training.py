"""Training with every fused kernel, on GPUs or in Triton's interpreter: the losses of plain PyTorch."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.runs.jsonl import read_metrics
from benchmarks.training.zero_parity import plain_losses
from tests.conftest import ROOT

GPU = torch.cuda.is_available()
SETTINGS = ["train.duration=4 steps", "optimizer.warmup=1 steps", "log.every_steps=1", "data.heldout_images="]
SETTINGS += ["data.heldout_tokens="]


@pytest.fixture(scope="module")
def plain(tiny) -> list[float]:
    settings = [*SETTINGS, "model.kernels=reference"]
    return plain_losses(load_config(str(tiny.config), settings), 4)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("settings", [["train.zero_stage=3", "train.activation_checkpointing=full"], []], ids=str)
def test_losses_are_those_of_plain_pytorch(tiny, plain, tmp_path, settings):
    run = tmp_path / "run"
    words = [*SETTINGS, *settings, f"train.run={run}", "model.kernels=fused"]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable}
    # NCCL wants a GPU for each process
    environment |= {"NPROC": str(torch.cuda.device_count())} if GPU else {"NPROC": "2", "TRITON_INTERPRET": "1"}
    command = [str(ROOT / "launch.sh"), "pretrain", str(tiny.config), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fused" in done.stderr + done.stdout
    losses = [line["loss"] for line in read_metrics(run, "train")]
    assert losses == pytest.approx(plain, rel=1e-4 if GPU else 1e-5)
    assert len(set(losses)) == 4
