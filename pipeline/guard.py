"""What a run does about a loss or a gradient that is not finite: leave the update out, go back, or give up.

Decides from what all ranks have agreed on, and from skipped.jsonl in the run folder, so a restarted run decides the
same. A step whose update is left out counts like any other: its samples are seen, the schedule moves on. Must not know
torch, model, shards or any stage.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError, Faults
from pipeline.run import end_cut_line


@dataclass(frozen=True)
class Return:
    """The run went back to the checkpoint of step `to`, and on with step `on`: what lies between is stepped over."""

    to: int
    on: int


@dataclass(frozen=True)
class Culprit:
    """Where a number is not finite. what: loss, gradient or weights; rank: -1 where all ranks share it."""

    rank: int
    host: str
    what: str


class Guard:
    """Counts updates left out in a row. The same on every rank; rank 0 writes."""

    def __init__(self, run: Path, faults: Faults, *, first: bool, save_every: int, global_batch: int):
        """save_every: steps between checkpoints, the progress after which earlier returns are forgotten."""
        self.path, self.faults, self.first = run / "skipped.jsonl", faults, first
        self.save_every, self.global_batch = save_every, global_batch
        self.returns = read_returns(run)
        self.row: list[tuple[int, list[Culprit]]] = []
        self.ruined = False  # by an update that was made: the weights themselves are not finite
        if first:
            end_cut_line(self.path)

    def good(self) -> None:
        """An update was made."""
        self.row.clear()

    def skipped(self, step: int, culprits: list[Culprit]) -> str:
        """The update of a step was left out, or has ruined the weights; returns a line that says so."""
        self.row.append((step, culprits))
        self.ruined = any(culprit.what == "weights" for culprit in culprits)
        first, last = step * self.global_batch, (step + 1) * self.global_batch - 1
        who = [{"rank": culprit.rank, "host": culprit.host, "what": culprit.what} for culprit in culprits]
        self._write({"kind": "skip", "step": step, "samples": [first, last], "seen": who})
        return f"step {step} left out, samples {first}–{last}: {_named(culprits)}"

    @property
    def must_go_back(self) -> bool:
        return self.ruined or len(self.row) >= self.faults.max_skipped

    def before(self) -> int:
        """The checkpoint to go back to is the newest of a step less than this: one with other weights than those that
        failed, or, where the last return brought nothing, an older one. Raises ConfigError when enough were made."""
        start = self.row[0][0] + (self.ruined and len(self.row) == 1)
        idle, on = 0, start
        for made in reversed(self.returns):
            if on - made.on >= self.save_every:
                break
            idle, on = idle + 1, made.to
        if idle >= self.faults.max_returns:
            raise ConfigError(self.report(f"going back {idle} times did not help"))
        return min([start, *(made.to for made in self.returns[len(self.returns) - idle :])])

    def went_back(self, to: int) -> Return:
        """Write down a return to the checkpoint of step `to`; the run goes on behind the last step left out."""
        made = Return(to, self.row[-1][0] + 1)
        samples = [to * self.global_batch, made.on * self.global_batch - 1]
        self._write({"kind": "return", "to": to, "on": made.on, "samples": samples})
        self.returns.append(made)
        self.row.clear()
        self.ruined = False
        return made

    def report(self, why: str) -> str:
        """The line that ends the run."""
        start, culprits = self.row[0]
        samples = f"samples {start * self.global_batch}–{(self.row[-1][0] + 1) * self.global_batch - 1}"
        return (
            f"{_named(culprits)} at step {start}, the first of {len(self.row)} in a row ({samples}): {why}; look at "
            f"these samples (see {self.path}), or begin a new train.run folder with a lower optimizer.lr, from an "
            f"export of this run (train.init) or anew"
        )

    def _write(self, values: dict) -> None:
        if self.first:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _named(culprits: list[Culprit]) -> str:
    return ", ".join(
        f"the {one.what} of rank {one.rank} on {one.host} is not finite"
        if one.rank >= 0
        else f"the {one.what} is not finite"
        for one in culprits
    )


def read_returns(run: Path) -> list[Return]:
    """The returns a run has made, in their order."""
    path, found = run / "skipped.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                if values["kind"] == "return":
                    found.append(Return(values["to"], values["on"]))
    return found


def usable(returns: list[Return], step: int) -> bool:
    """Whether a checkpoint of this step belongs to the run: not one that a return left behind."""
    return not any(made.to < step < made.on for made in returns)


def goes_on(returns: list[Return], step: int) -> int:
    """The step a run goes on with from a checkpoint of `step`: behind what a return stepped over."""
    for made in returns:
        if made.to <= step < made.on:
            step = made.on
    return step
