"""What fusing saves beside attention on one GPU, and what torch.compile leaves on the table.

    python -m benchmarks.kernels.fusions            # on a GPU; a few minutes
    python -m benchmarks.kernels.fusions --dry      # every call on a CPU, checked against float64

Jitter and cross entropy are kernels of ours. The residual branch (layer scale, drop path, LayerNorm) and GELU have
none: their rows say how far torch.compile is from what the bytes they must move allow, all that a kernel could save.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.kernels.cross_entropy import linear_cross_entropy
from beitforge.kernels.pixels import jittered
from benchmarks.kernels.kernels import rates
from benchmarks.results import write

NORMAL = ((0.5,) * 3, (0.5,) * 3)


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


SIZES = (Size("base 224", 256, 224, 197, 768, 75, 8192), Size("large 224", 128, 224, 197, 1024, 75, 8192))
DRY = Size("dry", 2, 32, 17, 16, 6, 40)


@dataclass(frozen=True)
class Job:
    """One operation done in several ways. bytes: what it must read and write; flops: of its matrix products.

    run: provider to a function of the leaves; leaves get gradients where they require them.
    """

    name: str
    leaves: list[Tensor]
    bytes: float
    flops: float
    providers: dict[str, Callable[..., Tensor]]


def jobs(size: Size, device: torch.device, dtype: torch.dtype) -> list[Job]:
    """Every operation at a size, its providers by name; eager first, which is the measure of error."""
    return [
        _pixels(size, device, dtype),
        _loss(size, device, dtype),
        _branch(size, device, dtype),
        _gelu(size, device, dtype),
    ]


def _with_compiled(eager: Callable[..., Tensor], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    compiled = {"eager, compiled": torch.compile(eager, dynamic=False)} if device.type == "cuda" else {}
    return {"eager": eager, **compiled}


def _pixels(size: Size, device: torch.device, dtype: torch.dtype) -> Job:
    generator = torch.Generator().manual_seed(0)
    shape = (size.images, 3, size.side, size.side)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    factors = (0.6 + 0.8 * torch.rand(size.images, 3, generator=generator)).to(device)
    orders, greys = torch.arange(size.images, device=device) % 6, torch.full((size.images,), 120.0, device=device)

    def by(implementation: str) -> Callable[..., Tensor]:
        return lambda pixels: jittered(pixels, factors, orders, greys, NORMAL, dtype, implementation)

    providers = {**_with_compiled(by("reference"), device), "ours": by("fused")}
    moved = pixels.numel() * (1.0 + torch.finfo(dtype).bits / 8)
    return Job("jitter, normalise, cast", [pixels], moved, 0.0, providers)


def _loss(size: Size, device: torch.device, dtype: torch.dtype) -> Job:
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
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, weight, tokens, linear_bias=bias, options=options)

    providers = _with_compiled(by("reference"), device)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        providers["torch's, in chunks"] = chunked
    moved = torch.finfo(dtype).bits / 8 * (2.0 * x.numel() + 2.0 * weight.numel())
    return Job(
        "linear + cross entropy",
        [x, weight, bias],
        moved,
        6.0 * x.numel() * size.vocabulary,
        {**providers, "ours": by("fused")},
    )


def _branch(size: Size, device: torch.device, dtype: torch.dtype) -> Job:
    """x + keep · γ · y, then LayerNorm: both results are wanted, the sum goes on beside the branch."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.images, size.positions, size.width)
    x, y = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    gamma, scale, shift = (
        torch.full((size.width,), value, device=device, dtype=dtype, requires_grad=True) for value in (0.1, 1.0, 0.0)
    )
    keep = (torch.rand(size.images, generator=generator) > 0.1).to(device, dtype)

    def eager(x: Tensor, y: Tensor, gamma: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x + y * gamma * keep[:, None, None]
        return x + F.layer_norm(x, scale.shape, scale, shift, 1e-6)

    # forward: x and y in, the result out; backward: its gradient, x and y in, two gradients out
    moved = torch.finfo(dtype).bits / 8 * size.numbers * (3 + 5)
    return Job(
        "residual, layer scale, drop path, LayerNorm",
        [x, y, gamma, scale, shift],
        moved,
        0.0,
        _with_compiled(eager, device),
    )


def _gelu(size: Size, device: torch.device, dtype: torch.dtype) -> Job:
    """gelu(x + bias): the backward ends in the bias's sum over all rows."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(size.images * size.positions, 4 * size.width, generator=generator)
        .to(device, dtype)
        .requires_grad_()
    )
    bias = torch.zeros(4 * size.width, device=device, dtype=dtype, requires_grad=True)
    moved = torch.finfo(dtype).bits / 8 * 4 * size.numbers * (2 + 3)
    return Job(
        "GELU with the bias's gradient", [x, bias], moved, 0.0, _with_compiled(lambda x, bias: F.gelu(x + bias), device)
    )


def results(job: Job, provider: str, leaves: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of the leaves that have one for an output gradient that is not all alike."""
    leaves = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
    out = job.providers[provider](*leaves)
    if out.requires_grad:
        out.backward(_weights(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape).to(out.dtype)


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
        for a, b in zip(found, exact, strict=True)
    ]


def right(job: Job, provider: str) -> bool:
    """Error against float32 at most twice eager's, three times for gradients.

    Where a compiler contracts products and sums a jittered pixel may be a level apart: let pass here;
    tests/kernels/test_pixels.py asks for every bit of ours.
    """
    exact = results(job, "eager", [leaf.float() if leaf.is_floating_point() else leaf for leaf in job.leaves])
    plain, found = (errors(results(job, name, job.leaves), exact) for name in ("eager", provider))
    slack = 1e-3 if job.name.startswith("jitter") else 1e-6
    return all(e <= (3 if i else 2) * p + slack for i, (e, p) in enumerate(zip(found, plain, strict=True)))


def measure(job: Job, size: Size, best: tuple[float, float]) -> list[dict]:
    """A row a provider: right first, then microseconds of forward and backward together, and the memory on top."""
    from triton.testing import do_bench

    limit = 1e6 * max(job.bytes / best[0], job.flops / best[1])
    rows = []
    for provider, run in job.providers.items():
        torch.compiler.reset()
        row: dict = {"size": size.name, "operation": job.name, "provider": provider}
        if not right(job, provider):
            rows.append({**row, "µs": "wrong", "of the limit": "", "memory": "", "_µs": math.inf})
            continue

        weights = _weights(run(*job.leaves).detach())

        def both(run: Callable[..., Tensor] = run, weights: Tensor = weights) -> None:
            out = run(*job.leaves)
            if out.requires_grad:
                out.backward(weights)

        both()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        memory = torch.cuda.max_memory_allocated() - before
        middle, low, high = (
            1e3 * t for t in do_bench(both, rep=200, quantiles=[0.5, 0.2, 0.8], grad_to_none=job.leaves)
        )
        cells = {"µs": f"{middle:.0f} ({low:.0f}–{high:.0f})", "of the limit": f"{limit / middle:.0%}"}
        rows.append({**row, **cells, "memory": f"{memory / 2**20:.0f} MiB", "_µs": middle})
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Each other provider's time over ours, where there is one of ours."""
    found: dict[str, float] = {}
    for size, job in dict.fromkeys((row["size"], row["operation"]) for row in rows):
        times = {row["provider"]: row["_µs"] for row in rows if (row["size"], row["operation"]) == (size, job)}
        ours = times.pop("ours", math.inf)
        if math.isfinite(ours):
            found |= {
                f"{size}, {job}: {name} / ours": time / ours for name, time in times.items() if math.isfinite(time)
            }
    return found


def dry() -> None:
    """Every call on the CPU in float32, against float64 where it has gradients."""
    for job in jobs(DRY, torch.device("cpu"), torch.float32):
        exact = results(job, "eager", [leaf.double() if leaf.is_floating_point() else leaf for leaf in job.leaves])
        for provider in job.providers:
            worst = max(errors(results(job, provider, job.leaves), exact))
            assert worst < 1e-5, f"{job.name}: {provider} is wrong by {worst:.1e}"
            print(f"{job.name:45} {provider:20} {worst:.1e}")


def main() -> None:
    """The table, or the dry run."""
    if "--dry" in sys.argv:
        return dry()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.kernels.fusions needs a GPU; --dry checks every call without one")
    device = torch.device("cuda")
    rows: list[dict] = []
    best = rates(device)
    notes = [
        f"bf16, forward and backward together, median and the fifths at either end. The limit is the larger of the "
        f"bytes that must be moved and the products, at what this chip reached: copy {best[0] / 1e12:.2f} TB/s, "
        f"product {best[1] / 1e12:.0f} TFLOP/s. Memory: the most that was allocated on top of the inputs."
    ]
    for size in SIZES:
        for job in jobs(size, device, torch.bfloat16):
            rows += measure(job, size, best)
            torch.cuda.empty_cache()
        write("fusions", "what fusing saves beside attention, on one GPU", rows, ratios(rows), notes)
    return None


if __name__ == "__main__":
    main()
