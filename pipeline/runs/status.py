"""A run followed while it goes, from its folder alone: how it stands, how fast it is, when it last wrote.

Nothing is written and nothing locked, and no one is asked to notify: files are looked at again, which also works over a
shared file system. Must not know HTML, torch or any stage.
"""

import itertools
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from beitforge.pipeline.cluster.signals import ENDED_FILE, FINISHED, STOP_FILE, read_ended
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reading import OddFile, open_regular
from beitforge.pipeline.runs.checkpoints import STATE, State, candidates, newest
from beitforge.pipeline.runs.formatting import duration
from beitforge.pipeline.runs.jsonl import JsonlTail, count, metric_line, value
from beitforge.pipeline.runs.record import json_object

_LEAST_SILENCE = 60.0  # seconds without a word before a run is called silent
_GAPS = 3.0  # and this many times the longest pause it made before
_RECENT = 30  # logged intervals that rate and remaining time are told from
_SMALL = ("config.yaml", "environment.json", "probe.json", "ranks.json", ENDED_FILE, STOP_FILE)
_WORDS = ("ranks.json",)  # of these, what the training itself writes while it goes
Stamp = tuple[int, int, int]
_NONE, _ODD = (0, 0, 0), (-1, 0, 0)  # of a file that is not there, and of one that is not read


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How a run stands. state: waiting · started · running · silent · stopped · finished; `told`: the same in words.
    `silent`: seconds since it last wrote, NaN when it never did. `left`: seconds to the end of the whole training at
    the recent rate, NaN when it does not go on or nobody knows."""

    state: str
    summary: str
    step: int
    planned: int
    silent: float
    left: float


@dataclass
class Follower:
    """What is known of a run by the last `look`. `changes` counts what was new. trouble: why the folder cannot be read
    just now; refused: what is wrong with its config."""

    run: Path
    config: Config | None = None
    ranks: dict = field(default_factory=dict)
    ended: tuple[int, str] | None = None
    saved: State | None = None
    saved_at: float = 0.0  # seconds since 1970
    passed_over: list[str] = field(default_factory=list)
    stopping: bool = False
    trouble: str = ""
    refused: str = ""
    changes: int = 0

    def __post_init__(self) -> None:
        self.metrics = JsonlTail(self.run / "metrics.jsonl", self.run, metric_line)
        self.bad_samples = JsonlTail(self.run / "bad_samples.jsonl", self.run)
        self._stamps: dict[str, Stamp] = {}
        self._saves: list[tuple[str, Stamp]] = []
        self._heard = 0.0  # on the monotonic clock: when something new was first seen
        self._looked = False

    @property
    def lines(self) -> list[dict]:
        """Those of metrics.jsonl, in file order."""
        return self.metrics.lines

    @property
    def notes(self) -> list[str]:
        """What is odd about the files of lines."""
        return [*self.metrics.notes, *self.bad_samples.notes]

    def refresh(self) -> bool:
        """Read what is new; whether anything is. What cannot be read for a moment stays as it was."""
        before = self.trouble
        spoke = changed = False
        self.trouble = ""
        try:
            spoke = self.metrics.read()
            spoke |= self.bad_samples.read()
            written = self._small_files()
            changed = bool(written)
            spoke |= any(name in _WORDS for name in written)
            spoke |= self._checkpoints()
        except FileNotFoundError:
            changed = True  # a checkpoint was removed meanwhile: again at the next look
        except OSError as error:
            self.trouble = f"{error.filename or self.run}: {error.strerror}"
        new = spoke or changed or self.trouble != before
        self.changes += new
        if not self._looked:
            self._heard = time.monotonic() - max(0.0, time.time() - self._last_word())
        elif spoke:
            self._heard = time.monotonic()
        self._looked = True
        return new

    def _small_files(self) -> set[str]:
        """Read those that are not as they were; their names."""
        now = {name: _stamp(self.run / name, self.run) for name in _SMALL}
        changed = {name for name, stamp in now.items() if stamp != self._stamps.get(name, _NONE)}
        if "ranks.json" in changed:
            self.ranks = json_object(self.run / "ranks.json", [], self.run)
        if ENDED_FILE in changed:
            self.ended = read_ended(self.run)
        if "config.yaml" in changed:
            self.config, self.refused = None, ""
            try:
                self.config = (
                    load_config(str(self.run / "config.yaml"), [], self.run) if now["config.yaml"] != _NONE else None
                )
            except ConfigError as error:
                self.refused = str(error)
        self.stopping = now[STOP_FILE] != _NONE
        self._stamps = now
        return changed

    def _checkpoints(self) -> bool:
        """Look for another newest checkpoint; whether there is one."""
        saves = [(folder.name, _stamp(folder / STATE, self.run)) for folder in candidates(self.run)[:3]]
        if saves == self._saves:
            return False
        passed_over: list[str] = []
        found = newest(self.run, passed_over.append)
        self.saved = found[1] if found else None
        self.saved_at = _stamp(found[0] / STATE, self.run)[2] / 1e9 if found else 0.0
        self._saves, self.passed_over = saves, passed_over
        return True

    def _last_word(self) -> float:
        """When the run last wrote, as it says itself: files that were copied are newer."""
        said = [value(self.lines[-1], "time"), value(self.ranks, "time")] if self.lines else []
        return max((when for when in said if math.isfinite(when)), default=time.time())

    def status(self) -> RunStatus:
        """How the run stands now."""
        lines = self.lines
        trained = [line for line in lines if line.get("kind") == "train"]
        starts = [line for line in lines if line.get("kind") == "start"]
        step = count(trained[-1], "step") if trained else 0
        planned = count(starts[-1], "steps") if starts else 0
        silent = time.monotonic() - self._heard if lines else float("nan")
        state, told = self._state(trained, step, planned, silent)
        goes_on = state in ("running", "started") and planned > step
        left = (planned - step) * seconds_a_step(lines) if goes_on else float("nan")
        return RunStatus(state=state, summary=told, step=step, planned=planned, silent=silent, left=left)

    def _state(self, trained: list[dict], step: int, planned: int, silent: float) -> tuple[str, str]:
        at = f"step {step:,} of {planned:,}" if planned else f"step {step:,}"
        if self.trouble or self.refused:
            return "waiting", f"cannot be read: {self.trouble or self.refused}"
        if not self.lines:
            return "waiting", self._waiting()
        if 0 < planned <= step or (self._said_end() and self.ended and self.ended[1] == FINISHED):
            return "finished", f"finished: {at}"
        if self._said_end() and self.ended:
            return "stopped", f"stopped at {at} ({self.ended[1] or 'asked to'}); the same command goes on"
        if self.lines[-1].get("kind") == "start":
            again = f"started again from step {count(self.lines[-1], 'step'):,}" if trained else "started"
            return "started", f"{again}, no step logged yet"
        usual = longest_pause(self.lines)
        if silent > max(_LEAST_SILENCE, _GAPS * usual):
            then = "an evaluation, and no word since:" if self.lines[-1].get("kind") == "due" else "no word:"
            return (
                "silent",
                f"{at}, then {then} killed, or hanging? Before, {duration(usual)} was the longest pause",
            )
        return "running", f"{at}, asked to stop" if self.stopping else at

    def _waiting(self) -> str:
        if self._stamps.get("config.yaml", _NONE) != _NONE:
            return "waiting: no line in metrics.jsonl yet"
        return "waiting: no run in this folder yet" if self.run.is_dir() else "waiting: this folder is not there yet"

    def _said_end(self) -> bool:
        """Whether RUN/ended is about the last start: a start without the launcher leaves the word of the one before."""
        return self.ended is not None and self._stamps[ENDED_FILE][2] >= self.metrics.changed_at


def longest_pause(lines: list[dict]) -> float:
    """Seconds, between lines of the last start; 0 with fewer than two."""
    times = [float(line["time"]) for line in _session(lines) if isinstance(line.get("time"), int | float)]
    return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


def seconds_a_step(lines: list[dict]) -> float:
    """By the clock, evaluations and saves and all, over the recent lines of the last start; NaN when there are none."""
    trained = [line for line in _session(lines) if line.get("kind") == "train" and "time" in line][-_RECENT - 1 :]
    if len(trained) < 2 or trained[-1]["step"] <= trained[0]["step"]:
        return float("nan")
    return float(trained[-1]["time"] - trained[0]["time"]) / (trained[-1]["step"] - trained[0]["step"])


def _session(lines: list[dict]) -> list[dict]:
    """The lines since the last start."""
    for place in range(len(lines) - 1, -1, -1):
        if lines[place].get("kind") == "start":
            return lines[place:]
    return lines


def _stamp(path: Path, run: Path) -> Stamp:
    """Which file it is, its bytes, and when it changed in nanoseconds; zeros when there is none.

    Opened first, since an open is what makes a client of a shared file system ask its server.
    """
    try:
        with open_regular(path, run) as file:
            status = os.fstat(file.fileno())
    except OddFile:
        return _ODD
    except (FileNotFoundError, NotADirectoryError):
        return _NONE
    return status.st_ino, status.st_size, status.st_mtime_ns
