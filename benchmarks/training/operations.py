"""How many kernels does one training step launch, and how long does the GPU wait for the next?

    python -m benchmarks.training.operations          # on a GPU; under a minute a size
    python -m benchmarks.training.operations --dry    # on a CPU, where operations are counted instead

By torch.profiler over whole steps: ours as in `bench train`, and under DeepSpeed as `pretrain` runs it (ZeRO-2, bf16),
whose optimizer step is counted apart, too.
"""

import atexit
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from beitforge.pipeline.config.settings import Config, Train
from benchmarks.harness import Bench, Job, Row, measured, options
from benchmarks.training.contenders import V
from benchmarks.training.train import SIZES, batch, check, contender, stepper

QUESTION = "kernels and idle time of one training step"
NOTE = (
    "By torch.profiler, means over {steps} steps. Idle: the share of a step in which the GPU computes nothing, the "
    "profiler's own cost included. Copies: between host and device. Reads: how often the host waits for a number."
)
STEPS = 3
_FINDS = ("kernels", "copies", "reads", "ms", "idle")
_READS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # not cudaDeviceSynchronize, which ends the profile


def profiled(step: Callable[[], object], bench: Bench) -> Row:
    """Counts and times of one step, its mean over STEPS; on a CPU, for kernels, operations that call no other."""
    cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as prof:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    events = list(prof.events() or [])
    if not cuda:
        operations = [event for event in events if event.name.startswith("aten::") and not event.cpu_children]
        reads = sum(event.name == "aten::_local_scalar_dense" for event in events)
        return _cells(len(operations), 0, reads, math.nan, math.nan)
    return on_device(events)


def on_device(events: list[Any]) -> Row:
    """The same of a GPU's events: what runs on it, but not the spans that annotate it, and the host's waits."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    spans = sorted((event.time_range.start, event.time_range.end) for event in on_gpu)
    copies = sum(event.name.startswith(("Memcpy HtoD", "Memcpy DtoH")) for event in on_gpu)
    reads = sum(event.name in _READS for event in events)
    whole = spans[-1][1] - spans[0][0]
    return _cells(len(on_gpu), copies, reads, whole / STEPS / 1e3, 1 - busy(spans) / whole)


def busy(spans: list[tuple[float, float]]) -> float:
    """How long at least one of the spans, sorted by their start, lasts."""
    total, until = 0.0, -math.inf
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _cells(kernels: int, copies: int, reads: int, milliseconds: float, idle: float) -> Row:
    timed = not math.isnan(milliseconds)
    return {
        "kernels": f"{kernels / STEPS:.0f}",
        "copies": f"{copies / STEPS:.0f}",
        "reads": f"{reads / STEPS:.1f}",
        "ms": f"{milliseconds:.1f}" if timed else "not timed",
        "idle": f"{idle:.1%}" if timed else "not timed",
    }


def plain(size: str, compiled: bool, bench: Bench) -> Row:
    """The step of `bench train`."""
    model, images, masked, *_ = SIZES[size]
    step = stepper(contender("ours", size, bench), batch(model, images, masked, bench), compiled, bench)
    check(step)
    return profiled(step, bench)


def under_deepspeed(size: str, bench: Bench) -> Row:
    """The step of `pretrain` on one process."""
    engine, run = _engine(size, bench)
    run(), engine.step(1e-4)
    return profiled(lambda: (run(), engine.step(1e-4)), bench)


def optimizer_step(size: str, bench: Bench) -> Row:
    """`engine.step` alone: the whole step, less forward and backward."""
    engine, run = _engine(size, bench)
    whole, without = under_deepspeed(size, bench), profiled(lambda: (run(), engine.deepspeed.zero_grad()), bench)
    cells = {name: float(str(whole[name])) - float(str(without[name])) for name in ("kernels", "copies", "reads")}
    apart = {name: f"{count:.0f}" for name, count in cells.items()}
    if bench.device.type != "cuda":
        return {**whole, **apart}
    return {**apart, "ms": f"{float(str(whole['ms'])) - float(str(without['ms'])):.1f}", "idle": ""}


@lru_cache(maxsize=1)
def _world() -> Any:
    from beitforge.pipeline.distributed.process_group import destroy_process_group, start_world

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    world = start_world()
    atexit.register(destroy_process_group)  # DeepSpeed does not join a second time
    return world


@lru_cache(maxsize=1)
def _engine(size: str, bench: Bench) -> tuple[Any, Callable[[], None]]:
    """DeepSpeed's engine as `pretrain` makes it, and forward and backward of one batch under it."""
    from beitforge.pipeline.distributed.deepspeed_config import setup_from
    from beitforge.pipeline.distributed.engine import Engine
    from beitforge.pipeline.model.beit import Beit
    from beitforge.pipeline.training.optim import parameter_groups

    model, images, masked, *_ = SIZES[size]
    train = Train(global_batch=images, micro_batch=images, compile=False)
    setup = setup_from(dataclasses.replace(Config(), train=train), _world(), images)
    beit = Beit(model, V, seed=0)
    engine = Engine(beit, parameter_groups(beit, 0.05), setup, _world())
    pixels, mask, tokens = batch(model, images, masked, Bench(bench.device, torch.bfloat16, "", "none"))
    of_patches = torch.zeros(mask.shape, dtype=tokens.dtype, device=tokens.device).masked_scatter(mask, tokens)

    def run() -> None:
        total, _, count = engine.model(pixels, mask, masked, None, of_patches)
        engine.backward(total / count)

    return engine, run


def jobs(sizes: tuple[str, ...]) -> list[Job]:
    """For each size the plain step, eager and compiled, and DeepSpeed's."""
    kinds: list[tuple[str, Callable[[str, Bench], Row], float, bool]] = [
        ("ours, compiled", lambda size, bench: plain(size, True, bench), 12.0, True),
        ("ours", lambda size, bench: plain(size, False, bench), 4.0, False),
        ("under DeepSpeed, ZeRO-2", under_deepspeed, 8.0, False),
        ("of it the optimizer step", optimizer_step, 4.0, False),
    ]
    return [
        Job({"model": size, "step": name}, _FINDS, seconds, partial(run, size), compiles)
        for size in sizes
        for name, run, seconds, compiles in kinds
    ]


def note(bench: Bench) -> str:
    return NOTE.format(steps=STEPS)


def main() -> None:
    """The table."""
    asked = options("operations", tuple(SIZES)[:-1], sys.argv[1:])
    list(measured("operations", QUESTION, jobs(asked.sizes), asked, lambda _: {}, note(asked.bench)))


if __name__ == "__main__":
    main()
