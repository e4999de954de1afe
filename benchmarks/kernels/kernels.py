"""Attention with a learned bias on one GPU: ours beside everything else that can do it, and what cannot.

    python -m benchmarks.kernels.kernels                       # on a GPU; some minutes
    python -m benchmarks.kernels.kernels --sizes base,large --minutes 3 --out DIR
    python -m benchmarks.kernels.kernels --dry                 # every provider's call on a CPU, checked, not timed

All providers run in one process on the same tensors. What is wrong has no speed.
"""

import sys
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch._functorch.config  # not imported by torch itself before something is compiled
from torch import Tensor

from beitforge.kernels.attention.reference import attention_reference
from benchmarks.harness import Bench, Job, Row, Wrong, measured, options
from benchmarks.kernels.attention_providers import (
    EVOFORMER,
    GRADIENT,
    NONE,
    PROVIDERS,
    Provider,
    Run,
    Shape,
    design,
    eager,
)

SHAPES = {
    "base": Shape("base 224", 128, (14, 14), 12, 64),
    "large": Shape("large 224", 128, (14, 14), 16, 64),
    "giant": Shape("giant 224", 64, (16, 16), 16, 88),
    "base384": Shape("base 384", 64, (24, 24), 12, 64),
    "dry": Shape("dry", 2, (4, 5), 2, 32),
}
SIZES = tuple(SHAPES)[:-1]
QUESTION = "attention with BEiT's bias on one GPU"
NOTE = (
    "{dtype}. Median of forward, backward and both in µs, with the fifths at either end. The limit is the larger of "
    "bytes and products {reached}. A provider whose error is over twice eager's (three times for gradients) has no "
    "speed."
)
_FINDS = ("forward µs", "backward µs", "both µs", "of the limit")


def exact(shape: Shape, biased: bool, qkv: Tensor, table: Tensor, weight: Tensor) -> list[Tensor]:
    """In float64 by the reference, two images at a time: output and gradient of qkv of the first and last two images,
    gradient of the table over all."""
    bias_of = eager(shape, Bench(qkv.device, qkv.dtype, "", "none"))

    def plain(q: Tensor, _: Tensor) -> Tensor:
        return attention_reference(q, None)

    dtable, ends = torch.zeros_like(table, dtype=torch.float64), []
    for first in range(0, len(qkv), 2):
        two = slice(first, first + 2)
        found = with_gradients(bias_of if biased else plain, qkv[two].double(), table.double(), weight[two].double())
        dtable += found[2]
        if first in (0, len(qkv) - 2):
            ends.append(found)
    return [torch.cat([end[0] for end in ends]), torch.cat([end[1] for end in ends]), dtable]


