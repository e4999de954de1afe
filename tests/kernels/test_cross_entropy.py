"""Linear + cross entropy without stored logits against float64, with every gradient, and as a PyTorch operator."""

import pytest
import torch
from torch import Tensor

from beitforge.kernels.cross_entropy import linear_cross_entropy

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
# what is allowed on top of twice (gradients: three times) the reference's error in the same type; the interpreter cuts
# bfloat16 off instead of rounding it
SLACK = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3 if DEVICE == "cuda" else 8e-3}


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    bias = torch.randn(vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (rows,), generator=generator)
    counts = (torch.rand(rows, generator=generator) < 0.8).float()
    return [*(tensor.to(DEVICE, dtype) for tensor in (x, weight, bias)), tokens.to(DEVICE), counts.to(DEVICE)]


def results(tensors: list[Tensor], implementation: str, scale: float = 1.0) -> list[Tensor]:
    """Loss, right, and the gradients of x, weight and bias for `scale` times the loss."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    loss, right = linear_cross_entropy(*leaves, *tensors[3:], implementation)
    (scale * loss).backward()
    return [loss.detach(), right, *(leaf.grad for leaf in leaves)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 2), (5, 16, 33), (37, 32, 1000), (9, 16, 8192 + 77)], ids=str)
def test_loss_and_gradients(shape, dtype):
    tensors = inputs(*shape, dtype)
    exact = results([*(tensor.double() for tensor in tensors[:3]), *tensors[3:]], "reference")
    ours, plain = (errors(results(tensors, name), exact) for name in ("fused", "reference"))
    for i, name in enumerate(("loss", "right", "x", "weight", "bias")):
        bound = (2 if i < 2 else 3) * plain[i] + SLACK[dtype]
        assert ours[i] <= bound, f"{name}: {ours[i]:.1e}, plain {plain[i]:.1e}"


@pytest.mark.parametrize("at_a_time", [1, 4, 37, 64])
def test_any_number_of_rows_at_a_time(at_a_time, monkeypatch):
    from beitforge.kernels.cross_entropy import operator

    tensors = inputs(37, 16, 50, torch.float32)
    whole = results(tensors, "fused")
    monkeypatch.setattr(operator, "_LOGITS", at_a_time * 50)
    for ours, theirs in zip(results(tensors, "fused"), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_logits_are_kept(monkeypatch):
    """What autograd saves: gradients of the sizes of x, weight and bias, nothing of T · V numbers."""
    from beitforge.kernels.cross_entropy import operator

    monkeypatch.setattr(operator, "_LOGITS", 16 * 300)
    tensors = inputs(128, 8, 300, torch.float32)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
        linear_cross_entropy(*leaves, *tensors[3:], "fused")[0].backward()
    assert sorted(saved) == sorted(tensor.numel() for tensor in tensors[:3])


def test_small_gradients_survive_half_precision():
    """The gradient of a mean over many rows, as loss scaling sees it: scaled up and down outside of float16."""
    tensors = inputs(64, 16, 500, torch.float16)
    exact = results([*(tensor.double() for tensor in tensors[:3]), *tensors[3:]], "reference", 1e-3)
    assert max(errors(results(tensors, "fused", 1e-3), exact)[2:]) < 1e-2


def test_a_sum_over_many_rows_stays_in_range():
    """Features far from zero: the weight's gradient is a sum beyond float16 where its mean is not."""
    x, weight, bias, tokens, counts = inputs(256, 8, 4, torch.float16)
    x, weight, bias = x + 600, weight / 1000, torch.zeros_like(bias)
    tokens, counts = torch.zeros_like(tokens), torch.ones_like(counts)
    exact = results([x.double(), weight.double(), bias.double(), tokens, counts], "reference", 1 / 256)
    assert exact[3].abs().max() * 256 > 65504
    assert max(errors(results([x, weight, bias, tokens, counts], "fused", 1 / 256), exact)[3:]) < 1e-2


def test_rows_that_do_not_count():
    tensors = inputs(12, 8, 20, torch.float32)
    tensors[4] = torch.zeros(12, device=DEVICE)
    for found in results(tensors, "fused"):
        assert not found.any()


def test_a_logit_that_is_not_a_number_is_not_hidden():
    tensors = inputs(4, 8, 20, torch.float32)
    tensors[2][3], tensors[4][:] = float("nan"), 1.0
    assert results(tensors, "fused")[0].isnan()


def test_without_gradients_none_are_made():
    tensors = inputs(12, 8, 20, torch.float32)
    with torch.no_grad():
        ours = linear_cross_entropy(*tensors, "fused")
    assert not ours[0].requires_grad
    torch.testing.assert_close(ours, linear_cross_entropy(*tensors, "reference"))


def test_the_operator_is_whole():
    from beitforge.kernels.cross_entropy.operator import _sums

    x, weight, bias, tokens, counts = inputs(6, 8, 20, torch.float32)
    for needed in (True, False):
        leaves = [tensor.detach().requires_grad_(needed) for tensor in (x, weight, bias)]
        torch.library.opcheck(_sums, (*leaves, tokens, counts, needed))


def test_compiled_without_a_break():
    tensors = inputs(6, 8, 20, torch.float32)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x.sin(), weight, bias, *tensors[3:], "fused")[0] / 3

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        value = run(*leaves)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[1], found[0])


def test_shapes_that_do_not_fit():
    x, weight, bias, tokens, counts = inputs(6, 8, 20, torch.float32)
    with pytest.raises(ValueError, match="do not fit rows of 8"):
        linear_cross_entropy(x, weight[:, :7], bias, tokens, counts)
    with pytest.raises(ValueError, match="do not fit 6 rows"):
        linear_cross_entropy(x, weight, bias, tokens[:5], counts)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(weights, kind):
    """As a linear layer: cast to autocast's type, whatever the weights are in; the sums stay float32, each gradient has
    its own type."""
    tensors = inputs(37, 32, 300, weights)
    exact = results([*(tensor.double() for tensor in tensors[:3]), *tensors[3:]], "reference")
    with torch.autocast(DEVICE, kind):
        ours, plain = (results(tensors, name) for name in ("fused", "reference"))
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 2 + [weights] * 3
    for i, (one, other) in enumerate(zip(errors(ours, exact), errors(plain, exact), strict=True)):
        assert one <= (2 if i < 2 else 3) * other + SLACK[kind]


def test_under_autocast_as_without():
    """Where everything has autocast's type already: the same bits."""
    tensors = inputs(37, 32, 300, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = results(tensors, "fused")
    assert all(torch.equal(one, other) for one, other in zip(ours, results(tensors, "fused"), strict=True))
