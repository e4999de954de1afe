"""`finetune` through the front door: learns, resumes to the bit, one test on any number of ranks, clear refusals."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.metrics import read_metrics
from tests.conftest import ROOT, TINY
from tests.pipeline.test_training import finished, kill, weights

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


def alone(config: Path, run: Path, *settings: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    """`python -m pipeline finetune` in one process."""
    command = [sys.executable, "-m", "pipeline", "finetune", str(config), f"finetune.run={run}", *settings]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def whole(labelled, tmp_path_factory) -> Path:
    """A run left alone: 2 processes, ZeRO-2, everything that is drawn switched on."""
    run = tmp_path_factory.mktemp("whole") / "run"
    output = finished(tuned(labelled, run, "log.every_steps=1"))
    assert "the encoder starts as drawn from data.seed" in output
    return run


def test_a_run_learns_and_says_what_it_is(whole):
    """Trained on coloured noise of three classes: better than the majority's 12 of 23, on every sample once."""
    lines = read_metrics(whole, "test")
    assert [line["step"] for line in lines] == [6, STEPS]
    assert all(line["samples"] == 23 for line in lines)
    assert lines[-1]["accuracy"] > 0.8 > 12 / 23
    losses = [line["loss"] for line in read_metrics(whole, "train")]
    assert len(losses) == STEPS and min(losses[-4:]) < losses[0]
    assert json.loads((whole / "environment.json").read_text())["job"] == "finetune"


def test_killed_and_resumed_is_uninterrupted(labelled, whole, tmp_path):
    """Ended as a kill between two checkpoints would leave it, and by kill -9 while it runs; weights to the bit."""
    run = tmp_path / "run"
    process = tuned(labelled, run, "log.every_steps=1", "checkpoint.every=1 steps")
    while process.poll() is None and len(read_metrics(run, "train")) < 5:
        time.sleep(0.01)
    kill(process)
    process.communicate()
    saved = sorted(int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/state.json"))
    assert saved and saved[-1] < STEPS
    output = finished(tuned(labelled, run, "log.every_steps=1", "finetune.init=/nowhere"))
    assert f"from step {saved[-1]}" in output
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert read_metrics(run, "test")[-1]["loss"] == read_metrics(whole, "test")[-1]["loss"]


def test_any_number_of_ranks_takes_the_same_test(labelled, tmp_path):
    """One step at a rate of 0 leaves the weights as drawn; 23 samples divide by none of 2, 3 and the micro batch."""
    settings = ("finetune.duration=1 steps", "finetune.micro_batch=2", "finetune.head_scale=20", "checkpoint.keep=1")
    found = []
    for world in (1, 2, 3):
        run = tmp_path / f"run{world}"
        finished(tuned(labelled, run, *settings, f"train.zero_stage={world}", processes=world))
        found.append(read_metrics(run, "test")[-1])
    for line in found:
        assert line["samples"] == 23 and line["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert (line["accuracy"], line["top5"]) == (found[0]["accuracy"], found[0]["top5"])
    assert found[0]["loss"] != pytest.approx(np.log(3), rel=1e-3)


def test_goes_on_with_other_ranks_under_another_stage(whole, labelled, tmp_path):
    """From step 8 of a run of two processes under ZeRO-2 to the end with three under ZeRO-3."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / f"step-{STEPS}" / "state.json").unlink()
    output = finished(tuned(labelled, run, "train.zero_stage=3", "finetune.micro_batch=4", processes=3))
    assert "laying it out for 3 under ZeRO-3" in output and "from step 8" in output
    assert read_metrics(run, "test")[-1]["accuracy"] > 0.8


def test_few_labels_see_few_pictures(labelled, tmp_path):
    """10 % of 60: three of the half, two of the third, one of the sixth; an epoch is six samples."""
    run = tmp_path / "run"
    result = alone(labelled, run, "finetune.label_share=0.1", "finetune.duration=2 epochs", "finetune.global_batch=6")
    assert result.returncode == 0, result.stderr
    assert read_metrics(run, "start")[-1]["epoch_samples"] == 6
    assert read_metrics(run, "start")[-1]["steps"] == 2


def refused(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.labelled_images=", "data.labelled_test="], "data.labelled_images is empty"),
        (["finetune.input_size=36"], "finetune.input_size 36 is not a multiple of model.patch_size 8"),
        (["finetune.init=/nowhere"], "/nowhere is neither a run folder"),
        (["finetune.label_share=0"], "finetune.label_share is 0.0; it lies in (0, 1]"),
        (["finetune.global_batch=1"], "hold one picture, and mixup and cutmix mix those of a micro batch"),
        (["finetune.randaugment=auto"], "finetune.randaugment is 'auto', which timm does not read"),
        (["finetune.init={whole}", "finetune.run={whole}"], "finetune.init and finetune.run are both"),
        (["finetune.init={whole}"], "is it the training of a tokenizer, or a fine-tuning?"),
        (
            ["finetune.init={whole}", "model.patch_size=16", "tokenizer.input_size=16", "mask.num_patches=2"],
            "patch_size",
        ),
        (["finetune.run={whole}", "finetune.layer_decay=0.5"], "holds a run with finetune.layer_decay 0.8"),
        (["data.labelled_test={pictures}"], "of the same classes"),
        (["data.labelled_images={plain}", "data.labelled_test="], "has pictures without a label"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_is_one_line(labelled, whole, others, tmp_path, settings, words):
    filled = [setting.format(whole=whole, **others) for setting in settings]
    assert words in refused(alone(labelled, tmp_path / "run", *filled))


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """A set of other classes, and one of no classes."""
    folder = tmp_path_factory.mktemp("others")
    write_classes(folder / "made", 6, 2)
    (folder / "made" / "class0").rename(folder / "made" / "a new class")
    (folder / "flat").mkdir()
    for path in (folder / "made").rglob("*.jpg"):
        shutil.copy(path, folder / "flat" / path.name)
    for name, where in (("made", "pictures"), ("flat", "plain")):
        command = [sys.executable, "-m", "shards", "pack", str(folder / name), str(folder / where), "--workers", "1"]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return {"pictures": folder / "pictures", "plain": folder / "plain"}


def test_without_timm_the_cure_is_named(labelled, tmp_path):
    """And without RandAugment it is not needed."""
    (tmp_path / "timm.py").write_text("raise ImportError('not installed')\n")
    blocked = {"PYTHONPATH": str(tmp_path)}
    line = refused(alone(labelled, tmp_path / "run", environment=blocked))
    assert "cannot be imported (not installed): `pip install timm`, or set finetune.randaugment=" in line
    settings = ("finetune.randaugment=", "finetune.duration=1 steps")
    result = alone(labelled, tmp_path / "run", *settings, environment=blocked)
    assert result.returncode == 0, result.stderr
