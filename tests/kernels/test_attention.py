"""Attention with a bias: every implementation against float64, with the gradients of qkv and of the table."""

import math

import pytest
import torch
from torch import Tensor

from beitforge.kernels.attention import attention, expand_bias, relative_index

IMPLEMENTATIONS = ["sdpa", "reference"]
# rows, columns, A, K, B: S = rows · columns + 1, from a single patch to BEiT-Base; grids that are not square
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 2, 8, 3), (5, 2, 3, 7, 2), (8, 8, 4, 32, 2), (14, 14, 2, 64, 1)]


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(rows: int, columns: int, a: int, k: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, S, 3, A, K], a bias table [R, A] and what the result is weighted with [B, S, A, K], float32."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    s = rows * columns + 1
    table_rows = (2 * rows - 1) * (2 * columns - 1) + 3
    shapes = (b, s, 3, a, k), (table_rows, a), (b, s, a, k)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def plain_attention(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, one image and one head at a time."""
    b, s, _, a, k = qkv.shape
    result = torch.zeros(b, s, a, k, dtype=qkv.dtype)
    for image in range(b):
        for head in range(a):
            q, key, v = (qkv[image, :, part, head] for part in range(3))
            logits = q @ key.T / math.sqrt(k)
            if bias is not None:
                logits = logits + bias[head]
            weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
            result[image, :, head] = weights / weights.sum(dim=1, keepdim=True) @ v
    return result


def gradients(result: Tensor, weight: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((result * weight).sum(), leaves))


def plain_index(rows: int, columns: int) -> list[list[int]]:
    """BEiT's released code (modeling_pretrain.RelativePositionBias), as a double loop."""
    distances = (2 * rows - 1) * (2 * columns - 1)
    places = [None] + [(row, column) for row in range(rows) for column in range(columns)]
    index = []
    for here in places:
        line = []
        for there in places:
            if here is None:
                line.append(distances if there is not None else distances + 2)
            elif there is None:
                line.append(distances + 1)
            else:
                down, across = here[0] - there[0] + rows - 1, here[1] - there[1] + columns - 1
                line.append(down * (2 * columns - 1) + across)
        index.append(line)
    return index


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 2), (4, 4), (14, 14)])
def test_relative_index_is_beits(rows, columns):
    index = relative_index(rows, columns)
    assert index.dtype == torch.int64
    assert index.tolist() == plain_index(rows, columns)
    pairs = (2 * rows - 1) * (2 * columns - 1)
    assert set(index.flatten().tolist()) == set(range(pairs + 3))


def test_recipes_table_has_732_rows():
    """docs/recipe.md, "Model": (2·14 − 1)² + 3."""
    assert int(relative_index(14, 14).max()) + 1 == 732


def test_expand_bias_picks_by_index():
    _, table, _ = inputs(2, 3, 4, 1, 1)
    index = relative_index(2, 3)
    bias = expand_bias(table, index)
    assert bias.shape == (4, 7, 7)
    for head in range(4):
        for q in range(7):
            for k in range(7):
                assert bias[head, q, k] == table[index[q, k], head]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_against_float64(implementation, shape, with_bias):
    """Result, and the gradients of qkv and of the table: float32 is right to a few units in the last place."""
    rows, columns = shape[:2]
    qkv, table, weight = inputs(*shape)
    index = relative_index(rows, columns)
    exact_qkv, exact_table = qkv.double().requires_grad_(), table.double().requires_grad_()
    expected = plain_attention(exact_qkv, expand_bias(exact_table, index) if with_bias else None)
    qkv.requires_grad_(), table.requires_grad_()
    result = attention(qkv, expand_bias(table, index) if with_bias else None, implementation=implementation)
    assert result.shape == (shape[4], rows * columns + 1, shape[2], shape[3])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=3e-6)
    leaves, exact = ([qkv, table], [exact_qkv, exact_table]) if with_bias else ([qkv], [exact_qkv])
    found, wanted = gradients(result, weight, *leaves), gradients(expected, weight.double(), *exact)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=3e-6 * float(theirs.abs().max() + 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_by_finite_differences(implementation):
    """In float64, against nothing but the definition of a derivative."""
    qkv, table, _ = inputs(2, 2, 2, 3, 2)
    index = relative_index(2, 2)
    leaves = qkv.double().requires_grad_(), table.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, t: attention(q, expand_bias(t, index), implementation=implementation), leaves
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_as_good_as_bfloat16_can_be(implementation):
    """docs/contributing.md, "Kernels": the error is at most twice that of the plain low-precision computation."""
    qkv, table, _ = inputs(8, 8, 2, 32, 2)
    bias = expand_bias(table, relative_index(8, 8))
    exact = plain_attention(qkv.bfloat16().double(), bias.bfloat16().double())
    plain = plain_attention(qkv.bfloat16(), bias.bfloat16())
    result = attention(qkv.bfloat16(), bias, implementation=implementation)
    assert result.dtype == torch.bfloat16
    assert (result.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


def test_the_bias_is_shared_by_the_images_and_not_by_the_heads():
    """Of two equal images both come out alike; a bias on one head changes that head only."""
    qkv, table, _ = inputs(2, 2, 2, 4, 1)
    pair = qkv.repeat(2, 1, 1, 1, 1)
    bias = expand_bias(table, relative_index(2, 2))
    result = attention(pair, bias)
    assert torch.equal(result[0], result[1])
    bias = torch.zeros(2, 5, 5)
    bias[1, :, 0] = 30.0
    plain, biased = attention(qkv, None), attention(qkv, bias)
    torch.testing.assert_close(biased[:, :, 0], plain[:, :, 0])
    torch.testing.assert_close(biased[0, :, 1], qkv[0, :1, 2, 1].expand(5, -1), rtol=1e-4, atol=1e-4)


def test_auto_is_one_of_the_implementations():
    qkv, table, _ = inputs(3, 3, 2, 8, 2)
    bias = expand_bias(table, relative_index(3, 3))
    result = attention(qkv, bias)
    assert any(torch.equal(result, attention(qkv, bias, implementation=name)) for name in IMPLEMENTATIONS)


def test_a_packed_view_is_read_in_place():
    """qkv as the encoder has it: a view of a linear layer's output, sliced from a larger batch."""
    qkv, _, _ = inputs(2, 2, 2, 4, 3)
    wide = torch.cat([qkv, qkv], dim=0)[1:4]
    assert torch.equal(attention(wide, None), attention(wide.clone(), None))


@pytest.mark.parametrize(
    ("shape", "bias", "implementation", "words"),
    [
        ((2, 5, 3, 4), None, "auto", r"qkv has shape \(2, 5, 3, 4\)"),
        ((2, 5, 2, 2, 4), None, "auto", r"qkv has shape \(2, 5, 2, 2, 4\)"),
        ((2, 5, 3, 2, 4), (2, 5, 4), "auto", r"bias has shape \(2, 5, 4\).*\(2, 5, 5\)"),
        ((2, 5, 3, 2, 4), (1, 5, 5), "auto", r"bias has shape \(1, 5, 5\).*\(2, 5, 5\)"),
        ((2, 5, 3, 2, 4), (2, 2, 5, 5), "sdpa", r"bias has shape \(2, 2, 5, 5\)"),
        ((2, 5, 3, 2, 4), None, "fast", r"implementation is 'fast'"),
    ],
)
def test_wrong_shapes_and_names_are_refused(shape, bias, implementation, words):
    with pytest.raises(ValueError, match=words):
        attention(torch.zeros(shape), None if bias is None else torch.zeros(bias), implementation=implementation)