def errors(run: Run, bias: str, right: list[Tensor], tensors: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors of the whole batch that is timed; of output and qkv at its ends."""
    out, dqkv, dtable = with_gradients(run, *tensors)
    ends = [0, 1, -2, -1] if len(out) > 2 else [0, 1]
    pairs = [("out", out[ends], right[0]), ("qkv", dqkv[ends], right[1])]
    pairs += [("table", dtable, right[2])] if bias == GRADIENT else []
    return {name: float((ours.double() - theirs).norm() / theirs.norm()) for name, ours, theirs in pairs}


def with_gradients(run: Run, qkv: Tensor, table: Tensor, weight: Tensor) -> list[Tensor]:
    """Output, and the gradients of qkv and table for the output gradient `weight`."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = run(qkv, table)
    out.backward(weight)
    none = torch.zeros_like(table) if table.grad is None else table.grad
    assert qkv.grad is not None, "qkv always takes part"
    return [out.detach(), qkv.grad, none]


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, table in float32 and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape.grid
    sizes = (shape.images, shape.positions, 3, shape.heads, shape.head_size)
    qkv = torch.randn(sizes, generator=generator).to(device, dtype)
    table = 0.5 * torch.randn((2 * rows - 1) * (2 * columns - 1) + 3, shape.heads, generator=generator)
    weight = torch.randn(sizes[:2] + sizes[3:], generator=generator).to(device, dtype)
    return qkv, table.to(device), weight


def check(found: dict[str, float], plain: dict[str, float]) -> None:
    """Error at most twice that of eager code in the same precision, three times for gradients. Raises Wrong."""
    bad = [name for name, e in found.items() if not e <= (2 if name == "out" else 3) * plain[name] + 1e-7]
    if bad:
        raise Wrong(", ".join(f"{name} by {found[name]:.1e} (eager: {plain[name]:.1e})" for name in bad))


@lru_cache(maxsize=1)  # the rows of a shape follow each other
def prepared(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict, dict]:
    """Inputs; and by whether there is a bias the exact results, and eager code's errors."""
    bench = Bench(device, dtype, "", "none")
    tensors = inputs(shape, device, dtype)
    rights = {biased: exact(shape, biased, *tensors) for biased in (True, False)}
    runs: dict[bool, tuple[Run, str]] = {
        True: (eager(shape, bench), GRADIENT),
        False: (lambda qkv, _: attention_reference(qkv, None), NONE),
    }
    return tensors, rights, {biased: errors(*runs[biased], rights[biased], tensors) for biased in (True, False)}


def measure(shape: Shape, provider: Provider, bench: Bench) -> Row:
    """Right first, then fast: forward, backward and both."""
    with design(provider.stored):
        return _measured(shape, provider, bench)


def _measured(shape: Shape, provider: Provider, bench: Bench) -> Row:
    torch._functorch.config.donated_buffer = False  # the backward alone runs many times on one graph
    tensors, rights, plain = prepared(shape, bench.device, bench.dtype)
    run, biased = provider.build(shape, bench), provider.bias != NONE
    check(errors(run, provider.bias, rights[biased], tensors), plain[biased])
    copy, product = bench.rates()
    limit = 1e3 * max(7 * shape.flops / 2 / product, 3 * shape.bytes / copy)
    times = timed(run, bench, *tensors)
    cells = {f"{name} µs": t.cell("µs") for name, t in times.items()}
    both = times["both"].median
    return {**cells, "of the limit": f"{limit / both:.0%}" if both == both else "not timed", "_both": both}


def timed(run: Run, bench: Bench, qkv: Tensor, table: Tensor, weight: Tensor) -> dict:
    """Times of forward, backward and both."""
    leaves = [qkv.detach().requires_grad_(), table.detach().requires_grad_()]

    def both() -> None:
        run(*leaves).backward(weight)

    out = run(*leaves)
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: run(*leaves),
        "backward": lambda: out.backward(weight, retain_graph=True),
        "both": both,
    }
    return {name: bench.time(each, leaves) for name, each in runs.items()}


def jobs(sizes: tuple[str, ...], providers: tuple[Provider, ...] = (*PROVIDERS, EVOFORMER)) -> list[Job]:
    """A row for each shape and provider."""
    return [
        Job(
            {"shape": SHAPES[size].name, "provider": provider.name, "bias": provider.bias},
            _FINDS,
            provider.seconds,
            partial(measure, SHAPES[size], provider),
            provider.compiles,
        )
        for size in sizes
        for provider in providers
    ]


def ratios(rows: list[Row]) -> dict[str, float]:
    """Each other provider's time over ours, forward and backward together, by shape."""
    found: dict[str, float] = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == shape and "_both" in row]
        times = {f"{row['provider']}, {row['bias']}": float(row["_both"]) for row in here}  # type: ignore[arg-type]
        ours = times.pop(f"ours, {GRADIENT}", None)
        if ours is not None:
            found |= {f"{shape}: {name} / ours": time / ours for name, time in times.items()}
    return found


def note(bench: Bench) -> str:
    return NOTE.format(dtype=str(bench.dtype).removeprefix("torch."), reached=bench.reached())


def main() -> None:
    """The table."""
    asked = options("kernels", SIZES, sys.argv[1:])
    list(measured("kernels", QUESTION, jobs(asked.sizes), asked, ratios, note(asked.bench)))


if __name__ == "__main__":
    main()
