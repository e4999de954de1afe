"""One training run from its folder to its last step: lock, resume, stream, loop, checkpoints.

What `tokenizer` and `pretrain` share; what differs comes in as a Job. Must not know the model or any stage.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from beitforge.pipeline.checkpoints import saver as checkpoint
from beitforge.pipeline.cluster.watchdog import Watchdog
from beitforge.pipeline.config.fields import Duration
from beitforge.pipeline.config.identity import identity_digest
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import say
from beitforge.pipeline.data.batches import decoder_name, lanes_advice, training_batches
from beitforge.pipeline.data.known_bad import known_lines
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.distributed.collectives import World, all_gather_objects, barrier, broadcast_object
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.device import device_name, peak_flops
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.startup import run_on_all_ranks
from beitforge.pipeline.errors import ConfigError, SharedError
from beitforge.pipeline.runs import checkpoints
from beitforge.pipeline.runs.folder import BadSamples, claim, lock, write_whole
from beitforge.pipeline.runs.jsonl import parse_line
from beitforge.pipeline.training.loop import Components, Objective, Schedule, evaluate, train
from beitforge.pipeline.training.metrics import Metrics, Reporter
from beitforge.pipeline.training.monitor import Monitor
from beitforge.pipeline.training.optim import cosine, learning_rate
from beitforge.pipeline.training.recovery import Recovery, resume_step, usable
from beitforge.pipeline.training.sample_log import SampleLog
from beitforge.shards.progress import Progress, Silent
from beitforge.shards.stream.order import ARITHMETIC

_OF_TRAINING = ("train", "steps", "start", "skip", "return", "due")  # kinds of metrics that no evaluation writes


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training. `sections`: the config sections of its identity. `evaluate(engine, done)`: values by kind of line
    after step `done`, or {}. classes: what the labels are called, where that is known. judged: the sets
    that it is judged on."""

    label: str
    run: Path
    sections: tuple[str, ...]
    source: DataSource
    module: nn.Module
    groups: list[dict]
    setup: Setup
    duration: Duration
    warmup: Duration
    peak_lr: float
    end_lr: float
    weight_decay: tuple[float, float] = (0.0, 0.0)  # at the beginning, and at the end of the run
    save_every: Duration
    objective: Callable[[Engine, int], Objective]
    evaluate: Callable[[Engine, int], dict[str, dict[str, float]]] | None = None
    heldout_every: Duration | None = None
    flops: float = 0.0
    classes: tuple[str, ...] = ()
    judged: tuple[DataSource, ...] = ()


def run_training(config: Config, job: Job, world: World, stop: Callable[[], str]) -> tuple[Engine, bool]:
    """Train to the end or until asked to stop; returns the engine and whether the run is finished.

    Raises ConfigError or ShardError for anything a user or a disk can cause.
    """
    tell = say if world.first else lambda _: None
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.faults.hang_seconds, world.rank))
        bad_samples = run_on_all_ranks(lambda: _claim(config, job, world, stack), world)
        engine = Engine(job.module, job.groups, job.setup, world)
        steps = job.duration.steps(job.source.samples, job.setup.global_batch)
        schedule = schedule_of(config, job, 0, steps, world)
        recovery = Recovery(
            job.run,
            config.faults,
            first=world.first,
            save_every=schedule.save_every,
            global_batch=job.setup.global_batch,
        )
        expected = state_of(config, job, engine, 0)
        state = checkpoint.resume(engine, job.run, expected, tell, lambda step: usable(recovery.rollbacks, step))
        first = resume_step(recovery.rollbacks, state.step) if state else 0
        owed = state is not None and state.step == first and schedule.evaluates(first)
        owed = broadcast_object(owed and not _evaluated(job.run, first), world)
        if first >= steps:
            tell(f"{job.run} is finished: step {first} of {steps}; `report {job.run}` shows it")
            if not owed:
                return engine, True
        if job.warmup.steps(job.source.samples, job.setup.global_batch) >= steps:
            tell(f"the warm-up ({job.warmup}) is as long as the run: the learning rate never reaches its peak")
        metrics = run_on_all_ranks(lambda: Metrics(job.run, world.first, config), world)
        stack.enter_context(contextlib.closing(metrics))
        metrics.write(first, "start", {"world": world.size, "steps": steps, "epoch_samples": job.source.samples})
        schedule = replace(schedule, first_step=first)
        recovery.begin(first)
        components = _components(config, job, engine, schedule, recovery, metrics, bad_samples, watchdog, stop, stack)
        if owed:
            evaluate(components, first)
        done = first
        while first < steps:
            done = _train(config, job, engine, replace(schedule, first_step=first), components)
            if not recovery.must_roll_back:
                break
            first = _roll_back(job, engine, recovery, components, expected, tell)
        components.saving.finish()
        if done < steps:
            tell(
                f"stopped after step {done} of {steps} ({stop() or 'another rank was asked'}); "
                "run the same command again to resume"
            )
        return engine, done == steps


