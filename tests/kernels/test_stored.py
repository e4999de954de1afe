"""The second design of attention's backward against float64, as test_fused does the first."""

import dataclasses

import pytest
import torch

from beitforge.kernels.attention.block_sizes import Blocks, Plan, choose
from tests.kernels.test_fused import (  # noqa: F401
    BOUNDS,
    compare,
    fused,
    inputs,
    large_blocks,
    poisoned,
    pytestmark,
    results,
)


@pytest.fixture(autouse=True)
def _second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEITFORGE_BACKWARD", "stored")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 32, 2), torch.float32),
        ((17, 2, 32, 2), torch.float32),
        ((63, 2, 40, 2), torch.float16),
        ((64, 1, 16, 1), torch.bfloat16),
        ((197, 1, 64, 2), torch.float32),
        ((197, 1, 64, 2), torch.bfloat16),
        ((205, 1, 88, 1), torch.float32),
        ((257, 1, 128, 1), torch.float16),
        ((577, 1, 64, 1), torch.float16),
    ],
    ids=str,
)
def test_output_and_gradients(shape, dtype, large_blocks):  # noqa: F811
    compare(*inputs(*shape, dtype), BOUNDS[dtype])


@pytest.mark.parametrize("s", [17, 64, 97])
def test_without_a_bias(s):
    qkv, _, weight = inputs(s, 2, 32, 2, torch.float32)
    compare(qkv, None, weight, BOUNDS[torch.float32])


@pytest.mark.parametrize("held", [True, False], ids=["in registers", "by torch"])
@pytest.mark.parametrize("blocks", [Blocks(16, 16, 1), Blocks(32, 64, 2), Blocks(64, 32, 3)], ids=str)
def test_any_blocks_give_the_same(blocks, held, monkeypatch):
    from beitforge.kernels.attention import operator

    other = dataclasses.replace(blocks, columns=32)
    monkeypatch.setattr(operator, "choose", lambda *_: Plan(blocks, other, blocks, held, other))
    qkv, bias, weight = inputs(75, 1, 32, 2, torch.float32)
    compare(qkv, bias, weight, BOUNDS[torch.float32])


def test_two_runs_are_bitwise_equal():
    qkv, bias, weight = inputs(97, 1, 64, 3, torch.float16)
    first, second = (results(fused, qkv, bias, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_whole_block_may_be_forbidden():
    qkv, bias, weight = inputs(97, 1, 16, 1, torch.float32)
    bias[:, :, :64] = float("-inf")
    compare(qkv, bias, weight, 1e-5)


def test_nothing_of_one_image_is_left_in_the_next():
    """A program takes one image after the other: what overflows in one stays there."""
    qkv, _, weight = inputs(33, 1, 32, 3, torch.float32)
    weight[0] = float("inf")
    of_all = results(fused, qkv, None, weight)
    alone = results(fused, qkv[1:], None, weight[1:])
    assert all(torch.equal(a[1:], b) for a, b in zip(of_all, alone, strict=True))


def test_it_runs_only_when_asked_for(monkeypatch):
    from beitforge.kernels.attention import operator

    def plan() -> Plan:
        return operator.plan_of(torch.device("cpu"), 197, 64, torch.bfloat16)

    assert plan().stored == choose((0, 0), 197, 64, False, True).stored is not None
    monkeypatch.delenv("BEITFORGE_BACKWARD")
    assert plan().stored is None
    monkeypatch.setenv("BEITFORGE_BACKWARD", "fastest")
    with pytest.raises(ValueError, match="'fastest'; it takes summed or stored"):
        plan()
