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
from beitforge.pipeline.distributed.collectives import (
    all_gather_objects,
    all_gather_values,
    all_max,
    all_sum,
    device_values,
)
from beitforge.pipeline.distributed.device import memory_bytes
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.errors import SharedError
from beitforge.pipeline.training.device_timer import DeviceTimer
from beitforge.pipeline.training.metrics import Metrics, Reporter
from beitforge.pipeline.training.monitor import Monitor
from beitforge.pipeline.training.prefetch import Batch, DevicePrefetcher
from beitforge.pipeline.training.recovery import Fault, Recovery
from beitforge.pipeline.training.sample_log import SampleLog


class Replaced(Protocol):
    """What the loop needs of the list of bad samples (pipeline.runs.folder.BadSamples)."""

    @property
    def exhausted(self) -> bool: ...
    def add(self, samples: list[Any]) -> None: ...
    def over_budget(self) -> str: ...


class Saving(Protocol):
    """What the loop needs of the run's checkpoints (pipeline.checkpoints.saver.Saver)."""

    @property
    def open(self) -> bool: ...
    @property
    def busy(self) -> bool: ...
    def finish(self) -> None: ...


_PARTS = 1000  # tensors that the losses since the last log line are kept in

Objective = Callable[[Callable, Any, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop does what, in optimizer steps.

    flops: operations of one sample. peak: operations per second of one device, 0 if unknown.
    """

    first_step: int
    steps: int
    log_every: int
    save_every: int
    heldout_every: int
    flops: float = 0.0
    peak: float = 0.0

    def evaluates(self, done: int) -> bool:
        """Whether an evaluation is due after step `done`."""
        return bool(self.heldout_every) and (done % self.heldout_every == 0 or done == self.steps)


@dataclass(frozen=True, kw_only=True)
class Components:
    """What the loop calls. decay: the weight decay of a step, None where it is the groups' own. hosts: by rank.
    monitor, bad_samples: on rank 0 only, else None. sample_log: None unless log.positions is set.

    save: puts on disk what the steps so far have said, then the checkpoint that covers them; False when the weights are
    not finite and nothing was saved. beat: called at every step with what comes next, and whether it may take as long
    as the first time.
    """

    objective: Objective
    rate: Callable[[int], float]
    decay: Callable[[int], float] | None
    metrics: Metrics
    progress: Reporter
    hosts: list[str]
    recovery: Recovery
    monitor: Monitor | None
    bad_samples: Replaced | None
    sample_log: SampleLog | None
    evaluate: Callable[[int], None]
    save: Callable[[int], bool]
    saving: Saving
    stop: Callable[[], str]
    beat: Callable[[str, bool], None]


@dataclass
class Meter:
    """Sums since the last log line, and every step's loss and gradient norm; tensors stay on the device until they are
    read."""

    engine: Engine
    waiting: DeviceTimer
    totals: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    started: float = field(default_factory=time.perf_counter)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    bad: list = field(default_factory=list)
    forward: DeviceTimer = field(init=False)

    def __post_init__(self) -> None:
        self.forward = DeviceTimer(self.engine.world.device)

    def add(self, measures: dict[str, Tensor]) -> None:
        for name, value in measures.items():
            value = value.detach().float()
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.count += 1

    def end_step(self, losses: Tensor, norm: float) -> None:
        """losses [accumulation]: of the step's micro batches; not finite where its update was left out for that."""
        self.losses.append(losses.float().mean(dim=0, keepdim=True))
        self.norms.append(norm)
        if len(self.losses) > _PARTS:
            self.losses = [torch.cat(self.losses)]

    def read(self) -> tuple[dict[str, float], list[float], list[float], list[list[float]]]:
        """Means over ranks and micro batches; the loss of every step, likewise, and its gradient norm; and for each
        rank its forward seconds, the share of time it waited for data, and its memory in bytes. Resets all sums."""
        names, device = sorted(self.totals), self.engine.world.device
        seconds = time.perf_counter() - self.started
        waited = self.waiting.read() / max(seconds, 1e-9)
        local = [*(self.totals[name] for name in names), torch.tensor(waited)]
        stacked = torch.stack([value.to(device, torch.float32) for value in local])
        means = (all_sum(torch.cat([stacked, *self.losses])) / self.engine.world.size).tolist()
        result = {name: mean / self.count for name, mean in zip(names, means, strict=False)}
        result["data_wait_share"] = means[len(names)]
        result["seconds"] = seconds
        losses, norms, self.losses, self.norms = means[len(names) + 1 :], self.norms, [], []
        memory = float(memory_bytes(self.engine.world.device))
        ranks = all_gather_values([self.forward.read(), waited, memory], self.engine.world)
        self.totals, self.count, self.started = {}, 0, time.perf_counter()
        return result, losses, norms, ranks


def train(engine: Engine, batches: Iterator[Batch], schedule: Schedule, components: Components) -> int:
    """Train from schedule.first_step on; returns the total number of steps done, which is less than schedule.steps
    when stopped or when components.recovery must roll back.

    Raises SharedError when the budget of bad samples is spent.
    """
    prefetcher = DevicePrefetcher(batches, engine.world.device)
    meter = Meter(engine, prefetcher.waiting)
    for step in range(schedule.first_step, schedule.steps):
        components.beat(f"step {step}", step == schedule.first_step)
        stopping, _, updated = _step(engine, prefetcher, step, meter, components)
        done = step + 1
        returns = not updated and components.recovery.must_roll_back
        saves = done % schedule.save_every == 0 or done == schedule.steps or stopping
        components.progress.advance(1)
        if done % schedule.log_every == 0 or done == 1 or saves or returns:
            _log(engine, schedule, done, meter, components)
            _count_bad_samples(engine, meter, components.bad_samples)
        if returns:
            return done
        paused = time.perf_counter()
        if saves:
            components.beat(f"saving after step {done}", False)
            if not components.save(done):
                _record_skip(engine, components, step, "weights", False)
                return done
        if schedule.evaluates(done) and not (stopping and done < schedule.steps):
            evaluate(components, done)
        meter.started += time.perf_counter() - paused  # evaluation and saving are not training time
        if stopping:
            return done
    return schedule.steps


def evaluate(components: Components, done: int) -> None:
    """The evaluation after step `done`, once a checkpoint that is still being written is complete."""
    components.beat(f"saving after step {done}", False)
    components.saving.finish()
    components.beat(f"evaluation after step {done}", False)
    components.evaluate(done)


def _step(
    engine: Engine, prefetcher: DevicePrefetcher, step: int, meter: Meter, components: Components
) -> tuple[bool, float, bool]:
    """One optimizer step: whether to stop after it, the gradient's norm, and whether the update was applied.

    The host waits for the device once, for what all ranks tell each other with the norm, and while the device applies
    the update (pipeline.distributed.optimizer_step).
    """
    measured, samples = [], []
    for micro in range(engine.setup.accumulation):
        if micro:
            engine.accumulate()
        batch, measures = _micro_step(engine, prefetcher, components.objective, step, meter)
        measured.append(measures)
        samples += batch.samples.tolist() if components.sample_log is not None else []
    losses = torch.stack([measures["loss"] for measures in measured])
    fault = ~losses.isfinite().all()
    told = device_values([float(bool(components.stop())), float(components.saving.busy)], engine.world)
    decay = components.decay(step) if components.decay is not None else None
    outcome = engine.step(components.rate(step), torch.cat([told, fault[None]]), decay)
    stopping, busy, not_finite = outcome.flags
    meter.end_step(losses, outcome.norm)
    if components.saving.open and not busy:
        components.saving.finish()
    if outcome.updated:
        components.recovery.update_applied()
    if not not_finite:
        for measures in measured:
            meter.add(measures)
    if not_finite or not (outcome.updated or engine.scales_loss):
        _record_skip(engine, components, step, "loss" if not_finite else "gradient", bool(not_finite and fault))
    if components.sample_log is not None:
        components.sample_log.write(step, samples)
    return bool(stopping), outcome.norm, outcome.updated


def _micro_step(
    engine: Engine, prefetcher: DevicePrefetcher, objective: Objective, step: int, meter: Meter
) -> tuple[Batch, dict[str, Tensor]]:
    """Forward and backward of one micro batch; returns it and its loss with what else was measured."""
    batch, moved = prefetcher.next()
    meter.bad += batch.bad
    meter.forward.start()
    loss, measures = objective(engine.model, moved, step)
    meter.forward.stop()
    engine.backward(loss)
    prefetcher.prefetch()
    return batch, {"loss": loss.detach(), **measures}


def _record_skip(engine: Engine, components: Components, step: int, what: str, local_fault: bool) -> None:
    """Collective: record a skipped update. local_fault: whether this rank's loss was not finite."""
    seen = all_gather_objects((engine.world.rank, socket.gethostname()) if local_fault else None, engine.world)
    line = components.recovery.skipped(Fault(step, what, [rank for rank in seen if rank is not None]))
    components.metrics.write(step + 1, "skip", {"row": float(len(components.recovery.consecutive))})
    if engine.world.first:
        say(line)


def _log(engine: Engine, schedule: Schedule, done: int, meter: Meter, components: Components) -> None:
    """Write one line of metrics.jsonl, unless every update since the last was left out, one of every step's numbers,
    and the note next to the progress bar."""
    micro_batches = meter.count
    values, losses, norms, ranks = meter.read()
    components.metrics.write_steps(done - len(norms) + 1, engine.world.size, losses, norms)
    if not micro_batches:
        return
    speed = micro_batches * engine.setup.micro_batch * engine.world.size / values.pop("seconds")
    values |= {"lr": components.rate(done - 1), "gradient_norm": norms[-1], "images_per_second": speed}
    if components.decay is not None:
        values["weight_decay"] = components.decay(done - 1)
    values["memory_bytes"] = int(ranks[engine.world.rank][2])
    if schedule.flops and schedule.peak:
        values["mfu"] = speed * schedule.flops / (schedule.peak * engine.world.size)
    if components.monitor is not None:
        forward, waits = ([rank[i] for rank in ranks] for i in range(2))
        values |= components.monitor.check(done, values["loss"], forward, waits)
    components.metrics.write(done, "train", values)
    components.metrics.write_ranks(done, components.hosts, ranks)
    note = f"loss {values['loss']:.4f}, {speed:.0f} images/s, data wait {values['data_wait_share']:.0%}"
    components.progress.advance(0, note)


def _count_bad_samples(engine: Engine, meter: Meter, bad_samples: Replaced | None) -> None:
    """Gather every rank's substitutions on rank 0. Raises SharedError on all ranks when the budget is spent."""
    if not all_max([float(len(meter.bad))], engine.world)[0]:
        return
    everything = [sample for samples in all_gather_objects(meter.bad, engine.world) for sample in samples]
    everything.sort(key=lambda bad: bad.sample)  # of an image met twice, the first time is written down
    meter.bad = []
    problem = ""
    if bad_samples is not None:
        bad_samples.add(everything)
        problem = bad_samples.over_budget() if bad_samples.exhausted else ""
    if all_max([float(bool(problem))], engine.world)[0]:
        raise SharedError(problem or "the budget of bad samples is spent; see rank 0's output for the samples")
