"""Is every kernel of ours right on this chip, and the same bits twice?

    python -m benchmarks.kernels.correctness          # on a GPU; under a minute
    python -m benchmarks.kernels.correctness --dry    # on a CPU, Triton interpreted

Attention with the gradients of qkv and bias, at the sizes of the presets and at odd ones; cross entropy with its
gradients; the jitter, which must give the reference's bits.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from beitforge.kernels.attention import attention
from beitforge.kernels.attention.reference import attention_reference
from beitforge.kernels.pixels import jittered
from benchmarks.harness import Bench, Job, Row, Wrong, measured, options
from benchmarks.kernels.attention_providers import design
from benchmarks.kernels.fusions import NORMAL, SIZES, loss, results

QUESTION = "is every kernel right on this chip?"
NOTE = (
    "Errors against float64 over those of plain {dtype} code (a kernel is wrong above 2, a gradient's above 3); "
    "repeatable: three runs give the same bits."
)
# images, positions, heads, head size
SHAPES = {
    "base 224": (8, 197, 12, 64),
    "large 224": (8, 197, 16, 64),
    "giant 224": (4, 257, 16, 88),
    "base 384": (4, 577, 12, 64),
    "odd: 1 position": (3, 1, 2, 32),
    "odd: 65 positions": (5, 65, 3, 48),
    "odd: 131 positions": (3, 131, 2, 128),
}
DRY_SHAPES = {"dry": (2, 21, 2, 32), "dry, odd": (1, 1, 2, 16)}
_BOTH = ("base 224", "base 384", "odd: 65 positions", "dry")  # by the second design of the backward as well
_FINDS = ("error", "repeatable")


def _compare(found: list[Tensor], plain: list[Tensor], exact: list[Tensor], names: tuple[str, ...]) -> str:
    """The errors over plain's, or a quarter of the output's unit if they are less, in words. Raises Wrong above 2, of a
    gradient 3."""
    words = []
    for name, ours, theirs, right in zip(names, found, plain, exact, strict=True):
        norm = right.double().norm().clamp(min=1e-2)  # one position: scores have no gradient, and plain code no error
        error, eager = (float((x.double() - right.double()).norm() / norm) for x in (ours, theirs))
        share = error / max(eager, torch.finfo(found[0].dtype).eps / 4)
        if not share <= (2 if name == names[0] else 3):
            raise Wrong(f"{name} by {error:.1e}, {share:.1f} × plain code's {eager:.1e}")
        words.append(f"{name} {share:.2f}")
    return ", ".join(words)


def _repeats(first: list[Tensor], again: list[list[Tensor]]) -> None:
    if not all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True)):
        raise Wrong("two runs give other bits")


def attention_case(shape: tuple[int, int, int, int], stored: bool, bench: Bench) -> Row:
    """Output and gradients of qkv and bias, by either backward."""
    with design(stored):
        return _attention_case(shape, bench)


def _attention_case(shape: tuple[int, int, int, int], bench: Bench) -> Row:
    images, positions, heads, size = shape
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(images, positions, 3, heads, size, generator=generator).to(bench.device, bench.dtype)
    bias = 0.5 * torch.randn(heads, positions, positions, generator=generator).to(bench.device)
    weight = torch.randn(images, positions, heads, size, generator=generator).to(bench.device, bench.dtype)

    def run(fused: bool, double: bool = False) -> list[Tensor]:
        q, b = (x.double() if double else x for x in (qkv, bias))
        q, b = q.detach().requires_grad_(), b.detach().requires_grad_()
        out = attention(q, b, implementation="fused") if fused else attention_reference(q, b)
        out.backward(weight.to(out.dtype))
        assert q.grad is not None and b.grad is not None, "both take part"
        return [out.detach(), q.grad, b.grad]

    found = run(True)
    words = _compare(found, run(False), run(False, double=True), ("output", "qkv", "bias"))
    _repeats(found, [run(True), run(True)])
    return {"error": words, "repeatable": "yes"}


def loss_case(size: str, bench: Bench) -> Row:
    """The mean cross entropy and its gradients."""
    operation = loss(SIZES[size], bench.device, bench.dtype)
    found = results(operation.providers["ours"], operation.leaves)
    plain = results(operation.eager, operation.leaves)
    exact = results(operation.eager, [leaf.double() for leaf in operation.leaves])
    words = _compare(found, plain, exact, ("loss", "x", "weight", "bias"))
    _repeats(found, [results(operation.providers["ours"], operation.leaves) for _ in range(2)])
    return {"error": words, "repeatable": "yes"}


def pixels_case(dtype: torch.dtype, bench: Bench) -> Row:
    """Every bit of the reference, for all orders and odd sizes."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (12, 3, 37, 51), generator=generator, dtype=torch.uint8).to(bench.device)
    factors = (0.6 + 0.8 * torch.rand(12, 3, generator=generator)).to(bench.device)
    rest = (torch.arange(12, device=bench.device) % 6, torch.linspace(0, 255, 12, device=bench.device), NORMAL, dtype)
    found, again, right = (jittered(pixels, factors, *rest, by) for by in ("fused", "fused", "reference"))
    if not torch.equal(found, right):
        apart = int((found != right).sum())
        raise Wrong(f"{apart} of {right.numel()} numbers differ from the reference's")
    _repeats([found], [[again]])
    return {"error": "none: the reference's bits", "repeatable": "yes"}


def jobs(dry: bool = False) -> list[Job]:
    """A row a kernel and case."""
    found = []
    for name, shape in (DRY_SHAPES if dry else SHAPES).items():
        for stored in (False, True) if name in _BOTH else (False,):
            kernel = "attention, gradients of scores stored" if stored else "attention"
            known = {"kernel": kernel, "case": f"{name}: {' × '.join(map(str, shape))}"}
            found.append(Job(known, _FINDS, 2.0, partial(attention_case, shape, stored)))
    for size in ("dry",) if dry else ("base", "large"):
        known = {"kernel": "linear + cross entropy", "case": SIZES[size].name}
        found.append(Job(known, _FINDS, 2.0, partial(loss_case, size)))
    for dtype in (torch.float32, torch.float16) if dry else (torch.float32, torch.bfloat16, torch.float16):
        known = {"kernel": "jitter, normalise, cast", "case": str(dtype).removeprefix("torch.")}
        found.append(Job(known, _FINDS, 1.0, partial(pixels_case, dtype)))
    return found


def note(bench: Bench) -> str:
    return NOTE.format(dtype=str(bench.dtype).removeprefix("torch."))


def main() -> None:
    """The table."""
    asked = options("correctness", ("all",), sys.argv[1:])
    rows = list(
        measured("correctness", QUESTION, jobs(asked.sizes == ("dry",)), asked, lambda _: {}, note(asked.bench))
    )
    sys.exit(int(any(row["repeatable"] != "yes" for row in rows)))


if __name__ == "__main__":
    main()