def _claim(config: Config, job: Job, world: World, stack: contextlib.ExitStack) -> BadSamples | None:
    """Lock and open the run folder on rank 0, for all ranks, while the stack is open. Raises ConfigError when its
    budget of bad samples is spent."""
    if not world.first:
        return None
    stack.enter_context(lock(job.run, say))
    claim(job.run, config, job.sections, world.size, job.label, device_name(world.device))
    if job.classes:
        write_whole(job.run / "classes.json", json.dumps(job.classes) + "\n")
    bad_samples = BadSamples(job.run, job.source.samples, config.data.bad_sample_budget)
    if bad_samples.exhausted:
        raise ConfigError(bad_samples.over_budget())
    sets = (job.source, *job.judged)
    for line in dict.fromkeys(line for source in sets for line in known_lines(source)):
        say(line)
    if all(advice := lanes_advice(config, job.source, world.size)):
        say(": ".join(advice))
    return bad_samples


def _evaluated(run: Path, step: int) -> bool:
    """Whether the evaluation after a step has said what it found."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
    found = [line for line in filter(None, map(parse_line, lines)) if line.get("step") == step]
    return any(line.get("kind") not in _OF_TRAINING for line in found)


def _components(
    config: Config,
    job: Job,
    engine: Engine,
    schedule: Schedule,
    recovery: Recovery,
    metrics: Metrics,
    bad_samples: BadSamples | None,
    watchdog: Watchdog,
    stop: Callable[[], str],
    stack: contextlib.ExitStack,
) -> Components:
    """Build what the loop uses; the stack closes it."""
    world, setup, first = engine.world, job.setup, engine.world.first
    settings = config.checkpoint
    keep_every = settings.keep_every.steps(job.source.samples, setup.global_batch)
    saver = checkpoint.Saver(
        engine, job.run, keep=settings.keep, keep_every=keep_every, asynchronous=settings.asynchronous
    )

    def judge(done: int) -> None:
        if job.evaluate is not None:
            metrics.write(done, "due", {})
            for kind, values in job.evaluate(engine, done).items():
                metrics.write(done, kind, values)

    def save(done: int) -> bool:
        run_on_all_ranks(lambda: _flush_logs(job.run, metrics, sample_log, first), world)
        return saver.save(state_of(config, job, engine, done))

    session = broadcast_object(time.time_ns(), world)
    hosts = all_gather_objects(socket.gethostname(), world)
    bar = Progress(job.label, schedule.steps, "step", done=schedule.first_step)
    progress: Reporter = stack.enter_context(bar) if first else Silent()
    sample_log = None
    if config.log.positions:
        sample_log = stack.enter_context(contextlib.closing(SampleLog(job.run, world.rank, session)))
    return Components(
        objective=job.objective(engine, schedule.steps),
        rate=rate_of(job, schedule.steps),
        decay=decay_of(job, schedule.steps),
        metrics=metrics,
        progress=progress,
        hosts=hosts,
        recovery=recovery,
        monitor=Monitor(config.faults, hosts, say) if first else None,
        bad_samples=bad_samples,
        sample_log=sample_log,
        evaluate=judge,
        save=save,
        saving=saver,
        stop=stop,
        beat=watchdog.beat,
    )


def _flush_logs(run: Path, metrics: Metrics, sample_log: SampleLog | None, first: bool) -> None:
    """Return when all that a checkpoint's position covers is on disk, so that a kill loses nothing of it for good."""
    metrics.sync()
    if sample_log is not None:
        sample_log.sync()
    if first:
        checkpoint.flush_folder(run)


