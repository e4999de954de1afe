"""`replay`: a run's steps done again are its own bit for bit, and what is planted is found where it was planted."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.replay.steps import _segments
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.runs.recorded import read_recorded, to_hex
from beitforge.pipeline.training.recovery import Rollback, usable
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.shards.stream.test_stream import copied, damage, moved

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="more of the same: BEITFORGE_NIGHTLY=1")
UNJUDGED = ["log.evaluation_share=0", "log.every_steps=5", "checkpoint.keep=9"]
SHORT = ["train.duration=12 steps", "train.global_batch=12", "train.micro_batch=2", *UNJUDGED]
MATRIX = [(stage, world, precision) for stage in range(4) for world in (1, 2, 3) for precision in ("fp32", "bf16")]
OFTEN = ((0, 1, "fp32"), (2, 2, "bf16"), (3, 3, "fp32"))


def traces(run: Path) -> list[tuple]:
    """Every file of a folder: name, bytes, and when it was changed."""
    files = sorted(path for path in run.rglob("*"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in files]
    return [(str(path), digest, path.stat().st_mtime_ns) for path, digest in zip(files, digests, strict=True)]


def replayed(run: Path, *words: object, world: int = 1, code: int = 0) -> str:
    """What a replay says that ends with `code` and leaves the run folder as it was."""
    before = traces(run)
    done = run_ranks("beitforge", "replay", "--rank", run, *words, processes=world)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and traces(run) == before
    return done.stderr


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Iterator[Callable[..., Path]]:
    """A run of twelve steps with checkpoints every four, made once."""

    @functools.cache
    def make(stage: int, world: int, precision: str, *more: str) -> Path:
        run = tmp_path_factory.mktemp("replayed") / "run"
        how = [f"train.zero_stage={stage}", f"train.precision={precision}", f"train.run={run}"]
        flipped = more[0] if more else "flip-0"
        module = "tests.pipeline.replay.flipped_save"
        done = run_ranks(module, flipped, "pretrain", "--rank", tiny.config, *SHORT, *how, processes=world)
        assert done.returncode == 0, done.stderr
        return run

    yield make


@pytest.mark.parametrize(
    ("stage", "world", "precision"),
    [pytest.param(*case, marks=() if case in OFTEN else nightly) for case in MATRIX],
)
def test_the_same_bits(trained, stage, world, precision):
    """Every step, and weights and optimizer state at every checkpoint; log lines are rarer than either."""
    said = replayed(trained(stage, world, precision), "--from", 4, "--to", 12, world=world)
    assert "from checkpoint step-4" in said
    assert "steps 5–12: loss and gradient norm of 8 recorded steps, bit for bit" in said
    assert all(f"checkpoint step-{step}: weights and optimizer state are the recorded" in said for step in (8, 12))


@pytest.mark.parametrize(
    ("stage", "world", "precision"),
    [pytest.param(*case, marks=() if case == (2, 2, "bf16") else nightly) for case in MATRIX],
)
def test_a_flipped_weight_is_found_at_its_step(trained, stage, world, precision):
    """From the checkpoint that holds it the next steps differ; from the one before, its weights do, by name."""
    run = trained(stage, world, precision, "flip-8")
    said = replayed(run, "--from", 8, "--to", 12, world=world, code=1)
    first = int(re.search(r"recorded steps differ, the first is step (\d+)", said)[1])
    assert first == 9, said
    assert re.search(rf"step {first} differs: (loss|gradient norm) [\d.]+ here and [\d.]+ recorded", said), said
    assert "checkpoint step-12 differs" in said
    said = replayed(run, "--step", 8, world=world, code=1)
    assert "checkpoint step-8 differs: fp32 of blocks.1.fc2.weight in" in said, said
    assert "steps 5–8: loss and gradient norm of 4 recorded steps, bit for bit" in said
    assert "not as recorded, from the weights after step 8 on" in said
    assert "checkpoint step-8: weights" in replayed(trained(stage, world, precision), "--step", 8, world=world)


def test_a_changed_sample_is_found_at_its_step(tiny, trained, tmp_path):
    """One flipped bit in an image that the seventh step reads, in a copy of the sets that lies elsewhere."""
    run, folder = trained(2, 2, "bf16"), copied(tiny, tmp_path)
    source = pretraining(load_config(str(run / "config.yaml"), moved(folder)))
    sample = 12 * 6 + 5
    _, shards, rows = source.stream.places.locate(np.array([sample]))
    key = damage(folder, int(shards[0]), int(rows[0]))
    said = replayed(run, "--from", 4, "--to", 8, *moved(folder), "--page", tmp_path / "page.html", world=2, code=1)
    assert f"sample {sample} (" in said and f" {key}) is replaced here" in said
    assert "the first is step 7" in said and "not as recorded, from step 7 on" in said
    page = (tmp_path / "page.html").read_text()
    assert key in page and f"sample {sample}, epoch 1" in page and "replaced by" in page
    assert page.count("data:image/png") == 2 * 12 and "http" not in page.replace("http-equiv", "")


def test_what_is_not_finite_is_shown(tiny, tmp_path):
    """The updates left out are left out again, and the page has the samples; the log line says how to ask for it."""
    run = tmp_path / "run"
    settings = ["optimizer.lr=1e12", "optimizer.warmup=0 steps", "checkpoint.every=1 steps", "faults.max_skipped=2"]
    done = run_ranks("beitforge", "pretrain", "--rank", tiny.config, f"train.run={run}", *settings)
    assert done.returncode == 2 and f"`replay {run} --step 2 --page OUT.html` shows them" in done.stderr
    said = replayed(run, "--step", 2, "--page", tmp_path / "page.html")
    assert "step 2: the loss of rank 0" in said and "bit for bit" in said
    page = (tmp_path / "page.html").read_text()
    assert "loss nan" in page and all(f"sample {number}, epoch 0" in page for number in range(8, 16))
    said = replayed(run, "--step", 2, "train.micro_batch=1", "--page", tmp_path / "page.html")
    assert "micro batch 7: loss nan" in (tmp_path / "page.html").read_text()


@nightly
def test_a_launcher_starts_as_many_as_the_run_had(trained):
    """And its exit code is the comparison's."""
    run = trained(2, 2, "bf16", "flip-8")
    command = [sys.executable, "-m", "beitforge", "replay", str(run), "--step", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and ", as 2 processes" in done.stderr, done.stderr
    assert "checkpoint step-8 differs" in done.stderr


def test_a_damaged_checkpoint_differs(tiny, trained, tmp_path):
    """One among the steps, or before them: the replay begins with an older one, and says which file is damaged."""
    run = tmp_path / "run"
    shutil.copytree(trained(0, 1, "fp32"), run)
    path = max((run / "checkpoints" / "step-8").glob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = replayed(run, "--step", 10, code=1)
    assert "from checkpoint step-4" in said and f"checkpoint step-8 is not used: {path.name}" in said, said
    assert "steps 5–10: loss and gradient norm of 6 recorded steps, bit for bit" in said
    assert "not as recorded, from the weights after step 8 on" in said


def test_another_world_is_said(trained):
    said = replayed(trained(0, 1, "fp32"), "--step", 8, world=2, code=1)
    assert "recorded by one process, replayed by 2: sums are taken in another order" in said


@pytest.mark.parametrize(
    ("verb", "world"),
    [
        ("tokenizer", 1),
        pytest.param("tokenizer", 2, marks=nightly),
        pytest.param("finetune", 1, marks=nightly),
        pytest.param("finetune", 2, marks=nightly),
    ],
)
def test_other_trainings(tiny, tmp_path, verb, world):
    """From their beginning, and from a checkpoint, in a copy of the run folder."""
    run = tmp_path / "made" / "training"
    given = [verb, "--rank", tiny.config, *UNJUDGED, f"{verb}.duration=8 steps", f"{verb}.warmup=2 steps"]
    given += [f"{verb}.global_batch=8", f"{verb}.micro_batch=4", "checkpoint.every=3 steps"]
    if verb == "finetune":
        given += [f"data.labelled_images={tiny.folder}/shards/train", "finetune.randaugment=", f"finetune.run={run}"]
        given += ["finetune.input_size=32", "finetune.ema_decay=0.9", "finetune.weight_decay_end=0.5"]
        given += ["finetune.dropout=0.1", "finetune.drop_last=true"]
    else:
        given += [f"data.tokenizer={run.parent}"]
    done = run_ranks("beitforge", *given, processes=world)
    assert done.returncode == 0, done.stderr
    there = run.rename(tmp_path / "elsewhere")
    for words in (("--from", 0, "--to", 8), ("--step", 7)):
        said = replayed(there, *words, world=world)
        assert "bit for bit" in said and ("step-6" in said)


def test_a_checkpoint_that_is_gone_is_named_with_the_cure(tiny, trained):
    run = trained(2, 2, "bf16")
    for words, told in (
        (("--step", 13), "it has 12"),
        (("--step", 0), "--step 0: steps are counted from 1 on"),
        (("--from", 4), "give --step N, or --from A and --to B"),
        (("--from", 4, "--to", 4), "A is less than B"),
        (("--step", 5, "train.run=3", "x.y=1"), "x"),
    ):
        done = run_ranks("beitforge", "replay", "--rank", run, *words)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = run_ranks("beitforge", "replay", "--rank", tiny.folder, "--step", 3)
    assert done.returncode == 2 and "holds no run (no config.yaml)" in done.stderr


def test_pruned(tiny, tmp_path):
    """Only the newest is kept: an older step has no checkpoint, its run's beginning has always one."""
    run = tmp_path / "run"
    given = ["train.duration=6 steps", "checkpoint.every=2 steps", "checkpoint.keep=1", "log.evaluation_share=0"]
    done = run_ranks("beitforge", "pretrain", "--rank", tiny.config, *given, f"train.run={run}")
    assert done.returncode == 0, done.stderr
    said = replayed(run, "--step", 5, code=2)
    assert "no complete checkpoint at or before step 4 any more: the first of those there is step-6" in said
    assert "checkpoint.keep_every" in said and "--from 0" in said
    assert "from the weights that the run began with" in replayed(run, "--step", 2)
    said = replayed(run, "--from", 0, "--to", 6)
    assert "checkpoint step-6: weights and optimizer state are the recorded ones" in said


def test_the_way_past_rollbacks():
    """From step 20 back to 10, on behind 30; then from 50 back to 5, on behind 60."""
    first, second = Rollback(10, 30), Rollback(5, 60)
    assert _segments(0, 20, [], []) == [(0, 20)]
    assert _segments(0, 40, [first], [4, 8, 36]) == [(0, 4), (4, 8), (8, 10), (30, 36), (36, 40)]
    assert _segments(10, 40, [first], [10]) == [(30, 40)]
    assert _segments(0, 70, [first, second], []) == [(0, 5), (60, 70)]
    assert not usable([first], 20) and usable([first], 10)


def test_what_a_run_recorded(tmp_path):
    """Of steps done again the last time counts; older runs have metrics alone; what is damaged is passed over."""
    two = {"losses": to_hex("f", [4, 3]), "gradient_norms": to_hex("d", [1, 2])}
    one = {"losses": to_hex("f", [8]), "gradient_norms": to_hex("d", [9])}
    lines = [
        {"step": 0, "kind": "start", "world": 2},
        {"step": 2, "kind": "steps", "first": 1, "world": 2, **two},
        {"step": 2, "kind": "train", "loss": 3.5, "gradient_norm": 2.0},
        {"step": 4, "kind": "steps", "first": 3, "world": 2, **two},
        {"step": 2, "kind": "start", "world": 3},
        {"step": 3, "kind": "steps", "first": 3, **one},
        {"step": 9, "kind": "steps", "first": 8, "losses": "zz", "gradient_norms": "00"},
        {"step": 9, "kind": "steps", "first": 9, "losses": 5, "gradient_norms": None},
        {"step": 9, "kind": "steps", "first": 2, **one},
        {"step": "9", "kind": "steps"},
        {"step": 6, "kind": "train", "loss": 2.5, "gradient_norm": 7.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("[1]\n{\n" + "".join(json.dumps(line) + "\n" for line in lines))
    found = read_recorded(tmp_path)
    assert {number: (step.loss, step.norm, step.world) for number, step in found.steps.items()} == {
        1: (4.0, 1.0, 2),
        2: (3.0, 2.0, 2),
        3: (8.0, 9.0, 3),
        6: (None, 7.0, 3),
    }
    assert found.means[0, 2]["loss"] == 3.5 and found.means[2, 6]["loss"] == 2.5


def test_every_step_is_recorded(trained):
    """Between log lines, too, and what the lines of metrics say is what the steps say."""
    run = trained(0, 1, "fp32")
    recorded = read_recorded(run)
    assert sorted(recorded.steps) == list(range(1, 13))
    for line in read_metrics(run, "train"):
        assert recorded.steps[line["step"]].norm == line["gradient_norm"]
    last = read_metrics(run, "train")[-1]
    (ends,) = [ends for ends in recorded.means if ends[1] == last["step"]]
    losses = [recorded.steps[number].loss for number in range(ends[0] + 1, ends[1] + 1)]
    assert last["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
