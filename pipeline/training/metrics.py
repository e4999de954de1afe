"""What a run reports: metrics.jsonl, ranks.json, TensorBoard, Weights & Biases, and the progress line.

Must not know model, shards or any stage.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from beitforge.pipeline.config.loading import to_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.folder import write_whole
from beitforge.pipeline.runs.jsonl import end_cut_line
from beitforge.pipeline.runs.recorded import to_hex
from beitforge.shards.errors import about_file

_STEPS = 10_000  # of one line: a line has a length that readers take


class Reporter(Protocol):
    """A progress bar (shards.progress.Progress)."""

    def advance(self, count: int = 1, note: str = "") -> None: ...


class Metrics:
    """Appends lines to metrics.jsonl, and what they say to TensorBoard and Weights & Biases, where the config asks for
    them; on ranks other than the first it does nothing."""

    def __init__(self, run: Path, first: bool, config: Config):
        """Raises ConfigError where Weights & Biases cannot be used."""
        self.run, self.first = run, first
        self.writer: Any = None
        self.board: Any = None
        if first:
            run.mkdir(parents=True, exist_ok=True)
            if config.log.wandb:
                self.board = _board(run, config.log.wandb, to_dict(config))
            end_cut_line(run / "metrics.jsonl")
            self.file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
            if config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line: {"step", "kind", "time", …values}. Kinds: train · due (an evaluation, whose lines follow if there
        is time for it) · heldout · new_view · seen_view · survey · test · start · skip · return; `write_steps` has
        one more."""
        if not self.first:
            return
        self._line(step, kind, values)
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)
        if self.board is not None:
            # steps as a value of their own: Weights & Biases' may not go back, as a run's do that is started again
            self.board.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def write_steps(self, first: int, world: int, losses: list[float], norms: list[float]) -> None:
        """A line of the kind steps: every bit of loss and gradient norm of each step from `first` on, for `replay`."""
        for begin in range(0, len(norms) if self.first else 0, _STEPS):
            part = slice(begin, begin + _STEPS)
            packed = {"losses": to_hex("f", losses[part]), "gradient_norms": to_hex("d", norms[part])}
            last = first + begin + len(norms[part]) - 1
            self._line(last, "steps", {"first": first + begin, "world": world, **packed})

    def _line(self, step: int, kind: str, values: Mapping[str, float | str]) -> None:
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        with about_file(self.file.name):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """Return when every line is on disk, whatever happens to the machine."""
        if self.first:
            with about_file(self.file.name):
                os.fsync(self.file.fileno())
            if self.writer is not None:
                self.writer.flush()

    def write_ranks(self, step: int, hosts: list[str], ranks: list[list[float]]) -> None:
        """ranks.json, where every rank stands: seconds forward, share of time it waited for data, memory in bytes."""
        if not self.first:
            return
        rows = [
            {"rank": rank, "host": host, "data_wait": waited, "forward_seconds": forward, "memory_bytes": int(memory)}
            for rank, (host, (forward, waited, memory)) in enumerate(zip(hosts, ranks, strict=True))
        ]
        content = {"step": step, "time": round(time.time(), 3), "ranks": rows}
        write_whole(self.run / "ranks.json", json.dumps(content) + "\n")

    def close(self) -> None:
        """Flush and close everything."""
        if self.first:
            self.file.close()
            if self.writer is not None:
                self.writer.close()
            if self.board is not None:
                self.board.finish()


def _board(run: Path, project: str, settings: dict) -> Any:
    """The run at Weights & Biases, or on disk with WANDB_MODE=offline: one for every run folder, however often it is
    started. Raises ConfigError."""
    cure = "or set log.wandb= to go without"
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"log.wandb is {project}, and wandb is not installed: pip install wandb, {cure}") from error
    name = run / "wandb.id"
    if not name.exists():
        write_whole(name, uuid.uuid4().hex[:8] + "\n")
    quiet = wandb.Settings(console="off")
    try:
        board = wandb.init(
            project=project,
            dir=str(run),
            id=name.read_text(encoding="utf-8").strip(),
            name=run.resolve().name,
            resume="allow",
            config=settings,
            settings=quiet,
        )
    except wandb.Error as error:
        words = " ".join(str(error).split())
        raise ConfigError(
            f"log.wandb is {project}, and Weights & Biases says: {words}; log in (wandb login), keep it on disk "
            f"(WANDB_MODE=offline), {cure}"
        ) from error
    board.define_metric("step")
    board.define_metric("*", step_metric="step")
    return board


def timed(batches: Iterator[Any], waits: list[float]) -> Iterator[Any]:
    """Pass batches on; append the seconds each was waited for to `waits`."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        waits.append(time.perf_counter() - started)
        yield batch
