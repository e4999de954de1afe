"""Steps of a run done again from one of its checkpoints, and held against what the run wrote down, bit for bit.

A run's data, views, masks and weights are functions of its settings and one integer, so that the same processes on
sound hardware compute the same numbers. The loop is the run's own; of the run folder nothing is changed. Must not know
the model, reports or any stage.
"""

import contextlib
import math
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beitforge.pipeline.checkpoints import live_layout, zero_layout
from beitforge.pipeline.checkpoints import saver as checkpoint
from beitforge.pipeline.checkpoints.choice import newest_whole
from beitforge.pipeline.cluster.watchdog import Watchdog
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import say
from beitforge.pipeline.data.batches import training_batches
from beitforge.pipeline.distributed.collectives import World, all_gather_objects, broadcast_object
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.errors import SharedError
from beitforge.pipeline.runs.checkpoints import STATE, State, candidates, step_of
from beitforge.pipeline.runs.recorded import Recorded, Step
from beitforge.pipeline.training.loop import Components, Objective, train
from beitforge.pipeline.training.metrics import Metrics
from beitforge.pipeline.training.recovery import Fault, Recovery, Rollback, read_rollbacks, resume_step, usable
from beitforge.pipeline.training.trainer import Job, decay_of, rate_of, schedule_of, state_of
from beitforge.shards.progress import Progress, Silent

_TOLD = 5  # differences that are printed of each kind


@dataclass(frozen=True)
class Span:
    """Steps after + 1 … until, counted as in metrics.jsonl and the names of checkpoints."""

    after: int
    until: int


@dataclass
class Replayed:
    """What came of it. differs: the first step whose numbers are not the recorded ones; 0: none. compared: recorded
    steps and checkpoints held against. losses: of every micro batch of a rank, by step. not_finite: steps whose loss
    or gradient was not, in order. bad: the samples that were replaced."""

    start: int
    differs: int = 0
    weights_differ: int = 0
    compared: int = 0
    losses: dict[int, list[float]] = field(default_factory=dict)
    not_finite: list[int] = field(default_factory=list)
    bad: list[Any] = field(default_factory=list)


class _Heard(Metrics):
    """Keeps what the loop logs."""

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}
        self.means: dict[tuple[int, int], dict[str, float]] = {}
        self._before = 0

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        if kind == "train":
            self.means[self._before, step] = values

    def write_steps(self, first: int, world: int, losses: list[float], norms: list[float]) -> None:
        self._before = first - 1
        pairs = enumerate(zip(losses, norms, strict=True), start=first)
        self.steps |= {number: Step(loss=loss, norm=norm, world=world) for number, (loss, norm) in pairs}

    def write_ranks(self, step: int, hosts: list[str], ranks: list[list[float]]) -> None:
        """Nothing: a replay has no ranks.json."""


