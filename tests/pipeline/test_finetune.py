"""`finetune` through the front door: learns, resumes to the bit, one test on any number of ranks, clear refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT, TINY

STEPS = 12
TUNE = {"duration": f"{STEPS} steps", "global_batch": 12, "micro_batch": 6, "warmup": "2 steps", "lr": 3e-3}
TUNE |= {"input_size": 32, "layer_decay": 0.8, "test_every": "6 steps", "head_scale": 1.0}


def write_classes(folder: Path, count: int, seed: int) -> None:
    """Pictures whose colour tells their class, of three of unequal size: a half, a third, a sixth."""
    from shards.codec import encode

    generator = np.random.default_rng(seed)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    for number in range(count):
        label = (0, 1, 0, 1, 0, 2)[number % 6]
        height, width = generator.integers(36, 64, size=2)
        pixels = np.clip(colours[label] + generator.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
        path = folder / f"class{label}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, "jpg", 90))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A config with 60 labelled pictures to train on and 23 to test: 23 divides by no number of ranks."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, count, seed in (("train", 60, 0), ("test", 23, 1)):
        write_classes(folder / "pictures" / part, count, seed)
        where = [str(folder / "pictures" / part), str(folder / part)]
        command = [sys.executable, "-m", "shards", "pack", *where, "--samples-per-shard", "25", "--workers", "1"]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    data = {"labelled_images": str(folder / "train"), "labelled_test": str(folder / "test")}
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": data, "finetune": TUNE}))
    return path


def tuned(config: Path, run: Path, *settings: str, processes: int = 2) -> subprocess.Popen:
    """`./launch.sh finetune`, in a session of its own so that it can be killed whole."""
    command = [str(ROOT / "launch.sh"), "finetune", str(config), f"finetune.run={run}", *settings]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable, "NPROC": str(processes)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
