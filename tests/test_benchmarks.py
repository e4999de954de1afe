"""Benchmarks for a GPU are ready to run: without one, every call of theirs runs and is right."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("kernels.kernels", "ours                 with its gradient"),
        ("kernels.fusions", "linear + cross entropy                        ours"),
        ("training.train", "ours learns"),
    ],
)
def test_dry_runs(name, shown):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", "--dry"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize("name", ["kernels.kernels", "kernels.fusions", "training.train"])
def test_without_a_gpu_there_are_no_numbers(name):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "needs a GPU" in done.stderr