class _Passive(Recovery):
    """Goes where the run went: an update is left out again, nothing else is decided."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch, self.consecutive, self.rollbacks = global_batch, [], []

    @property
    def must_roll_back(self) -> bool:
        return False

    def skipped(self, fault: Fault) -> str:
        first = fault.step * self.global_batch
        return (
            f"step {fault.step + 1}: {fault}, samples {first}–{first + self.global_batch - 1}; its update is left out"
        )


class _Bad:
    """Keeps the bad samples; has no budget."""

    exhausted = False

    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def add(self, samples: list[Any]) -> None:
        self.found += samples

    def over_budget(self) -> str:
        return ""


class _Unsaved:
    """Stands for a saver that never has a checkpoint open."""

    open = busy = False

    def finish(self) -> None:
        """Nothing is open."""


def rollbacks_before(run: Path, until: int) -> list[Rollback]:
    """Those that lie behind the run when it reaches step `until`."""
    return [rollback for rollback in read_rollbacks(run) if rollback.on < until]


def fits(run: Path, span: Span) -> Callable[[int], bool]:
    """Whether a replay of the span may begin with the checkpoint of a step."""
    rollbacks = rollbacks_before(run, span.until)
    return lambda step: step <= span.after and usable(rollbacks, step)


def replay(config: Config, job: Job, world: World, recorded: Recorded, span: Span) -> Replayed:
    """Do the steps again; every rank calls it, the first says what was found. `recorded`: the same on all.

    Raises ConfigError when there is no checkpoint to begin with, or when it belongs to other data.
    """
    tell = say if world.first else lambda _: None
    rollbacks = rollbacks_before(job.run, span.until)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.faults.hang_seconds, world.rank))
        engine = Engine(job.module, job.groups, job.setup, world)
        steps = job.duration.steps(job.source.samples, job.setup.global_batch)
        schedule = schedule_of(config, job, 0, steps, world)
        if span.until > steps:
            raise SharedError(f"step {span.until} is none of this run's: it has {steps}")
        state = checkpoint.resume(engine, job.run, state_of(config, job, engine, 0), tell, fits(job.run, span))
        if state is None and span.after >= schedule.save_every:
            raise SharedError(_no_beginning(job.run, span.after))
        result, heard = Replayed(state.step if state else 0), _Heard()
        origin = f"checkpoint step-{result.start}" if state else "the weights that the run began with"
        tell(f"replaying steps {result.start + 1}–{span.until} of {job.run} from {origin}, as {_processes(world.size)}")
        _tell_of_others(recorded, result.start, span.until, world, tell)
        saved = _to_compare(job.run, result.start, span.until, rollbacks, world)
        bar = Progress("replay", span.until, "step", done=result.start)
        components = Components(
            objective=_watched(job.objective(engine, steps), result),
            rate=rate_of(job, steps),
            decay=decay_of(job, steps),
            metrics=heard,
            progress=stack.enter_context(bar) if world.first else Silent(),
            hosts=[""] * world.size,
            recovery=_Passive(job.setup.global_batch),
            monitor=None,
            bad_samples=_Bad(result.bad) if world.first else None,
            sample_log=None,
            evaluate=lambda _: None,
            save=lambda done: _weights(engine, saved.get(done), done, result, tell),
            saving=_Unsaved(),
            stop=lambda: "",
            beat=watchdog.beat,
        )
        for begin, end in _segments(result.start, span.until, rollbacks, sorted(saved)):
            part = replace(schedule, first_step=begin, steps=end, heldout_every=0)
            train(engine, _batches(config, job, world, begin, end), part, components)
    _numbers(heard, recorded, result, span, tell)
    return result


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def _no_beginning(run: Path, after: int) -> str:
    there = sorted(step_of(folder) for folder in candidates(run))
    which = f"the first of those there is step-{there[0]}, the last step-{there[-1]}" if there else "there is none"
    return (
        f"{run} has no complete checkpoint at or before step {after} any more: {which}. checkpoint.keep_every keeps "
        f"some for good; --from 0 does the run again from its beginning"
    )


def _batches(config: Config, job: Job, world: World, begin: int, end: int) -> Any:
    batch, micro = job.setup.global_batch, job.setup.micro_batch
    return training_batches(
        config,
        job.source,
        first_sample=begin * batch,
        global_batch=batch,
        micro=micro,
        rank=world.rank,
        world=world.size,
        steps=end - begin,
    )


def _segments(start: int, until: int, rollbacks: list[Rollback], saved: list[int]) -> list[tuple[int, int]]:
    """The steps, counted from 0, that the run went through from a checkpoint on, in parts that end where a checkpoint
    was saved: those that a rollback stepped over are left out."""
    found, step = [], start
    ends = [until, *saved, *(rollback.to for rollback in rollbacks)]
    while step < until:
        step = resume_step(rollbacks, step)
        end = min(end for end in ends if end > step)
        found.append((step, end))
        step = end
    return found


def _to_compare(
    run: Path, start: int, until: int, rollbacks: list[Rollback], world: World
) -> dict[int, tuple[Path, State] | str]:
    """By step, folder and state of the complete checkpoints behind the start, or what is wrong with one that was."""
    found: dict[int, tuple[Path, State] | str] = {}
    saved = [step_of(folder) for folder in reversed(candidates(run)) if (folder / STATE).exists()]
    for step in broadcast_object([s for s in saved if start < s <= until and usable(rollbacks, s)], world):
        problems: list[str] = []
        try:
            there = newest_whole(run, world, problems.append, partial(operator.eq, step))
        except SharedError:
            there = None
        problem = broadcast_object(problems[0].partition(";")[0] if problems else "", world)
        found[step] = there or problem
    return found


def _watched(objective: Objective, result: Replayed) -> Objective:
    """The objective, and the loss of every micro batch kept."""

    def watched(model: Callable, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, measures = objective(model, batch, step)
        result.losses.setdefault(step + 1, []).append(float(loss.detach()))
        return loss, measures

    return watched


def _weights(
    engine: Engine, there: tuple[Path, State] | str | None, done: int, result: Replayed, tell: Callable[[str], None]
) -> bool:
    """Hold weights and optimizer state against a checkpoint's, if there is one of this step; always True."""
    if there is None:
        return True
    if isinstance(there, str):
        result.weights_differ = result.weights_differ or done
        tell(there)
        return True
    folder, state = there
    found = _apart(
        engine, zero_layout.open_checkpoint(folder, state.zero_stage, state.groups or engine.groups, state.files)
    )
    told = [f"{line}, on rank {engine.world.rank}" for line in found[:_TOLD]]
    everyone = all_gather_objects((told, len(found)), engine.world)
    lines, total = [line for lines, _ in everyone for line in lines], sum(count for _, count in everyone)
    result.compared += 1
    if not total:
        tell(f"checkpoint {folder.name}: weights and optimizer state are the recorded ones, bit for bit")
        return True
    result.weights_differ = result.weights_differ or done
    more = f"; and {total - _TOLD} more" if total > _TOLD else ""
    tell(f"checkpoint {folder.name} differs: {'; '.join(lines[:_TOLD])}{more}")
    return True