def _train(config: Config, job: Job, engine: Engine, schedule: Schedule, components: Components) -> int:
    """Train on the stream from schedule.first_step on."""
    world, setup, first = engine.world, job.setup, schedule.first_step
    batches = training_batches(
        config,
        job.source,
        first_sample=first * setup.global_batch,
        global_batch=setup.global_batch,
        micro=setup.micro_batch,
        rank=world.rank,
        world=world.size,
        steps=schedule.steps - first,
    )
    if world.first:
        micro = f"{setup.micro_batch} × {world.size} processes × {setup.accumulation} accumulation"
        decoder = decoder_name(job.source.stream)
        line = f"{job.label}: {schedule.steps} steps of {setup.global_batch} ({micro}), from step {first}, in {job.run}"
        say(f"{line}; JPEGs by {decoder}")
    return train(engine, batches, schedule, components)


def _roll_back(
    job: Job,
    engine: Engine,
    recovery: Recovery,
    components: Components,
    expected: checkpoints.State,
    tell: Callable[[str], None],
) -> int:
    """Load the weights of an earlier checkpoint; returns the step to resume with, after the skipped ones."""
    components.beat("rolling back", False)
    components.saving.finish()
    before, rollbacks = recovery.rollback_before(), list(recovery.rollbacks)
    state = checkpoint.resume(engine, job.run, expected, tell, lambda s: s < before and usable(rollbacks, s))
    if state is None:
        raise SharedError(recovery.report(f"there is no checkpoint before step {before} to go back to"))
    rollback = recovery.record_rollback(state.step)
    if engine.world.first:
        checkpoint.remove_between(job.run, rollback.to, rollback.on)
    barrier()
    components.metrics.write(rollback.on, "return", {"to": float(rollback.to)})
    tell(
        f"rolled back to the weights of step {rollback.to}; resuming with step {rollback.on}, "
        "samples between are skipped"
    )
    return rollback.on


def rate_of(job: Job, steps: int) -> Callable[[int], float]:
    """The learning rate of every step of a run of `steps`."""
    warmup = job.warmup.steps(job.source.samples, job.setup.global_batch)
    return partial(learning_rate, peak=job.peak_lr, end=job.end_lr, warmup=warmup, steps=steps)


def decay_of(job: Job, steps: int) -> Callable[[int], float] | None:
    """The weight decay of every step of a run of `steps`; None where it does not change."""
    start, end = job.weight_decay
    return partial(cosine, start=start, end=end, steps=steps) if start != end else None


def schedule_of(config: Config, job: Job, first: int, steps: int, world: World) -> Schedule:
    """When the run does what."""

    def every(duration: Duration | None) -> int:
        return max(1, duration.steps(job.source.samples, job.setup.global_batch)) if duration else 0

    return Schedule(
        first_step=first,
        steps=steps,
        log_every=config.log.every_steps,
        save_every=every(job.save_every),
        heldout_every=every(job.heldout_every),
        flops=job.flops,
        peak=peak_flops(world.device, config.log.peak_tflops),
    )


def state_of(config: Config, job: Job, engine: Engine, step: int) -> checkpoints.State:
    """What a checkpoint after `step` steps says of the run."""
    return checkpoints.State(
        step=step,
        samples_seen=step * job.setup.global_batch,
        world=engine.world.size,
        zero_stage=job.setup.zero_stage,
        precision=job.setup.precision,
        images=job.source.images,
        tokens=job.source.tokens,
        config=identity_digest(config, job.sections),
        order=ARITHMETIC,
        groups=engine.groups,
    )
