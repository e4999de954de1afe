"""What a run does about a loss or a gradient that is not finite: skip the update, roll back, or stop.

Decides from what all ranks have agreed on, and from skipped.jsonl in the run folder, so a restarted run decides the
same. A step whose update is skipped counts like any other: its samples are seen, the schedule moves on. Must not know
torch, model, shards or any stage.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from beitforge.pipeline.config.settings import Faults
from beitforge.pipeline.errors import SharedError
from beitforge.pipeline.runs.jsonl import end_cut_line, read_lines
from beitforge.shards.errors import about_file

_NUMBERS = {"skip": ("step",), "return": ("to", "on"), "start": ("step",)}  # of the lines of skipped.jsonl


@dataclass(frozen=True)
class Rollback:
    """The run rolled back to the checkpoint of step `to` and resumed with step `on`; the steps between are skipped."""

    to: int
    on: int


@dataclass(frozen=True)
class Fault:
    """What was not finite at a step (loss, gradient or weights) and of which ranks, as far as one can tell: a gradient
    is known only summed over all of them."""

    step: int
    what: str
    ranks: list[tuple[int, str]]  # with their hosts

    def __str__(self) -> str:
        who = [f"the {self.what} of rank {rank} on {host} is not finite" for rank, host in self.ranks]
        return ", ".join(who) or f"the {self.what} is not finite"


class Recovery:
    """Counts consecutive skipped updates and decides on rollbacks. The same on every rank; rank 0 writes."""

    def __init__(self, run: Path, faults: Faults, *, first: bool, save_every: int, global_batch: int):
        """save_every: steps between checkpoints, the progress after which earlier rollbacks no longer count."""
        self.path, self.faults, self.first = run / "skipped.jsonl", faults, first
        self.save_every, self.global_batch = save_every, global_batch
        self.rollbacks = read_rollbacks(run)
        self.consecutive: list[Fault] = []  # of the updates left out just before
        self.weights_corrupted = False  # an update was applied and left non-finite weights
        if first:
            end_cut_line(self.path)

    def begin(self, step: int) -> None:
        """The run begins or resumes with `step`: what was left out just before it counts as if nothing had happened in
        between, what was left out from there on will be done again."""
        lines = _lines(self.path)
        self.consecutive = _left_out_before(lines, step)
        if lines:
            self._write({"kind": "start", "step": step})

    def update_applied(self) -> None:
        """Record an applied update: no fault is consecutive to the next."""
        self.consecutive.clear()

    def skipped(self, fault: Fault) -> str:
        """Record a step whose update was skipped or has corrupted the weights; returns a message for the log."""
        self.consecutive.append(fault)
        self.weights_corrupted = fault.what == "weights"
        first, last = fault.step * self.global_batch, (fault.step + 1) * self.global_batch - 1
        ranks = [{"rank": rank, "host": host} for rank, host in fault.ranks]
        self._write({"kind": "skip", "step": fault.step, "samples": [first, last], "what": fault.what, "ranks": ranks})
        look = f"`replay {self.path.parent} --step {fault.step + 1} --page OUT.html` shows them"
        return f"step {fault.step} left out, samples {first}–{last}: {fault}; {look}"

    @property
    def must_roll_back(self) -> bool:
        return self.weights_corrupted or len(self.consecutive) >= self.faults.max_skipped

    def rollback_before(self) -> int:
        """The step that the checkpoint to roll back to must precede: its weights differ from those that failed, and
        after a rollback without progress it is an older one. Raises SharedError after faults.max_returns of these."""
        start = self.consecutive[0].step + (self.weights_corrupted and len(self.consecutive) == 1)
        idle, on = 0, start
        for rollback in reversed(self.rollbacks):
            if on - rollback.on >= self.save_every:
                break
            idle, on = idle + 1, rollback.to
        if idle >= self.faults.max_returns:
            raise SharedError(self.report(f"going back {idle} times did not help"))
        return min([start, *(rollback.to for rollback in self.rollbacks[len(self.rollbacks) - idle :])])

    def record_rollback(self, to: int) -> Rollback:
        """Record a rollback to the checkpoint of step `to`; the run continues after the last skipped step."""
        rollback = Rollback(to, self.consecutive[-1].step + 1)
        samples = [to * self.global_batch, rollback.on * self.global_batch - 1]
        self._write({"kind": "return", "to": to, "on": rollback.on, "samples": samples})
        self.rollbacks.append(rollback)
        self.consecutive.clear()
        self.weights_corrupted = False
        return rollback

    def report(self, why: str) -> str:
        """The message of the error that ends the run."""
        start = self.consecutive[0].step
        samples = f"samples {start * self.global_batch}–{(self.consecutive[-1].step + 1) * self.global_batch - 1}"
        return (
            f"{self.consecutive[0]} at step {start}, the first of {len(self.consecutive)} in a row ({samples}): {why}; "
            f"look at these samples (see {self.path}), or begin a new train.run folder with a lower optimizer.lr, from "
            f"an export of this run (train.init) or anew"
        )

    def _write(self, values: dict) -> None:
        if self.first:
            with about_file(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _lines(path: Path) -> list[dict]:
    """What skipped.jsonl holds, in order; without lines that it cannot hold."""
    return read_lines(path, fits=_fits).lines


def _fits(line: dict) -> bool:
    """Whether a line has the numbers that are read of its kind."""
    return all(isinstance(line.get(name), int) for name in _NUMBERS.get(str(line.get("kind")), ("",)))


def _left_out_before(lines: list[dict], step: int) -> list[Fault]:
    """The faults of the updates left out in a row that ends just before `step`, in the run as it stands there: without
    those of steps that were done again after a start, or left behind by a rollback."""
    faults: dict[int, Fault] = {}
    for line in lines:
        if line["kind"] == "skip" and line["what"] != "weights":
            ranks = [(int(one["rank"]), str(one["host"])) for one in line["ranks"]]
            faults[line["step"]] = Fault(line["step"], line["what"], ranks)
        elif line["kind"] == "return":
            faults.clear()
        elif line["kind"] == "start":
            faults = {number: fault for number, fault in faults.items() if number < line["step"]}
    found: list[Fault] = []
    while step - 1 - len(found) in faults:
        found.insert(0, faults[step - 1 - len(found)])
    return found


def read_rollbacks(run: Path) -> list[Rollback]:
    """The rollbacks that a run has made, in order."""
    lines = _lines(run / "skipped.jsonl")
    return [Rollback(line["to"], line["on"]) for line in lines if line["kind"] == "return"]


def usable(rollbacks: list[Rollback], step: int) -> bool:
    """Whether a checkpoint of this step belongs to the run, and was not abandoned by a rollback."""
    return not any(rollback.to < step < rollback.on for rollback in rollbacks)


def resume_step(rollbacks: list[Rollback], step: int) -> int:
    """The step at which a run resumes from a checkpoint of `step`: after the steps that a rollback skipped."""
    for rollback in rollbacks:
        if rollback.to <= step < rollback.on:
            step = rollback.on
    return step