@torch.no_grad()
def _apart(engine: Engine, source: zero_layout.CheckpointFiles) -> list[str]:
    """What of this rank's masters and optimizer state is not the checkpoint's, in words."""
    found = []
    for name, piece in live_layout.engine_pieces(engine):
        there = {key: torch.empty_like(value, device="cpu") for key, value in piece.values.items()}
        source.fill(name, zero_layout.Piece(piece.start, there))
        for key, value in piece.values.items():
            here, kept = value.cpu(), there[key]
            unlike = here.view(torch.uint8).view(len(here), -1) != kept.view(torch.uint8).view(len(kept), -1)
            count = int(unlike.any(dim=1).sum())
            if count:
                place = int(unlike.any(dim=1).nonzero()[0])
                values = f"first {float(here[place])!r} here and {float(kept[place])!r} recorded"
                found.append(f"{key} of {name} in {count} of {len(here)} numbers, {values}")
    return found


def _tell_of_others(recorded: Recorded, start: int, until: int, world: World, tell: Callable[[str], None]) -> None:
    """Say that other bits are to be expected, where another number of processes did the steps."""
    worlds = {step.world for number, step in recorded.steps.items() if start < number <= until}
    for count in sorted(worlds - {world.size})[:1]:
        tell(
            f"recorded by {_processes(count)}, replayed by {world.size}: sums are taken in another order, so that last "
            f"bits will differ; NPROC={count} compares bit for bit"
        )


def _numbers(heard: _Heard, recorded: Recorded, result: Replayed, span: Span, tell: Callable[[str], None]) -> None:
    """Hold every step's loss and norm against the recorded ones."""
    apart: dict[int, str] = {}
    known = [number for number in sorted(heard.steps) if number in recorded.steps]
    for number in known:
        here, there = heard.steps[number], recorded.steps[number]
        pairs = [("loss", here.loss, there.loss, "f"), ("gradient norm", here.norm, there.norm, "d")]
        words = [_difference(*pair) for pair in pairs if pair[2] is not None]
        if any(words):
            apart[number] = ", ".join(filter(None, words))
    for (before, last), values in heard.means.items():  # of a run that wrote down no single losses
        mean = recorded.means.get((before, last), {}).get("loss")
        single = last in recorded.steps and recorded.steps[last].loss is not None
        if isinstance(mean, float) and not single and (told := _difference("mean loss", values["loss"], mean, "d")):
            mean_words = f"{told} over steps {before + 1}–{last}"
            apart[last] = f"{apart[last]}, {mean_words}" if last in apart else mean_words
    result.compared += len(known)
    result.differs = min(apart, default=0)
    finite = {number: math.isfinite((step.loss or 0.0) + (step.norm or 0.0)) for number, step in heard.steps.items()}
    result.not_finite = sorted(number for number, whole in finite.items() if not whole)
    for number in sorted(apart)[:_TOLD]:
        tell(f"step {number} differs: {apart[number]}")
    if apart:
        tell(f"{len(apart)} of {len(known)} recorded steps differ, the first is step {min(apart)}")
    elif known:
        tell(f"steps {known[0]}–{known[-1]}: loss and gradient norm of {len(known)} recorded steps, bit for bit")
    if missing := [number for number in range(span.after + 1, span.until + 1) if number not in recorded.steps]:
        tell(f"{len(missing)} of the steps asked for are not recorded, the first is step {missing[0]}")


def _difference(what: str, here: float | None, there: float | None, form: str) -> str:
    """In words; '' where both are the same bits, or both are no number."""
    assert here is not None and there is not None, "compared where both are known"
    same = struct.pack(f"<{form}", here) == struct.pack(f"<{form}", there)
    return "" if same or (math.isnan(here) and math.isnan(there)) else f"{what} {here!r} here and {there!r} recorded"
