"""The one training loop, for tokenizer and encoder. Batches and the objective come in as arguments.

Must not know the model, shards or any stage.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.engine import Engine, agree, gathered, sums
from pipeline.metrics import Metrics, Reporter, memory_bytes
from pipeline.run import BadSamples


class Batch(Protocol):
    """What the loop needs of a batch (shards.loader.Batch)."""

    @property
    def bad(self) -> list: ...
    def to(self, device: torch.device) -> Any: ...


Objective = Callable[[Callable, Any, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps of one training, in optimizer steps. `flops`: of one sample; `peak`: of one device, 0 if unknown."""

    first_step: int
    steps: int
    log_every: int
    save_every: int
    heldout_every: int
    flops: float = 0.0
    peak: float = 0.0


@dataclass
class Meter:
    """Sums since the last log line; tensors stay on the device until they are read."""

    engine: Engine
    totals: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    bad: list = field(default_factory=list)

    def add(self, measures: dict[str, Tensor]) -> None:
        for name, value in measures.items():
            value = value.detach().float()
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.count += 1

    def read(self) -> dict[str, float]:
        """Means over ranks and micro batches, and the share of time spent waiting for data; starts anew."""
        names = sorted(self.totals)
        seconds = time.perf_counter() - self.started
        local = [*(self.totals[name] for name in names), torch.tensor(self.waited / max(seconds, 1e-9))]
        stacked = torch.stack([value.to(self.engine.world.device, torch.float32) for value in local])
        means = (sums(stacked) / self.engine.world.size).tolist()
        result = {name: mean / self.count for name, mean in zip(names, means, strict=False)}
        result["data_wait_share"] = means[-1]
        result["seconds"] = seconds
        self.totals, self.count, self.waited, self.started = {}, 0, 0.0, time.perf_counter()
        return result


def train(
    engine: Engine,
    batches: Iterator[Batch],
    plan: Plan,
    *,
    objective: Objective,
    rate: Callable[[int], float],
    metrics: Metrics,
    progress: Reporter,
    bad_samples: BadSamples | None,
    evaluate: Callable[[int], None],
    save: Callable[[int], None],
    stop: Callable[[], str],
) -> int:
    """Train from plan.first_step on; returns the number of steps done in all, less than plan.steps when stopped.

    Raises ConfigError on every rank when any rank's loss is not finite, before the update, or when the budget of bad
    samples is spent.
    """
    meter = Meter(engine)
    for step in range(plan.first_step, plan.steps):
        broken = torch.zeros((), device=engine.world.device)
        for micro in range(engine.setup.accumulation):
            if micro:
                engine.accumulate()
            broken = torch.maximum(broken, _micro_step(engine, batches, objective, step, meter))
        stopping, not_finite = agree([float(bool(stop())), broken.item()], engine.world)
        if not_finite:
            raise ConfigError(
                f"the loss is not finite at step {step}; no rank has made this update; lower optimizer.lr or "
                f"optimizer.clip_norm, then start again: it goes on from the newest checkpoint"
            )
        norm = engine.step(rate(step))
        done = step + 1
        last = done == plan.steps or bool(stopping)
        progress.advance(1)
        if done % plan.log_every == 0 or done == 1 or last:
            _log(engine, plan, done, norm, rate(step), meter, metrics, progress)
            _settle_bad(engine, meter, bad_samples)
        paused = time.perf_counter()
        if plan.heldout_every and (done % plan.heldout_every == 0 or done == plan.steps):
            evaluate(done)
        if done % plan.save_every == 0 or last:
            save(done)
        meter.started += time.perf_counter() - paused  # neither is training time
        if stopping:
            return done
    return plan.steps


def _micro_step(engine: Engine, batches: Iterator[Batch], objective: Objective, step: int, meter: Meter) -> Tensor:
    """Forward and backward of one micro batch; returns 1 on the device when its loss is not finite, else 0."""
    asked = time.perf_counter()
    batch = next(batches)
    meter.waited += time.perf_counter() - asked
    meter.bad += batch.bad
    loss, measures = objective(engine.model, batch.to(engine.world.device), step)
    engine.backward(loss)
    meter.add({"loss": loss, **measures})
    return (~torch.isfinite(loss.detach())).float()


def _log(
    engine: Engine,
    plan: Plan,
    done: int,
    norm: Tensor | float,
    rate: float,
    meter: Meter,
    metrics: Metrics,
    progress: Reporter,
) -> None:
    """One line of metrics.jsonl, and the note beside the bar."""
    samples = meter.count * engine.setup.micro_batch * engine.world.size
    values = meter.read()
    speed = samples / values.pop("seconds")
    values |= {"lr": rate, "gradient_norm": float(norm), "images_per_second": speed}
    values["memory_bytes"] = memory_bytes(engine.world.device)
    if plan.flops and plan.peak:
        values["mfu"] = speed * plan.flops / (plan.peak * engine.world.size)
    metrics.write(done, "train", values)
    progress.advance(0, f"loss {values['loss']:.4f}, {speed:.0f} images/s, data wait {values['data_wait_share']:.0%}")


def _settle_bad(engine: Engine, meter: Meter, bad_samples: BadSamples | None) -> None:
    """Bring every rank's substitutions together; stop all ranks when the budget is spent."""
    if not agree([float(len(meter.bad))], engine.world)[0]:
        return
    everything = [sample for samples in gathered(meter.bad, engine.world) for sample in samples]
    meter.bad = []
    complaint = ""
    if bad_samples is not None:
        bad_samples.add(everything)
        complaint = bad_samples.complaint() if bad_samples.exhausted else ""
    if agree([float(bool(complaint))], engine.world)[0]:
        raise ConfigError(complaint or "the budget of bad samples is spent; the first rank says which")
