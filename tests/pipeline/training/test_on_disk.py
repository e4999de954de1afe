"""What a checkpoint's position covers is on disk before it: nothing is lost for good by a kill, and nothing is owed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beitforge.pipeline.cluster.watchdog import EXIT_HUNG
from beitforge.pipeline.config.settings import Faults
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.runs.recorded import from_hex, to_hex
from beitforge.pipeline.training import loop
from beitforge.pipeline.training.recovery import Fault, Recovery
from tests.ranks import run_ranks
from tests.shards.stream.test_stream import copied, damage, moved

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="more of the same: BEITFORGE_NIGHTLY=1")
RARELY = ["log.every_steps=20", "checkpoint.every=3 steps", "data.bad_sample_budget=1", "log.positions=true"]
UNJUDGED = ["data.heldout_images=", "data.heldout_tokens=", "log.evaluation_share=0"]


@pytest.fixture(scope="module")
def damaged(tiny, tmp_path_factory) -> Path:
    """A copy of the tiny set in which every third image is damaged."""
    folder = copied(tiny, tmp_path_factory.mktemp("damaged"))
    for number in range(0, 48, 3):
        damage(folder, number // 16, number % 16)
    return folder


def words(verb: str, tiny, folder: Path, run: Path) -> list[str]:
    """A training of eight steps of eight samples, its run folder `run`."""
    settings = [*moved(folder), *RARELY, *UNJUDGED]
    if verb == "finetune":
        of_set = f"data.labelled_images={folder}/shards/train"
        own = ["finetune.global_batch=8", "finetune.micro_batch=4", "finetune.duration=8 steps", "finetune.mixup=0"]
        own += ["finetune.warmup=2 steps", "finetune.cutmix=0", "finetune.randaugment=", "finetune.input_size=32"]
        return [verb, "--rank", str(tiny.config), *settings, *own, of_set, f"finetune.run={run}"]
    if verb == "tokenizer":
        own = ["tokenizer.global_batch=8", "tokenizer.micro_batch=4", "tokenizer.duration=8 steps"]
        own += ["tokenizer.warmup=2 steps", f"data.tokenizer={run.parent}"]
        return [verb, "--rank", str(tiny.config), *settings, *own]
    return [verb, "--rank", str(tiny.config), *settings, "train.duration=8 steps", f"train.run={run}"]


def bad_samples(run: Path) -> list[str]:
    return sorted((run / "bad_samples.jsonl").read_text().splitlines())


def measured(run: Path) -> list[tuple]:
    """What the run has learned, without its times."""
    steps = [
        (line["step"], line["first"], line["losses"], line["gradient_norms"]) for line in read_metrics(run, "steps")
    ]
    return steps + [(line["step"], line["loss"], line["gradient_norm"]) for line in read_metrics(run, "train")]


@pytest.mark.parametrize(
    ("verb", "world", "asynchronous"),
    [
        ("pretrain", 2, True),
        ("tokenizer", 1, False),
        pytest.param("pretrain", 3, False, marks=nightly),
        pytest.param("pretrain", 1, False, marks=nightly),
        pytest.param("finetune", 1, True, marks=nightly),
        pytest.param("finetune", 2, False, marks=nightly),
        pytest.param("tokenizer", 2, True, marks=nightly),
    ],
)
def test_a_kill_behind_a_checkpoint_loses_no_bad_sample(tiny, damaged, tmp_path, verb, world, asynchronous):
    """Log lines are rarer than checkpoints: what was replaced before one is listed, and every step logged."""
    whole, run = tmp_path / "whole" / "training", tmp_path / "run" / "training"
    more = [f"checkpoint.asynchronous={asynchronous}".lower()]
    more += ["train.global_batch=9", "train.micro_batch=3"] if world == 3 else []
    name = "tests.pipeline.training.killed_when"
    assert run_ranks(name, "never", *words(verb, tiny, damaged, whole), *more, processes=world).returncode == 0
    killed = run_ranks(name, "saved-3", *words(verb, tiny, damaged, run), *more, processes=world)
    assert killed.returncode not in (0, 1, 2), killed.stderr
    assert 0 < len(bad_samples(run)) < len(bad_samples(whole))
    assert {line["step"] for line in read_metrics(run, "train")} == {1, 3}
    done = run_ranks(name, "never", *words(verb, tiny, damaged, run), *more, processes=world)
    assert done.returncode == 0 and "from step 3" in done.stderr, done.stderr
    assert bad_samples(run) == bad_samples(whole)
    assert measured(run) == measured(whole)


def test_a_spent_budget_stops_every_start(tiny, tmp_path):
    """Exit code 2 again, before a step is taken; raised, the run ends."""
    folder, run = copied(tiny, tmp_path), tmp_path / "run"
    damage(folder, 0, 2)
    damage(folder, 1, 5)
    given = ["beitforge", "pretrain", "--rank", str(tiny.config), *moved(folder), *UNJUDGED, f"train.run={run}"]
    given += ["train.duration=8 steps", "checkpoint.every=2 steps", "log.every_steps=20"]
    first, again = (run_ranks(*given, "data.bad_sample_budget=0") for _ in range(2))
    for refused in (first, again):
        assert refused.returncode == 2 and "more than the 0 of data.bad_sample_budget" in refused.stderr, refused.stderr
    assert len(read_metrics(run, "start")) == 1 and "from step" not in again.stderr
    raised = run_ranks(*given, "data.bad_sample_budget=0.1")
    assert raised.returncode == 0, raised.stderr


def test_an_evaluation_that_was_killed_is_made_by_the_next_start(tiny, tmp_path):
    """That of the last step comes behind its checkpoint: the run is finished, and owes it."""
    given = ["pretrain", "--rank", str(tiny.config), "train.duration=4 steps", f"train.run={tmp_path / 'run'}"]
    killed = run_ranks("tests.pipeline.training.killed_when", "evaluating-4", *given)
    assert killed.returncode not in (0, 1, 2), killed.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-4" / "state.json").exists()
    assert read_metrics(tmp_path / "run", "heldout") == []
    done = run_ranks("beitforge", *given)
    assert done.returncode == 0 and "is finished: step 4 of 4" in done.stderr, done.stderr
    assert "evaluating after step 4" in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run", "heldout")] == [4]
    done = run_ranks("beitforge", *given)
    assert done.returncode == 0 and "evaluating" not in done.stderr, done.stderr
    shutil.rmtree(tmp_path / "run")
    done = run_ranks("beitforge", *given, "log.evaluation_share=0")
    assert done.returncode == 0 and "evaluating" not in done.stderr, done.stderr
    assert not read_metrics(tmp_path / "run", "heldout") and not read_metrics(tmp_path / "run", "due")


@pytest.mark.parametrize("stop_at", [0, 6])
def test_what_is_due_is_saved_before_it_is_judged(monkeypatch, stop_at):
    """The checkpoint of a step is complete before its evaluation; who was asked to stop is not kept waiting by one."""
    done: list[str] = []
    monkeypatch.setattr(loop, "_step", lambda _, __, step, *rest: (step + 1 == stop_at, 1.0, True))
    monkeypatch.setattr(loop, "_log", lambda _, __, step, *rest: done.append(f"log {step}"))
    monkeypatch.setattr(loop, "_count_bad_samples", lambda *_: done.append("bad samples"))
    monkeypatch.setattr(loop, "DevicePrefetcher", lambda *_: SimpleNamespace(waiting=None))
    monkeypatch.setattr(loop, "Meter", lambda *_: SimpleNamespace(started=0.0))
    engine: Any = SimpleNamespace(world=SimpleNamespace(device=None, first=True))
    components: Any = SimpleNamespace(
        beat=lambda *_: None,
        recovery=SimpleNamespace(must_roll_back=False),
        progress=SimpleNamespace(advance=lambda *_: None),
        bad_samples=None,
        evaluate=lambda step: done.append(f"judge {step}"),
        save=lambda step: done.append(f"save {step}") or True,
        saving=SimpleNamespace(finish=lambda: done.append("complete")),
    )
    schedule = loop.Schedule(first_step=4, steps=8, log_every=100, save_every=4, heldout_every=2)
    assert loop.train(engine, iter([]), schedule, components) == (stop_at or 8)
    before = ["log 6", "bad samples", "save 6"] if stop_at else ["complete", "judge 6"]
    last = [] if stop_at else ["log 8", "bad samples", "save 8", "complete", "judge 8"]
    assert done == before + last


def test_the_first_of_a_kind_may_take_three_times_as_long():
    """Also the first step behind a rollback; the second of a kind may not."""
    program = "import time; from beitforge.pipeline.cluster.watchdog import Watchdog\n"
    program += "with Watchdog(0.4, 0) as dog:\n"
    for beat in ("'step 0'", "'saving after step 3'", "'evaluation after step 3'", "'step 7', True"):
        program += f"    dog.beat({beat}); time.sleep(0.9)\n"
    program += "    print('alive', flush=True); dog.beat('step 8'); time.sleep(5)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "alive\n" and done.returncode == EXIT_HUNG, done.stderr
    assert "stands still: step 8" in done.stderr


def opened(run: Path) -> Recovery:
    return Recovery(run, Faults(max_skipped=3, max_returns=1), first=True, save_every=1, global_batch=8)


def test_a_start_in_a_row_of_faults_goes_on_counting(tmp_path):
    """A checkpoint lies between two updates left out: the restarted run goes back where an unbroken one does."""
    first = opened(tmp_path)
    first.begin(0)
    for step in (3, 4):
        first.skipped(Fault(step, "loss", [(1, "node")]))
    again = opened(tmp_path)
    again.begin(5)
    assert again.consecutive == first.consecutive and not again.must_roll_back
    again.skipped(Fault(5, "loss", []))
    assert again.must_roll_back and again.rollback_before() == 3
    again.record_rollback(to=2)
    behind = opened(tmp_path)
    behind.begin(6)
    assert behind.consecutive == [] and behind.rollbacks == again.rollbacks
    for step in (6, 7, 8):
        behind.skipped(Fault(step, "loss", []))
    with pytest.raises(ValueError, match="going back 1 times did not help"):
        behind.rollback_before()


def test_what_is_done_again_does_not_count_twice(tmp_path):
    """Killed behind a fault, started before it: then the step was done, or it fails again and says so."""
    first = opened(tmp_path)
    first.begin(0)
    for step in (3, 4):
        first.skipped(Fault(step, "loss", []))
    opened(tmp_path).begin(2)
    late = opened(tmp_path)
    late.begin(5)
    assert late.consecutive == []


@pytest.mark.parametrize("form", ["f", "d"])
def test_numbers_survive_bit_for_bit(form):
    numbers = [0.0, -0.0, 1.5, float("inf"), -float("inf"), 2.0**-140]
    assert str(from_hex(form, to_hex(form, numbers))) == str(numbers)
    assert str(from_hex(form, to_hex(form, [float("nan")]))) == "[nan]"
    with pytest.raises(ValueError):
        from_hex(form, "abc")
    with pytest.raises(ValueError):
        from_hex(form, "abcd")
    assert json.loads(json.dumps(to_hex(form, numbers))) == to_hex(form, numbers)
