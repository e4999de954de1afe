"""A process of tests/pipeline/test_plan_ranks.py and benchmarks/plan_measured.py: what one rank really holds and sends.

`python -m tests.pipeline.plan_ranks SHAPE PRECISION ACCUMULATION [SECONDS]`, alone or under torchrun. Trains a few steps
under every ZeRO stage with every collective of torch.distributed counted, and rank 0 prints a JSON list of findings.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

SENT: list[tuple[str, int]] = []  # operation, and bytes of its whole message, of this rank's calls
_RECORDED = (
    ("all_reduce", lambda tensor, *_: tensor),
    ("reduce", lambda tensor, *_: tensor),
    ("broadcast", lambda tensor, *_: tensor),
    ("all_gather", lambda gathered, *_: gathered),
    ("all_gather_into_tensor", lambda gathered, *_: gathered),
    ("reduce_scatter", lambda _, given, *__: given),
    ("reduce_scatter_tensor", lambda _, given, *__: given),
    ("all_to_all_single", lambda _, given, *__: given),
)


def size(tensors: Any) -> int:
    """Bytes of a tensor or of a list of them."""
    return sum(t.numel() * t.element_size() for t in (tensors if isinstance(tensors, list | tuple) else [tensors]))


def record(name: str, message: Callable) -> None:
    """Count every call of torch.distributed's function of this name."""
    made = getattr(dist, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        values = [*arguments, *(value for value in named.values() if isinstance(value, torch.Tensor | list))]
        SENT.append((name, size(message(*values))))
        return made(*arguments, **named)

    setattr(dist, name, counted)


for _name, _message in _RECORDED:  # before deepspeed keeps them
    record(_name, _message)

from pipeline.config import Model, Size  # noqa: E402
from pipeline.engine import Engine, Setup, leave, start_world  # noqa: E402
from pipeline.model import Beit  # noqa: E402
from pipeline.optim import parameter_groups  # noqa: E402

# tiny: sizes that divide by neither 2 nor 4, so that shares are padded; small: one whose products take the time
SHAPES = {
    "tiny": (Model(input_size=Size(48, 48), patch_size=8, layers=3, width=66, heads=3), 211, 12, 2),
    "small": (Model(input_size=Size(112, 112), patch_size=16, layers=6, width=384, heads=6), 1024, 19, 4),
}
WORLD = start_world()


def ring_bytes(calls: Iterable[tuple[str, int]], world: int) -> float:
    """Bytes a rank sends: of an all-reduce 2 (n - 1) / n of the message, of its halves (n - 1) / n, on a ring
    (Patarasuk and Yuan 2009); of a broadcast or reduce the message once."""
    part = (world - 1) / world
    factors = {"all_reduce": 2 * part, "broadcast": part, "reduce": part}
    return sum(factors.get(name, part) * bytes_ for name, bytes_ in calls)


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Memory by address, each once however many tensors look at it."""
    found = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def alive() -> dict[int, int]:
    gc.collect()
    return storages(item for item in gc.get_objects() if isinstance(item, torch.Tensor))


def measured(stage: int, shape: str, precision: str, accumulation: int, steps: int) -> dict:
    """Bytes of this rank's tensors by part, its calls in the last step, and the median seconds of a step."""
    model, vocabulary, masked, micro = SHAPES[shape]
    before = alive()
    beit = Beit(model, vocabulary, seed=0)
    setup = Setup(
        global_batch=micro * accumulation * WORLD.size,
        micro_batch=micro,
        accumulation=accumulation,
        precision=precision,
        zero_stage=stage,
        offload_optimizer=False,
        compile=False,
        clip_norm=3.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        overrides=json.loads(sys.argv[4]) if stage else {},
    )
    engine = Engine(beit, parameter_groups(beit, 0.05), setup, WORLD)
    generator = torch.Generator().manual_seed(WORLD.rank)
    pixels = torch.randn(micro, 3, *model.input_size, generator=generator).to(engine.dtype)
    tokens = torch.randint(vocabulary, (micro, model.num_patches), generator=generator)
    mask = torch.zeros(micro, model.num_patches, dtype=torch.bool)
    mask[:, :masked] = True

    def backward() -> None:
        for turn in range(accumulation):
            if turn:
                engine.accumulate()
            loss, _, count = engine.model(pixels, mask, masked, None, tokens)
            engine.backward(loss / count)
            del loss, count

    seconds = []
    for _ in range(steps):
        dist.barrier()
        started = time.perf_counter()
        backward()
        engine.step(1e-3)
        seconds.append(time.perf_counter() - started)
    resting = {address: size_ for address, size_ in alive().items() if address not in before}
    SENT.clear()
    backward()
    loaded = {address: size_ for address, size_ in alive().items() if address not in before}
    in_backward = list(SENT)
    engine.step(1e-3)
    return {
        "stage": stage,
        "resting": sorted(resting.values(), reverse=True)[:60],
        "grown": sorted((s for a, s in loaded.items() if a not in resting), reverse=True)[:60],
        "backward_calls": [(n, b) for n, b in in_backward][:80],
        "calls": SENT[len(in_backward) :][:80],
        "total_resting": sum(resting.values()),
        "total_grown": sum(s for a, s in loaded.items() if a not in resting),
        "sent": ring_bytes(SENT, WORLD.size),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in beit.parameters()),
        "seconds": sorted(seconds)[len(seconds) // 2],
        "opt": type(engine.optimizer).__name__,
    }


def main() -> None:
    shape, precision, accumulation = sys.argv[1], sys.argv[2], int(sys.argv[3])
    findings = [measured(stage, shape, precision, accumulation, 3) for stage in range(4)]
    if WORLD.first:
        print(json.dumps(findings))
    leave()


if __name__ == "__main__":
    main()
