"""The one training loop, for tokenizer and encoder. Batches and the objective come in as arguments.

Must not know the model, shards or any stage.
"""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from beitforge.pipeline.console import say
from beitforge.pipeline.distributed.collectives import all_gather_objects, all_gather_values, all_max, all_sum
from beitforge.pipeline.distributed.device import memory_bytes
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.errors import SharedError
from beitforge.pipeline.runs.folder import BadSamples
from beitforge.pipeline.training.device_timer import DeviceTimer
from beitforge.pipeline.training.metrics import Metrics, Reporter
from beitforge.pipeline.training.monitor import Monitor
from beitforge.pipeline.training.prefetch import Batch, DevicePrefetcher
from beitforge.pipeline.training.recovery import Fault, Recovery
from beitforge.pipeline.training.sample_log import SampleLog


class Saving(Protocol):
    """What the loop needs of the run's checkpoints (pipeline.checkpoints.saver.Saver)."""

    @property
    def open(self) -> bool: ...
    @property
    def busy(self) -> bool: ...
    def finish(self) -> None: ...


Objective = Callable[[Callable, Any, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of one training, in optimizer steps. `flops`: of one sample; `peak`: of one device, 0 if unknown."""

    first_step: int
    steps: int
    log_every: int
    save_every: int
    heldout_every: int
    flops: float = 0.0
    peak: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Components:
    """What a training is made of. hosts: of every rank. monitor, bad_samples: of rank 0 alone; positions: where they
    are logged.

    save: False when the weights are not finite, and nothing was saved. beat: told what comes next, at every step.
    """

    objective: Objective
    rate: Callable[[int], float]
    metrics: Metrics
    progress: Reporter
    hosts: list[str]
    recovery: Recovery
    monitor: Monitor | None
    bad_samples: BadSamples | None
    positions: SampleLog | None
    evaluate: Callable[[int], None]
    save: Callable[[int], bool]
    saving: Saving
    stop: Callable[[], str]
    beat: Callable[[str], None]


@dataclass
class Meter:
    """Sums since the last log line; tensors stay on the device until they are read."""

    engine: Engine
    waiting: DeviceTimer
    totals: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    started: float = field(default_factory=time.perf_counter)
    bad: list = field(default_factory=list)
    forward: DeviceTimer = field(init=False)

    def __post_init__(self) -> None:
        self.forward = DeviceTimer(self.engine.world.device)

    def add(self, measures: dict[str, Tensor]) -> None:
        for name, value in measures.items():
            value = value.detach().float()
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.count += 1

    def read(self) -> tuple[dict[str, float], list[list[float]]]:
        """Means over ranks and micro batches, and of every rank the seconds forward, the share of time it waited for
        data, and its memory in bytes; starts anew."""
        names = sorted(self.totals)
        seconds = time.perf_counter() - self.started
        waited = self.waiting.read() / max(seconds, 1e-9)
        local = [*(self.totals[name] for name in names), torch.tensor(waited)]
        stacked = torch.stack([value.to(self.engine.world.device, torch.float32) for value in local])
        means = (all_sum(stacked) / self.engine.world.size).tolist()
        result = {name: mean / self.count for name, mean in zip(names, means, strict=False)}
        result["data_wait_share"] = means[-1]
        result["seconds"] = seconds
        memory = float(memory_bytes(self.engine.world.device))
        ranks = all_gather_values([self.forward.read(), waited, memory], self.engine.world)
        self.totals, self.count, self.started = {}, 0, time.perf_counter()
        return result, ranks


def train(engine: Engine, batches: Iterator[Batch], plan: Schedule, parts: Components) -> int:
    """Train from plan.first_step on; returns the number of steps done in all: less than plan.steps when stopped, or
    when parts.recovery must go back.

    Raises SharedError when the budget of bad samples is spent.
    """
    feed = DevicePrefetcher(batches, engine.world.device)
    meter = Meter(engine, feed.waiting)
    for step in range(plan.first_step, plan.steps):
        parts.beat(f"step {step}")
        stopping, norm, made = _step(engine, feed, step, meter, parts)
        done = step + 1
        if not made and parts.recovery.must_roll_back:
            return done
        last = done == plan.steps or stopping
        parts.progress.advance(1)
        if (done % plan.log_every == 0 or done == 1 or last) and meter.count:
            _log(engine, plan, done, norm, meter, parts)
            _settle_bad(engine, meter, parts.bad_samples)
        paused = time.perf_counter()
        if plan.heldout_every and (done % plan.heldout_every == 0 or done == plan.steps):
            parts.beat(f"held-out evaluation after step {done}")
            parts.evaluate(done)
        if done % plan.save_every == 0 or last:
            parts.beat(f"saving after step {done}")
            if not parts.save(done):
                _left_out(engine, parts, step, "weights", False)
                return done
        meter.started += time.perf_counter() - paused  # neither is training time
        if stopping:
            return done
    return plan.steps


def _step(
    engine: Engine, feed: DevicePrefetcher, step: int, meter: Meter, parts: Components
) -> tuple[bool, Tensor | float, bool]:
    """One optimizer step: whether to stop after it, the gradient's norm, and whether the update was made."""
    broken = torch.zeros((), device=engine.world.device)
    measured, samples = [], []
    for micro in range(engine.setup.accumulation):
        if micro:
            engine.accumulate()
        batch, measures = _micro_step(engine, feed, parts.objective, step, meter)
        broken = torch.maximum(broken, (~torch.isfinite(measures["loss"])).float())
        measured.append(measures)
        samples += batch.samples.tolist() if parts.positions is not None else []
    mine = broken.item()
    stopping, not_finite, busy = all_max([float(bool(parts.stop())), mine, float(parts.saving.busy)], engine.world)
    if parts.saving.open and not busy:
        parts.saving.finish()
    norm, made = engine.step(parts.rate(step))
    if made:
        parts.recovery.update_applied()
    if not not_finite:
        for measures in measured:
            meter.add(measures)
    if not_finite or not (made or engine.scales_loss):
        _left_out(engine, parts, step, "loss" if not_finite else "gradient", bool(mine))
    if parts.positions is not None:
        parts.positions.write(step, samples)
    return bool(stopping), norm, made


def _micro_step(
    engine: Engine, feed: DevicePrefetcher, objective: Objective, step: int, meter: Meter
) -> tuple[Batch, dict[str, Tensor]]:
    """Forward and backward of one micro batch; returns it and its loss with what else was measured."""
    batch, moved = feed.next()
    meter.bad += batch.bad
    meter.forward.start()
    loss, measures = objective(engine.model, moved, step)
    meter.forward.stop()
    engine.backward(loss)
    feed.prefetch()
    return batch, {"loss": loss.detach(), **measures}


def _left_out(engine: Engine, parts: Components, step: int, what: str, mine: bool) -> None:
    """All ranks: write down that an update was not made, and whose loss it was, where it was a loss (`mine`)."""
    seen = all_gather_objects((engine.world.rank, socket.gethostname()) if mine else None, engine.world)
    line = parts.recovery.skipped(Fault(step, what, [rank for rank in seen if rank is not None]))
    parts.metrics.write(step + 1, "skip", {"row": float(len(parts.recovery.consecutive))})
    if engine.world.first:
        say(line)


def _log(engine: Engine, plan: Schedule, done: int, norm: Tensor | float, meter: Meter, parts: Components) -> None:
    """One line of metrics.jsonl, and the note beside the bar."""
    samples = meter.count * engine.setup.micro_batch * engine.world.size
    values, ranks = meter.read()
    speed = samples / values.pop("seconds")
    values |= {"lr": parts.rate(done - 1), "gradient_norm": float(norm), "images_per_second": speed}
    values["memory_bytes"] = int(ranks[engine.world.rank][2])
    if plan.flops and plan.peak:
        values["mfu"] = speed * plan.flops / (plan.peak * engine.world.size)
    if parts.monitor is not None:
        forward, waits = ([rank[i] for rank in ranks] for i in range(2))
        values |= parts.monitor.check(done, values["loss"], forward, waits)
    parts.metrics.write(done, "train", values)
    parts.metrics.write_ranks(done, parts.hosts, ranks)
    note = f"loss {values['loss']:.4f}, {speed:.0f} images/s, data wait {values['data_wait_share']:.0%}"
    parts.progress.advance(0, note)


def _settle_bad(engine: Engine, meter: Meter, bad_samples: BadSamples | None) -> None:
    """Bring every rank's substitutions together; stop all ranks when the budget is spent."""
    if not all_max([float(len(meter.bad))], engine.world)[0]:
        return
    everything = [sample for samples in all_gather_objects(meter.bad, engine.world) for sample in samples]
    meter.bad = []
    complaint = ""
    if bad_samples is not None:
        bad_samples.add(everything)
        complaint = bad_samples.over_budget() if bad_samples.exhausted else ""
    if all_max([float(bool(complaint))], engine.world)[0]:
        raise SharedError(complaint or "the budget of bad samples is spent; the first rank says which")
