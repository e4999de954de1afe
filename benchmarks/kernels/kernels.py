"""Attention with a learned bias on one GPU: ours beside everything else that can do it, and what cannot.

    python -m benchmarks.kernels.kernels            # on a GPU; some minutes; shapes by name: "base 224"
    python -m benchmarks.kernels.kernels --dry      # every provider's call on a CPU, checked against float64

All providers run in one process on the same tensors. What is wrong has no speed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from beitforge.kernels.attention import attention, expand_bias, pack, relative_index
from beitforge.kernels.attention.reference import attention_reference
from benchmarks.results import write

Run = Callable[[Tensor, Tensor], Tensor]  # qkv [B, S, 3, A, K] and table [R, A] to [B, S, A, K]
GRADIENT, DETACHED, NONE = "with its gradient", "no gradient", "no bias"


@dataclass(frozen=True)
class Shape:
    """B images of a grid of patches and [S], A heads of K."""

    name: str
    images: int
    grid: tuple[int, int]
    heads: int
    head_size: int

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1] + 1

    @property
    def flops(self) -> float:
        """Of the forward's two products; the backward has five."""
        return 4.0 * self.images * self.heads * self.positions**2 * self.head_size

    @property
    def bytes(self) -> float:
        """What the forward must read and write in 16 bits; forward and backward together three times as much."""
        return 2.0 * 4 * self.images * self.positions * self.heads * self.head_size


SHAPES = (
    Shape("base 224", 256, (14, 14), 12, 64),
    Shape("large 224", 256, (14, 14), 16, 64),
    Shape("giant 224", 128, (16, 16), 16, 88),
    Shape("base 384", 64, (24, 24), 12, 64),
)
DRY = (Shape("dry", 2, (4, 5), 2, 32),)


@dataclass(frozen=True)
class Provider:
    """One way to compute it. bias: GRADIENT, DETACHED or NONE."""

    name: str
    bias: str
    run: Run


def providers(shape: Shape, device: torch.device) -> list[Provider]:
    """Ours, PyTorch's backends, FlexAttention and eager code; those that take no bias as the mark to reach."""
    index = relative_index(*shape.grid).to(device)

    def fused(qkv: Tensor, table: Tensor) -> Tensor:
        bias = expand_bias(table, index)
        return attention(qkv, bias, pack(bias, shape.head_size, qkv.dtype, "fused"), "fused")

    def sdpa(backend: SDPBackend, bias: str) -> Run:
        def run(qkv: Tensor, table: Tensor) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mask = None
            if bias != NONE:
                mask = expand_bias(table if bias == GRADIENT else table.detach(), index).to(q.dtype)[None]
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        return run

    def eager(qkv: Tensor, table: Tensor) -> Tensor:
        return attention_reference(qkv, expand_bias(table, index))

    backends = SDPBackend
    listed = [
        Provider("ours", GRADIENT, fused),
        Provider("SDPA efficient", GRADIENT, sdpa(backends.EFFICIENT_ATTENTION, GRADIENT)),
        Provider("SDPA math", GRADIENT, sdpa(backends.MATH, GRADIENT)),
        Provider("SDPA cuDNN", DETACHED, sdpa(backends.CUDNN_ATTENTION, DETACHED)),
        Provider("SDPA flash", NONE, sdpa(backends.FLASH_ATTENTION, NONE)),
        Provider("SDPA cuDNN", NONE, sdpa(backends.CUDNN_ATTENTION, NONE)),
        Provider("Flex, table", GRADIENT, flex(index, "table", device)),
        Provider("Flex, dense bias", GRADIENT, flex(index, "dense", device)),
        Provider("eager", GRADIENT, eager),
    ]
    if device.type == "cuda":
        listed.append(Provider("eager, compiled", GRADIENT, torch.compile(eager, dynamic=False)))
    return listed


