"""The fused kernels against float64, with every gradient: in Triton's interpreter, or on the GPU where there is one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beitforge.kernels.attention import attention, chosen, expand_bias, pack, relative_index
from beitforge.kernels.attention.block_sizes import Blocks, Plan, choose
from beitforge.kernels.attention.reference import attention_reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# BLAS leaves floating-point flags behind that numpy reports of whatever comes next; the results are checked here
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    # of the interpreter of Triton < 3.7 over its own loops
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
# error against float64 of float32, float16 and (cast up before each product in the interpreter) bfloat16
BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.5e-2}
SHAPE = (197, 12, 64, torch.float32)  # S, A, K and type, for `chosen`
# S, A, K, B: from a single position to 384 px; head sizes that are no power of two
SHAPES = [
    (1, 1, 32, 2),
    (17, 2, 32, 2),
    (63, 2, 40, 2),
    (64, 1, 16, 1),
    (197, 1, 64, 2),
    (205, 1, 88, 1),
    (257, 1, 128, 1),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """One thread; and whatever is allocated is NaN until written, so that nothing unwritten goes unseen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a long row in float32's small blocks takes minutes: above 64 positions it gets those of 16 bits."""
    from beitforge.kernels.attention import operator

    def plan(capability: tuple[int, int], positions: int, head_size: int, float32: bool, store: bool) -> Plan:
        return choose(capability, positions, head_size, float32 and (DEVICE == "cuda" or positions <= 64), store)

    monkeypatch.setattr(operator, "choose", plan)


