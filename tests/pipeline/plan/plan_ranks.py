"""A process of test_plan_ranks.py and benchmarks/plan/plan_measured.py: what one rank really holds and sends.

`python -m tests.pipeline.plan.plan_ranks SHAPE STEPS CASES`, alone or under torchrun. CASES: a JSON list of [precision,
accumulation, settings of DeepSpeed's zero_optimization], for Muon with a true behind. Trains a few steps of each under
every ZeRO stage with every collective of torch.distributed counted; rank 0 prints a JSON list of findings of each case.
"""

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import start_world
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.training.optim import muon_groups, parameter_groups

SENT: list[tuple[str, int]] = []  # operation, and bytes of its whole message, of this rank's calls
MESSAGES: tuple[tuple[str, Callable], ...] = (
    ("all_reduce", lambda tensor, *_: tensor),
    ("reduce", lambda tensor, *_: tensor),
    ("broadcast", lambda tensor, *_: tensor),
    ("all_gather", lambda gathered, *_: gathered),
    ("all_gather_into_tensor", lambda gathered, *_: gathered),
    ("reduce_scatter", lambda _, given, *__: given),
    ("reduce_scatter_tensor", lambda _, given, *__: given),
    ("all_to_all_single", lambda _, given, *__: given),
)


def count(name: str, message: Callable) -> None:
    """Note every call of torch.distributed's function of this name."""
    made = getattr(dist, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        given = message(*arguments, *(value for value in named.values() if isinstance(value, torch.Tensor | list)))
        tensors = given if isinstance(given, list | tuple) else [given]
        SENT.append((name, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))
        return made(*arguments, **named)

    setattr(dist, name, counted)


MOVES = ("aten::copy_", "aten::div_")
COPIED = ("fp32", 1)  # precision and accumulation of which copies are counted, which takes seconds

# Model, vocabulary, masked patches, images of a micro batch. tiny: sizes that divide by neither 2 nor 4, so that shares
# are padded; small: one whose products take the time.
SHAPES = {
    "tiny": (Model(input_size=Size(48, 48), patch_size=8, layers=3, width=66, heads=3), 211, 12, 2),
    "small": (Model(input_size=Size(112, 112), patch_size=16, layers=6, width=384, heads=6), 1024, 19, 8),
}


def ring_bytes(calls: Iterable[tuple[str, int]], world: int) -> float:
    """What a rank sends on a ring: (n - 1) / n of each message, of an all-reduce's twice that."""
    return sum((2 if name == "all_reduce" else 1) * size * (world - 1) / world for name, size in calls)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Memory by address, each once however many tensors look at it."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def alive() -> dict[int, int]:
    gc.collect()
    return storages(gc.get_objects())


def held(engine: Engine, before: dict[int, int]) -> dict[str, int]:
    """Bytes at rest by part. before: what was there without the engine."""
    whole = [parameter.data for parameter in engine.module.parameters()]
    whole += [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    weights = storages(whole)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    known = list(inner.state) + [value for state in inner.state.values() for value in state.values()]
    optimizer = {at: size for at, size in storages(known).items() if at not in weights and size > 4}
    gradients = storages([getattr(engine.optimizer, "grad_partitions_flat_buffer", None)])
    rest = {at: size for at, size in alive().items() if at not in before}
    others = sum(size for at, size in rest.items() if at not in {**weights, **optimizer, **gradients})
    parts = {"parameters": weights, "optimizer": optimizer, "gradients": gradients}
    return {**{name: sum(part.values()) for name, part in parts.items()}, "others": others}


def engine_of(
    world: World, stage: int, shape: str, precision: str, accumulation: int, zero: dict, muon: bool
) -> Engine:
    """The real engine around the real model with its parameter groups."""
    model, vocabulary, _, micro = SHAPES[shape]
    beit = Beit(model, vocabulary, seed=0)
    setup = Setup(
        global_batch=micro * accumulation * world.size,
        micro_batch=micro,
        accumulation=accumulation,
        precision=precision,
        zero_stage=stage,
        offload_optimizer=False,
        compile=False,
        clip_norm=0.0 if muon else 3.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        overrides={"zero_optimization": zero} if stage else {},
        muon=muon,
    )
    return Engine(beit, muon_groups(beit, 0.05, 0.95) if muon else parameter_groups(beit, 0.05), setup, world)


def copied(profiler: torch.profiler.profile) -> int:
    """Elements that were copied or scaled in place."""
    moved = [event for event in profiler.key_averages(group_by_input_shape=True) if event.key in MOVES]
    return sum(event.count * math.prod(event.input_shapes[0]) for event in moved)


def example(world: World, shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, tokens and mask of a micro batch of this rank's own."""
    model, vocabulary, masked, micro = SHAPES[shape]
    generator = torch.Generator().manual_seed(world.rank)
    pixels = torch.randn(micro, 3, *model.input_size, generator=generator).to(dtype)
    tokens = torch.randint(vocabulary, (micro, model.num_patches), generator=generator)
    mask = torch.zeros(micro, model.num_patches, dtype=torch.bool)
    mask[:, :masked] = True
    return pixels, tokens, mask


def nothing() -> None:
    """What is done between steps unless a benchmark has something to measure there."""


def timed(steps: int, step: Callable[[], None], between: Callable[[], None]) -> list[float]:
    """Seconds of each step, from when all ranks begin it to when all have ended it."""
    seconds = []
    for _ in range(steps):
        between()
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds


def measured(
    world: World,
    stage: int,
    shape: str,
    steps: int,
    precision: str,
    accumulation: int,
    zero: dict,
    muon: bool = False,
    between: Callable[[], None] = nothing,
) -> dict:
    """Bytes of this rank's tensors by part, what it sends in a step, and the seconds of each step.

    "copied" is 0 unless precision and accumulation are those of COPIED.
    """
    masked, before = SHAPES[shape][2], alive()
    engine = engine_of(world, stage, shape, precision, accumulation, zero, muon)
    pixels, tokens, mask = example(world, shape, engine.dtype)
    before |= storages([pixels, tokens, mask])

    def backward(look: Callable[[], None]) -> None:
        for turn in range(accumulation):
            if turn:
                engine.accumulate()
            loss, _, right = engine.model(pixels, mask, masked, None, tokens)
            engine.backward(loss / right)
            del loss, right
            look()

    def step(look: Callable[[], None] = nothing) -> None:
        backward(look)
        engine.step(1e-3)

    seconds = timed(steps, step, between)
    parts, resting, grown = held(engine, before), alive(), [0]
    bucket = engine.deepspeed.zero_reduce_bucket_size() * engine.dtype.itemsize if stage else 0

    def look() -> None:
        new = [size for at, size in alive().items() if at not in resting and size != bucket]
        grown.append(sum(new))

    SENT.clear()
    step(look)
    calls, biggest = list(SENT), torch.tensor([*parts.values(), max(grown)])
    moved = 0
    if (precision, accumulation) == COPIED:
        with torch.profiler.profile(record_shapes=True) as profiler:
            step()
        moved = copied(profiler)
    dist.all_reduce(biggest, op=dist.ReduceOp.MAX)
    parts = dict(zip(parts, biggest.tolist(), strict=False))
    parts["gradients"] += int(biggest[-1])
    return {
        "world": world.size,
        "stage": stage,
        **parts,
        "copied": moved,
        "sent": ring_bytes(calls, world.size),
        "seconds": seconds,
    }


def counting_world() -> World:
    """Join the others, every collective counted from now on: before deepspeed takes hold of torch's functions."""
    for name, message in MESSAGES:
        count(name, message)
    return start_world()


def main() -> None:
    shape, steps, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    world = counting_world()
    findings = [[measured(world, stage, shape, steps, *case) for stage in range(4)] for case in cases]
    if world.first:
        print(json.dumps(findings), flush=True)
    dist.barrier()
    os._exit(0)  # now and then gloo aborts when it is taken apart


if __name__ == "__main__":
    main()