def flex(index: Tensor, capture: str, device: torch.device) -> Run:
    """FlexAttention that reads the table itself, or the expanded bias; compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dense = expand_bias(table, index)

        def of_table(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[index[i, j], h]

        def of_dense(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + dense[h, i, j]

        found = flex_attention(q, k, v, score_mod=of_table if capture == "table" else of_dense)
        assert isinstance(found, Tensor), "flex_attention gives one tensor unless asked for more"
        return found.transpose(1, 2)

    return torch.compile(run, dynamic=False) if device.type == "cuda" else run


@dataclass(frozen=True)
class Exact:
    """float64 results: output and gradient of qkv of the first and last two images, gradient of the table over all."""

    out: Tensor
    dqkv: Tensor
    dtable: Tensor


def exact(shape: Shape, biased: bool, qkv: Tensor, table: Tensor, weight: Tensor) -> Exact:
    """By the reference, two images at a time."""
    dtable, ends = torch.zeros_like(table, dtype=torch.float64), []
    for first in range(0, len(qkv), 2):
        two = slice(first, first + 2)
        results = _with_gradients(
            lambda q, t: attention_reference(q, _bias(t, shape) if biased else None),
            qkv[two].double(),
            table.double(),
            weight[two].double(),
        )
        dtable += results[2]
        if first in (0, len(qkv) - 2):
            ends.append(results)
    return Exact(torch.cat([end[0] for end in ends]), torch.cat([end[1] for end in ends]), dtable)


def errors(provider: Provider, right: Exact, qkv: Tensor, table: Tensor, weight: Tensor) -> dict[str, float]:
    """Relative errors of the whole batch that is timed; of output and qkv at its ends."""
    out, dqkv, dtable = _with_gradients(provider.run, qkv, table, weight)
    ends = [0, 1, -2, -1] if len(qkv) > 2 else [0, 1]
    pairs = [("out", out[ends], right.out), ("qkv", dqkv[ends], right.dqkv)]
    pairs += [("table", dtable, right.dtable)] if provider.bias == GRADIENT else []
    return {name: float((ours.double() - theirs).norm() / theirs.norm()) for name, ours, theirs in pairs}


def _bias(table: Tensor, shape: Shape) -> Tensor:
    return expand_bias(table, relative_index(*shape.grid).to(table.device))


def _with_gradients(run: Run, qkv: Tensor, table: Tensor, weight: Tensor) -> list[Tensor]:
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = run(qkv, table)
    out.backward(weight)
    none = torch.zeros_like(table) if table.grad is None else table.grad
    assert qkv.grad is not None, "qkv always takes part"
    return [out.detach(), qkv.grad, none]


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape.grid
    sizes = (shape.images, shape.positions, 3, shape.heads, shape.head_size)
    qkv = torch.randn(sizes, generator=generator).to(device, dtype)
    table = 0.5 * torch.randn((2 * rows - 1) * (2 * columns - 1) + 3, shape.heads, generator=generator)
    weight = torch.randn(sizes[:2] + sizes[3:], generator=generator).to(device, dtype)
    return qkv, table.to(device), weight


def accepted(found: dict[str, float], plain: dict[str, float]) -> bool:
    """Error at most twice that of eager code in the same precision, three times for gradients."""
    return all(error <= (2 if name == "out" else 3) * plain[name] + 1e-7 for name, error in found.items())


def rates(device: torch.device) -> tuple[float, float]:
    """What the chip does at best: bytes/s of a large copy, and FLOP/s of a large bf16 product."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    copy = do_bench(lambda: source.clone(), return_mode="median")
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = do_bench(lambda: square @ square, return_mode="median")
    return 2 * source.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


def timed(provider: Provider, qkv: Tensor, table: Tensor, weight: Tensor) -> dict[str, tuple[float, float, float]]:
    """Microseconds of forward, backward and both: median, and the fifths at either end."""
    from triton.testing import do_bench

    leaves = [qkv.detach().requires_grad_(), table.detach().requires_grad_()]

    def both() -> None:
        provider.run(*leaves).backward(weight)

    out = provider.run(*leaves)
    runs = {
        "forward": lambda: provider.run(*leaves),
        "backward": lambda: out.backward(weight, retain_graph=True),
        "both": both,
    }
    ends = [0.5, 0.2, 0.8]
    measured = {name: do_bench(run, rep=200, quantiles=ends, grad_to_none=leaves) for name, run in runs.items()}
    return {name: tuple(1e3 * t for t in times) for name, times in measured.items()}