def surrounded(tensor: Tensor) -> Tensor:
    """The tensor within memory that is NaN on both sides: a read beyond its ends shows."""
    around = torch.full((tensor.numel() + 512,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inner = around[256 : 256 + tensor.numel()].view_as(tensor)
    inner.copy_(tensor)
    return inner


def inputs(s: int, a: int, k: int, b: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, a bias that matters, and what the output is weighted with."""
    generator = torch.Generator().manual_seed(s)
    qkv = torch.randn(b, s, 3, a, k, generator=generator).to(DEVICE, dtype)
    bias = 2 * torch.randn(a, s, s, generator=generator).to(DEVICE)
    return surrounded(qkv), surrounded(bias), torch.randn(b, s, a, k, generator=generator).to(DEVICE, dtype)


def results(run, qkv: Tensor, bias: Tensor | None, weight: Tensor) -> list[Tensor]:
    """Output, then the gradients of q, k, v and, with a bias, of the bias."""
    leaves = [qkv.detach().requires_grad_()]
    leaves += [] if bias is None else [bias.detach().requires_grad_()]
    out = run(leaves[0], leaves[1] if bias is not None else None)
    out.backward(weight)
    return [out.detach(), *leaves[0].grad.unbind(2), *(leaf.grad for leaf in leaves[1:])]


def fused(qkv: Tensor, bias: Tensor | None) -> Tensor:
    return attention(qkv, bias, implementation="fused")


def compare(qkv: Tensor, bias: Tensor | None, weight: Tensor, bound: float) -> None:
    exact = results(attention_reference, qkv.double(), None if bias is None else bias.double(), weight.double())
    for name, ours, theirs in zip(
        ("out", "q", "k", "v", "bias"), results(fused, qkv, bias, weight), exact, strict=False
    ):
        assert ours.isfinite().all(), f"{name} is not finite"
        apart = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1)
        assert apart < bound, f"{name} differs by {apart:.1e}"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype, large_blocks):
    qkv, bias, weight = inputs(*shape, dtype)
    compare(qkv, bias, weight, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_long_rows(dtype, large_blocks):
    """384 px: the bias gradient has a kernel of its own."""
    qkv, bias, weight = inputs(577, 1, 64, 1, dtype)
    assert not choose((9, 0), 577, 64, False).held and choose((9, 0), 197, 64, False).held
    compare(qkv, bias, weight, BOUNDS[dtype])


@pytest.mark.parametrize("s", [17, 64, 97])
def test_without_a_bias(s):
    qkv, _, weight = inputs(s, 2, 32, 2, torch.float32)
    compare(qkv, None, weight, BOUNDS[torch.float32])


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
@pytest.mark.parametrize("s", [17, 34, 63])
def test_nothing_beyond_the_rows_is_read(s, monkeypatch):
    """Not even where it is multiplied by zero: no product has a number that is not finite."""
    multiply, found = np.matmul, []

    def product(a: np.ndarray, b: np.ndarray, **named: Any) -> np.ndarray:
        found.append(bool(np.isfinite(a).all() and np.isfinite(b).all()))
        return multiply(a, b, **named)

    monkeypatch.setattr(np, "matmul", product)
    qkv, bias, weight = inputs(s, 1, 32, 1, torch.float32)
    compare(qkv, bias, surrounded(weight), BOUNDS[torch.float32])
    assert found and all(found)


@pytest.fixture(params=["summed", "stored"])
def either_design(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEITFORGE_BACKWARD", request.param)


@pytest.mark.parametrize("images", [1, 2, 5, 7])
def test_the_bias_gradient_is_summed_over_chunks_of_images(images, either_design, monkeypatch):
    """Whatever the chunks, whole or not, every image counts once."""
    from beitforge.kernels.attention import operator

    monkeypatch.setattr(operator, "multiprocessors", lambda _: 4)
    assert operator.images_of_program(images, 2, 8) == {1: 1, 2: 1, 5: 2, 7: 2}[images]
    qkv, bias, weight = inputs(34, 2, 32, images, torch.float32)
    compare(qkv, bias, weight, BOUNDS[torch.float32])


@pytest.mark.parametrize("held", [True, False], ids=["in registers", "own kernel"])
@pytest.mark.parametrize("blocks", [Blocks(16, 16, 1), Blocks(32, 64, 2), Blocks(64, 32, 3)], ids=str)
def test_any_blocks_give_the_same(blocks, held, monkeypatch):
    """What a chip is given is a matter of speed."""
    from beitforge.kernels.attention import operator

    other = dataclasses.replace(blocks, columns=32)  # not those of the other kernels: tiles of its own
    monkeypatch.setattr(operator, "choose", lambda *_: Plan(blocks, other, blocks, held))
    qkv, bias, weight = inputs(75, 1, 32, 2, torch.float32)
    compare(qkv, bias, weight, BOUNDS[torch.float32])


def test_two_runs_are_bitwise_equal():
    qkv, bias, weight = inputs(197, 1, 64, 2, torch.float16)
    first, second = (results(fused, qkv, bias, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_logits_and_biases(either_design):
    """Scores of hundreds: the exponentials are taken from the largest."""
    qkv, bias, weight = inputs(65, 1, 32, 2, torch.float32)
    compare(surrounded(qkv * 6), bias * 10, weight, 2e-5)


@pytest.mark.parametrize("size", [9_000.0, -9_000.0, 1e6])
def test_a_bias_beyond_half_precision(size):
    """Tiles in float16 hold bias · √K up to 65,504: rows that reach beyond are lowered, and stay finite and right."""
    qkv, bias, weight = inputs(33, 2, 64, 2, torch.float16)
    bias[0, 3, :], bias[1, :, 5], bias[1, 7, 9] = size, size, 2 * size
    compare(qkv, bias, weight, BOUNDS[torch.float16])


@pytest.mark.parametrize("grid", [(3, 5), (1, 9), (5, 5)], ids=str)
def test_the_table_of_any_grid_gets_its_gradient(grid):
    """Through expand_bias, shared by three layers and packed once."""
    rows, columns = grid
    generator = torch.Generator().manual_seed(7)
    table = torch.randn((2 * rows - 1) * (2 * columns - 1) + 3, 2, generator=generator).to(DEVICE)
    index = relative_index(rows, columns).to(DEVICE)
    qkv, _, weight = inputs(rows * columns + 1, 2, 32, 2, torch.float32)

    def of_table(implementation: str, dtype: torch.dtype) -> Tensor:
        leaf = table.to(dtype).requires_grad_()
        bias = expand_bias(leaf, index)
        packed = pack(bias, 32, dtype, implementation)
        out = sum(attention(qkv.to(dtype) * n, bias, packed, implementation) for n in (1, 2, 3))
        return torch.autograd.grad(out, leaf, weight.to(dtype))[0]

    ours, exact = of_table("fused", torch.float32), of_table("reference", torch.float64)
    assert (ours.double() - exact).norm() / exact.norm() < 2e-6


def test_operators_are_whole():
    """Schema, fake tensors, autograd registration, tracing: PyTorch's own check of each operator."""
    from beitforge.kernels.attention import operator

    qkv, bias, weight = inputs(20, 2, 16, 2, torch.float32)
    packed = operator.pack_bias(bias, 16, torch.float32)
    out, lse = operator._attention(qkv, bias, packed)
    leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    torch.library.opcheck(operator._pack, (bias, 16, torch.float32))
    torch.library.opcheck(operator._attention, (*leaves, packed))
    torch.library.opcheck(operator._attention, (leaves[0], None, None))
    torch.library.opcheck(operator._backward, (weight, qkv, out, lse, packed, True))
    torch.library.opcheck(operator._backward, (weight, qkv, out, lse, None, False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiles_without_a_graph_break():
    """One graph forward, its backward traced too; the same numbers."""
    qkv, bias, weight = inputs(20, 2, 16, 2, torch.float32)

    def layer(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(qkv * 1.5, bias, pack(bias, 16, qkv.dtype, "fused"), "fused").sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, qkv, bias, weight), results(layer, qkv, bias, weight), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    qkv, bias, weight = inputs(20, 2, 16, 2, torch.float32)
    packed = pack(bias, 16, torch.float32, "fused")

    def again(qkv: Tensor, bias: Tensor) -> Tensor:
        return checkpoint(attention, qkv, bias, packed, "fused", use_reentrant=reentrant)

    for ours, theirs in zip(results(again, qkv, bias, weight), results(fused, qkv, bias, weight), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("positions", ["relative_shared", "relative"])
def test_selective_checkpointing_of_an_encoder(positions):
    """Bit for bit what it computes without, by the kernels; attention runs forward once."""
    from beitforge.pipeline.config.fields import Size
    from beitforge.pipeline.config.settings import Model
    from beitforge.pipeline.model.beit import Beit
    from tests.pipeline.model.test_beit import Operators

    model = Model(input_size=Size(12, 12), patch_size=3, layers=2, width=32, heads=2, positions=positions)
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask, found = torch.arange(16, device=DEVICE).expand(2, -1) < 5, []
    for checkpointing in ("none", "selective"):
        beit = Beit(dataclasses.replace(model, kernels="fused"), 11, seed=0).to(DEVICE)
        beit.checkpointing = checkpointing
        logits, _, _ = beit(pixels, mask, 5)
        with Operators() as ran:
            logits.square().mean().backward()
        found.append([logits, *(parameter.grad for parameter in beit.parameters())])
        assert ran.counts["beitforge::attention_backward"] == 2 and ran.counts["beitforge::attention"] == 0
        assert ran.counts["aten::gelu"] == (2 if checkpointing == "selective" else 0)
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_what_runs_where(monkeypatch):
    """auto never runs the interpreter; asked for, fused says why it cannot run."""
    cpu = torch.device("cpu")
    assert chosen("auto", cpu, *SHAPE) == chosen("sdpa", cpu, *SHAPE) == "sdpa"
    assert chosen("reference", torch.device("cuda"), *SHAPE) == "reference"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="need a GPU and Triton, not cpu; use auto, or sdpa"):
        chosen("fused", cpu, *SHAPE)
    with pytest.raises(ValueError, match="takes auto, fused, sdpa or reference"):
        chosen("flash", cpu, *SHAPE)


def test_wider_heads_are_left_to_sdpa():
    assert chosen("auto", torch.device("cuda"), 17, 2, 144, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="heads of up to 128, not 144"):
        chosen("fused", torch.device("cuda"), 17, 2, 144, torch.bfloat16)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_cuda_graph_replays_forward_and_backward():
    qkv, bias, weight = inputs(197, 2, 64, 2, torch.bfloat16)
    samples = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(lambda qkv, bias: attention(qkv, bias, None, "fused"), samples)
    for ours, theirs in zip(results(graphed, qkv, bias, weight), results(fused, qkv, bias, weight), strict=True):
        assert torch.equal(ours, theirs)


def test_the_bias_lies_as_a_gpu_wants_it():
    """PyTorch's fused attention refuses a bias whose last dimension is not dense."""
    assert expand_bias(torch.zeros(52, 3), relative_index(4, 4)).is_contiguous()


def test_a_bias_packed_for_another_type_is_refused():
    qkv, bias, _ = inputs(20, 2, 16, 1, torch.float16)
    with pytest.raises(ValueError, match="packed for another type"):
        attention(qkv, bias, pack(bias, 16, torch.float32, "fused"), "fused")


def test_a_whole_block_may_be_forbidden():
    qkv, bias, weight = inputs(97, 1, 16, 1, torch.float32)
    bias[:, :, :64] = float("-inf")
    compare(qkv, bias, weight, 1e-5)
