"""What fusing saves beside attention on one GPU, and what torch.compile leaves on the table.

    python -m benchmarks.kernels.fusions                       # on a GPU; a few minutes
    python -m benchmarks.kernels.fusions --sizes base --minutes 2 --out DIR
    python -m benchmarks.kernels.fusions --dry                 # every call on a CPU, checked, not timed

Jitter and cross entropy are kernels of ours. The residual branch (layer scale, drop path, LayerNorm) and GELU have
none: their rows say how far torch.compile is from what the bytes they must move allow, all that a kernel could save.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.kernels.cross_entropy import linear_cross_entropy
from beitforge.kernels.pixels import jittered
from benchmarks.harness import Bench, Job, Row, Wrong, measured, options

NORMAL = ((0.5,) * 3, (0.5,) * 3)
QUESTION = "what fusing saves beside attention, on one GPU"
NOTE = (
    "{dtype}, forward and backward together, median and the fifths at either end. The limit is the larger of the bytes "
    "that must be moved and the products, {reached}. Memory: the most that was allocated on top of the inputs."
)
_FINDS = ("µs", "of the limit", "memory")


@dataclass(frozen=True)
class Size:
    """B images, S positions, width D and MLP width H, T masked patches in all, V visual tokens."""

    name: str
    images: int
    side: int
    positions: int
    width: int
    masked: int
    vocabulary: int

    @property
    def numbers(self) -> int:
        """In one pass over the hidden states."""
        return self.images * self.positions * self.width


SIZES = {
    "base": Size("base 224", 256, 224, 197, 768, 75, 8192),
    "large": Size("large 224", 128, 224, 197, 1024, 75, 8192),
    "dry": Size("dry", 2, 32, 17, 16, 6, 40),
}


@dataclass(frozen=True)
class Operation:
    """One operation on its leaves. eager: its definition, the measure of error. bytes: what it must read and write;
    flops: of its matrix products. Leaves get gradients where they require them."""

    leaves: list[Tensor]
    bytes: float
    flops: float
    eager: Callable[..., Tensor]
    providers: dict[str, Callable[..., Tensor]]


def pixels(size: Size, device: torch.device, dtype: torch.dtype) -> Operation:
    generator = torch.Generator().manual_seed(0)
    shape = (size.images, 3, size.side, size.side)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    factors = (0.6 + 0.8 * torch.rand(size.images, 3, generator=generator)).to(device)
    orders, greys = torch.arange(size.images, device=device) % 6, torch.full((size.images,), 120.0, device=device)

    def by(implementation: str) -> Callable[..., Tensor]:
        return lambda pixels: jittered(pixels, factors, orders, greys, NORMAL, dtype, implementation)

    moved = pixels.numel() * (1.0 + torch.finfo(dtype).bits / 8)
    return Operation([pixels], moved, 0.0, by("reference"), {"ours": by("fused")})


def loss(size: Size, device: torch.device, dtype: torch.dtype) -> Operation:
    generator = torch.Generator().manual_seed(0)
    rows = size.images * size.masked
    x = torch.randn(rows, size.width, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.02 * torch.randn(size.vocabulary, size.width, generator=generator)).to(device, dtype).requires_grad_()
    bias = torch.zeros(size.vocabulary, device=device, dtype=dtype, requires_grad=True)
    tokens = torch.randint(size.vocabulary, (rows,), generator=generator).to(device)
    counts = torch.ones(rows, device=device)

    def by(implementation: str) -> Callable[..., Tensor]:
        return lambda x, weight, bias: linear_cross_entropy(x, weight, bias, tokens, counts, implementation)[0] / rows

    def chunked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # torch ≥ 2.13
        return F.linear_cross_entropy(x, weight, tokens, linear_bias=bias, options=options)

    def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight, x, tokens, bias)

    moved = torch.finfo(dtype).bits / 8 * (2.0 * x.numel() + 2.0 * weight.numel())
    providers = {"ours": by("fused"), "torch's, in chunks": chunked, "Liger-Kernel": liger}
    return Operation([x, weight, bias], moved, 6.0 * x.numel() * size.vocabulary, by("reference"), providers)


def branch(size: Size, device: torch.device, dtype: torch.dtype) -> Operation:
    """x + keep · γ · y, then LayerNorm: both results are wanted, the sum goes on beside the branch."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.images, size.positions, size.width)
    x, y = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    gamma, scale, shift = (
        torch.full((size.width,), value, device=device, dtype=dtype, requires_grad=True) for value in (0.1, 1.0, 0.0)
    )
    keep = (torch.rand(size.images, generator=generator) > 0.1).to(device, dtype)

    def eager(x: Tensor, y: Tensor, gamma: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x + y * gamma * keep[:, None, None].to(x.dtype)
        return x + F.layer_norm(x, scale.shape, scale, shift, 1e-6)

    # forward: x and y in, the result out; backward: its gradient, x and y in, two gradients out
    moved = torch.finfo(dtype).bits / 8 * size.numbers * (3 + 5)
    return Operation([x, y, gamma, scale, shift], moved, 0.0, eager, {})


def gelu(size: Size, device: torch.device, dtype: torch.dtype) -> Operation:
    """gelu(x + bias): the backward ends in the bias's sum over all rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.images * size.positions, 4 * size.width, generator=generator).to(device, dtype)
    bias = torch.zeros(4 * size.width, device=device, dtype=dtype, requires_grad=True)
    moved = torch.finfo(dtype).bits / 8 * 4 * size.numbers * (2 + 3)
    return Operation([x.requires_grad_(), bias], moved, 0.0, lambda x, bias: F.gelu(x + bias), {})


OPERATIONS = {
    "linear + cross entropy": (loss, ("ours", "torch's, in chunks", "Liger-Kernel")),
    "jitter, normalise, cast": (pixels, ("ours",)),
    "residual, layer scale, drop path, LayerNorm": (branch, ()),
    "GELU with the bias's gradient": (gelu, ()),
}


def results(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of the leaves that have one for an output gradient that is not all alike."""
    leaves = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
    out = run(*leaves)
    if out.requires_grad:
        out.backward(_weights(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape).to(out.dtype)


def check(operation: Operation, name: str, run: Callable[..., Tensor]) -> None:
    """Error against float32 at most twice eager's, three times for gradients. Raises Wrong.

    A result of a coarser type than eager's (a loss in 16 bits, where eager's is float32) may also be off by that type's
    rounding. Where a compiler contracts products and sums a jittered pixel may be a level apart: let pass here;
    tests/kernels/test_pixels.py asks for every bit of ours.
    """
    whole = [leaf.float() if leaf.is_floating_point() else leaf for leaf in operation.leaves]
    exact, plain, found = (
        results(operation.eager, whole),
        *(results(r, operation.leaves) for r in (operation.eager, run)),
    )
    slack = 1e-3 if name.startswith("jitter") else 1e-6
    for number, (right, theirs, ours) in enumerate(zip(exact, plain, found, strict=True)):
        error, eager = (float((x.double() - right.double()).norm() / right.double().norm()) for x in (ours, theirs))
        rounding = torch.finfo(ours.dtype).eps / 2 if _coarser(ours.dtype, theirs.dtype) else 0.0
        if not error <= (3 if number else 2) * eager + slack + rounding:
            raise Wrong(f"{'gradient' if number else 'output'} by {error:.1e} (eager: {eager:.1e})")


def _coarser(one: torch.dtype, other: torch.dtype) -> bool:
    return torch.finfo(one).eps > torch.finfo(other).eps


@lru_cache(maxsize=1)  # the rows of an operation follow each other
def prepared(size: Size, name: str, device: torch.device, dtype: torch.dtype) -> Operation:
    """The operation with its tensors."""
    return OPERATIONS[name][0](size, device, dtype)


def measure(size: Size, name: str, provider: str, bench: Bench) -> Row:
    """Right first, then microseconds of forward and backward together, and the memory on top."""
    operation = prepared(size, name, bench.device, bench.dtype)
    run = {"eager": operation.eager, **operation.providers}.get(provider)
    if run is None:
        run = bench.compile(operation.eager)
    check(operation, name, run)
    weights = _weights(run(*operation.leaves).detach())

    def both() -> None:
        out = run(*operation.leaves)
        if out.requires_grad:
            out.backward(weights)

    both()
    memory = bench.memory(both)
    times = bench.time(both, operation.leaves)
    copy, product = bench.rates()
    limit = 1e3 * max(operation.bytes / copy, operation.flops / product)
    share = "not timed" if math.isnan(times.median) else f"{limit / times.median:.0%}"
    return {"µs": times.cell("µs"), "of the limit": share, "memory": f"{memory / 2**20:.0f} MiB", "_ms": times.median}


def jobs(sizes: tuple[str, ...], operations: tuple[str, ...] = tuple(OPERATIONS)) -> list[Job]:
    """A row for each size, operation and provider."""
    found = []
    for size in (SIZES[size] for size in sizes):
        for name in operations:
            for provider in ("eager", *OPERATIONS[name][1], "eager, compiled"):
                known = {"size": size.name, "operation": name, "provider": provider}
                seconds = 5.0 if provider.endswith("compiled") else 1.5
                run = partial(measure, size, name, provider)
                found.append(Job(known, _FINDS, seconds, run, provider.endswith("compiled")))
    return found


def ratios(rows: list[Row]) -> dict[str, float]:
    """Each other provider's time over ours, where there is one of ours."""
    found: dict[str, float] = {}
    for size, job in dict.fromkeys((row["size"], row["operation"]) for row in rows):
        here = [row for row in rows if (row["size"], row["operation"]) == (size, job) and "_ms" in row]
        times = {str(row["provider"]): float(row["_ms"]) for row in here}  # type: ignore[arg-type]
        ours = times.pop("ours", None)
        found |= {f"{size}, {job}: {name} / ours": time / ours for name, time in times.items() if ours}
    return found


def note(bench: Bench) -> str:
    return NOTE.format(dtype=str(bench.dtype).removeprefix("torch."), reached=bench.reached())


def main() -> None:
    """The table."""
    asked = options("fusions", tuple(SIZES)[:-1], sys.argv[1:])
    list(measured("fusions", QUESTION, jobs(asked.sizes), asked, ratios, note(asked.bench)))


if __name__ == "__main__":
    main()