def measure(shape: Shape, device: torch.device, best: tuple[float, float]) -> list[dict]:
    """A row a provider: right first, then fast."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    torch._functorch.config.donated_buffer = False  # the backward alone runs many times on one graph
    tensors = inputs(shape, device, torch.bfloat16)
    listed = providers(shape, device)
    eager = next(provider for provider in listed if provider.name == "eager")
    plain = Provider("plain", NONE, lambda qkv, _: attention_reference(qkv, None))
    rights = {bias: exact(shape, bias != NONE, *tensors) for bias in (GRADIENT, NONE)}
    rights[DETACHED] = rights[GRADIENT]
    with_bias, without = errors(eager, rights[GRADIENT], *tensors), errors(plain, rights[NONE], *tensors)
    limit = 1e6 * max(7 * shape.flops / 2 / best[1], 3 * shape.bytes / best[0])
    rows = []
    for provider in listed:
        torch.compiler.reset()  # Dynamo gives up on code that it has compiled for eight shapes
        row: dict = {"shape": shape.name, "provider": provider.name, "bias": provider.bias}
        try:
            found = errors(provider, rights[provider.bias], *tensors)
            if not accepted(found, without if provider.bias == NONE else with_bias):
                rows.append({**row, **dict.fromkeys(("forward µs", "backward µs", "both µs", "of the limit"), "wrong")})
                continue
            times = timed(provider, *tensors)
        except (RuntimeError, NotImplementedError, OutOfResources, CompilationError) as error:
            reason = str(error).splitlines()[0][:60]
            rows.append({**row, **dict.fromkeys(("forward µs", "backward µs", "both µs", "of the limit"), reason)})
            continue
        cells = {f"{name} µs": f"{t[0]:.0f} ({t[1]:.0f}–{t[2]:.0f})" for name, t in times.items()}
        rows.append({**row, **cells, "of the limit": f"{limit / times['both'][0]:.0%}", "_both": times["both"][0]})
        torch.cuda.empty_cache()
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """Ours against each other provider, forward and backward together, by shape."""
    found = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        times = {(r["provider"], r["bias"]): r["_both"] for r in rows if r["shape"] == shape and "_both" in r}
        ours = times.pop(("ours", GRADIENT), None)
        for (provider, bias), time in times.items() if ours else ():
            found[f"{shape}: {provider}, {bias} / ours"] = time / ours
    return found


def dry() -> None:
    """Every call on the CPU in float32, against float64."""
    for shape in DRY:
        tensors = inputs(shape, torch.device("cpu"), torch.float32)
        for provider in providers(shape, torch.device("cpu")):
            try:
                found = errors(provider, exact(shape, provider.bias != NONE, *tensors), *tensors)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                print(f"{provider.name:20} {provider.bias:18} not here: {str(error).splitlines()[0][:70]}")
                continue
            assert max(found.values()) < 1e-5, f"{provider.name} is wrong: {found}"
            print(f"{provider.name:20} {provider.bias:18} " + " ".join(f"{n} {e:.1e}" for n, e in found.items()))


def main() -> None:
    """The table, or the dry run."""
    if "--dry" in sys.argv:
        return dry()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.kernels.kernels needs a GPU; --dry checks every call without one")
    device = torch.device("cuda")
    best = rates(device)
    wanted = [word for word in sys.argv[1:] if not word.startswith("--")]
    rows: list[dict] = []
    notes = [
        f"bf16. Median of forward, backward and both in µs, with the fifths at either end. The limit is the larger of "
        f"bytes and products at what this chip reached: copy {best[0] / 1e12:.2f} TB/s, product {best[1] / 1e12:.0f} "
        "TFLOP/s. "
        "A provider whose error is over twice eager's (three times for gradients) has no speed."
    ]
    for shape in (shape for shape in SHAPES if not wanted or shape.name in wanted):
        rows += measure(shape, device, best)
        write("kernels", "attention with BEiT's bias on one GPU", rows, ratios(rows), notes)  # what is done is kept
    return None


if __name__ == "__main__":
    main()
