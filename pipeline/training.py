"""One training run from its folder to its last step: lock, resume, stream, loop, checkpoints.

What `tokenizer` and `pretrain` share; what differs comes in as a Job. Must not know the model or any stage.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline import checkpoint
from pipeline.config import Config, Duration
from pipeline.engine import Engine, Setup, World, barrier
from pipeline.loop import Objective, Plan, train
from pipeline.metrics import Metrics, peak_flops, say
from pipeline.optim import learning_rate
from pipeline.run import BadSamples, identity_digest, locked, open_folder
from pipeline.streams import Source, training_batches
from shards.progress import Progress, Silent


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training. `sections`: the config sections of its identity. `evaluate(engine)`: held-out values, or {}."""

    label: str
    run: Path
    sections: tuple[str, ...]
    source: Source
    module: nn.Module
    groups: list[dict]
    setup: Setup
    duration: Duration
    warmup: Duration
    peak_lr: float
    end_lr: float
    save_every: Duration
    objective: Callable[[Engine, int], Objective]
    evaluate: Callable[[Engine], dict[str, float]] | None = None
    heldout_every: Duration | None = None
    flops: float = 0.0


def run_training(config: Config, job: Job, world: World, stop: Callable[[], str]) -> tuple[Engine, bool]:
    """Train to the end or until asked to stop; returns the engine and whether the run is finished.

    Raises ConfigError or ShardError for anything a user or a disk can cause.
    """
    with contextlib.ExitStack() as stack:
        if world.first:
            stack.enter_context(locked(job.run, say))
            open_folder(job.run, config, job.sections, world.size)
        barrier()
        engine = Engine(job.module, job.groups, job.setup, world)
        steps = job.duration.steps(job.source.samples, job.setup.global_batch)
        state = checkpoint.resume(engine, job.run, _state(config, job, world, 0), _say_once(world))
        first = state.step if state else 0
        metrics = stack.enter_context(contextlib.closing(Metrics(job.run, world.first, config.log.tensorboard)))
        metrics.write(first, "start", {"world": world.size, "steps": steps, "epoch_samples": job.source.samples})
        if first >= steps:
            return engine, True
        done = _train(config, job, engine, _plan(config, job, first, steps, world), metrics, stop)
        if world.first and done < steps:
            say(f"stopped after step {done} of {steps} ({stop() or 'another rank was asked'}); run again to go on")
        return engine, done == steps


def _train(config: Config, job: Job, engine: Engine, plan: Plan, metrics: Metrics, stop: Callable[[], str]) -> int:
    world, setup, first = engine.world, job.setup, plan.first_step
    batches = training_batches(
        config,
        job.source,
        first_sample=first * setup.global_batch,
        global_batch=setup.global_batch,
        micro=setup.micro_batch,
        rank=world.rank,
        world=world.size,
        steps=plan.steps - first,
    )
    warmup = job.warmup.steps(job.source.samples, setup.global_batch)

    def rate(step: int) -> float:
        return learning_rate(step, peak=job.peak_lr, end=job.end_lr, warmup=warmup, steps=plan.steps)

    def evaluate(done: int) -> None:
        if job.evaluate is not None:
            metrics.write(done, "heldout", job.evaluate(engine))

    def save(done: int) -> None:
        checkpoint.save(engine, job.run, _state(config, job, world, done), config.checkpoint.keep)

    bad = BadSamples(job.run, job.source.samples, config.data.bad_sample_budget) if world.first else None
    if world.first:
        micro = f"{setup.micro_batch} × {world.size} processes × {setup.accumulation} accumulation"
        say(f"{job.label}: {plan.steps} steps of {setup.global_batch} ({micro}), from step {first}, in {job.run}")
    with Progress(job.label, plan.steps, "step", done=first) if world.first else Silent() as progress:
        return train(
            engine,
            batches,
            plan,
            objective=job.objective(engine, plan.steps),
            rate=rate,
            metrics=metrics,
            progress=progress,
            bad_samples=bad,
            evaluate=evaluate,
            save=save,
            stop=stop,
        )


def _plan(config: Config, job: Job, first: int, steps: int, world: World) -> Plan:
    def every(duration: Duration | None) -> int:
        return max(1, duration.steps(job.source.samples, job.setup.global_batch)) if duration else 0

    return Plan(
        first_step=first,
        steps=steps,
        log_every=config.log.every_steps,
        save_every=every(job.save_every),
        heldout_every=every(job.heldout_every),
        flops=job.flops,
        peak=peak_flops(world.device, config.log.peak_tflops),
    )


def _state(config: Config, job: Job, world: World, step: int) -> checkpoint.State:
    return checkpoint.State(
        step=step,
        samples_seen=step * job.setup.global_batch,
        world=world.size,
        zero_stage=job.setup.zero_stage,
        precision=job.setup.precision,
        images=job.source.images,
        tokens=job.source.tokens,
        config=identity_digest(config, job.sections),
    )


def _say_once(world: World) -> Callable[[str], None]:
    return say if world.first else lambda _: None
