"""A run whose `deepspeed` section turns on torch's autocast: every kernel keeps up with plain PyTorch under it."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from beitforge.pipeline.runs.jsonl import read_metrics
from tests.conftest import ROOT
from tests.pipeline.test_gpu_runs import SHORT, UNJUDGED

GPU = torch.cuda.is_available()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("positions", ["relative_shared", "relative"])
def test_losses_are_those_of_plain_pytorch(tiny, tmp_path, positions):
    environment = os.environ if GPU else {**os.environ, "TRITON_INTERPRET": "1"}
    found = []
    for kernels in ("fused", "reference"):
        run = tmp_path / kernels
        words = [*SHORT, *UNJUDGED, f"train.run={run}", f"model.kernels={kernels}", f"model.positions={positions}"]
        words += ["deepspeed.torch_autocast={enabled: true, dtype: bfloat16}", "train.precision=fp32"]
        command = [sys.executable, "-m", "beitforge", "pretrain", "--rank", str(tiny.config), *words]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append([line["loss"] for line in read_metrics(run, "train")])
    assert found[0] == pytest.approx(found[1], rel=1e-2)
    assert len(set(found[0])) == len(found[0])
