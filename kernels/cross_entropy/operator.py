"""The fused cross entropy as a PyTorch operator. Imported when it is first asked for; needs Triton."""

from typing import Any

import torch
from torch import Tensor

from beitforge.kernels.cross_entropy import fused
from beitforge.kernels.dispatch import on_device

_LOGITS = 1 << 25  # numbers in the logits that exist at a time: 64 MiB in 16 bits
_BLOCK = 8192  # logits of a row that a program holds at a time
WARPS = 8


def linear_cross_entropy_fused(
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_T: Tensor, counts_T: Tensor, needed: bool
) -> tuple[Tensor, Tensor]:
    """As the reference. needed: whether the gradients will be; they are made with the loss, since the logits are there.

    They are gradients of the sum, of the size of softmax, and are scaled in float32 by what comes back: in float16 a
    mean's would be below the smallest number. Under autocast everything is cast to its type, as for a linear layer,
    and computed without it: it would cast within the operator, too, where the types are chosen.
    """
    where = x_TD.device.type
    kind = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else x_TD.dtype
    counts, x_TD, weight_VD, bias_V = counts_T.to(torch.float32), x_TD.to(kind), weight_VD.to(kind), bias_V.to(kind)
    with torch.autocast(where, enabled=False):
        loss, right, *_ = _sums(x_TD.contiguous(), weight_VD, bias_V, tokens_T, counts, needed)
    return loss, right


def block(vocabulary: int) -> int:
    """How many logits of a row a program holds at a time."""
    return min(_BLOCK, 1 << (vocabulary - 1).bit_length())


@torch.library.custom_op("beitforge::linear_cross_entropy", mutates_args=())
def _sums(
    x: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, counts: Tensor, needed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, right, and the gradients of x, weight (float32) and bias (float32) for a loss gradient of one; the last
    three empty unless needed."""
    rows, vocabulary = len(x), len(weight)
    losses, right = torch.empty_like(counts), torch.empty_like(counts)
    dx = torch.empty_like(x) if needed else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if needed else counts.new_empty(0)
    dbias = torch.zeros_like(bias, dtype=torch.float32) if needed else counts.new_empty(0)
    at_a_time = max(16, _LOGITS // vocabulary // 16 * 16)  # every part begins where whole words do
    # a sum over thousands of rows leaves float16's range: by a power of two, which costs no digit
    shrink = 1 / 64 if x.dtype == torch.float16 else 1.0
    for first in range(0, rows, at_a_time):
        some = slice(first, first + at_a_time)
        logits = torch.addmm(bias, x[some], weight.t())
        with on_device(logits):
            fused.cross_entropy_rows[(len(logits),)](
                logits, tokens[some], counts[some], losses[some], right[some],
                vocabulary, block(vocabulary), needed, num_warps=WARPS,
            )  # fmt: skip
        if needed:
            torch.mm(logits, weight, out=dx[some])
            dweight.add_(logits.t() @ (x[some] * shrink), alpha=1 / shrink)
            dbias += logits.sum(0, dtype=torch.float32)
    return losses.sum(), right.sum(), dx, dweight, dbias


@_sums.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, counts: Tensor, needed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if needed else x.new_empty(0)
    dweight = torch.empty_like(weight, dtype=torch.float32) if needed else counts.new_empty(0)
    dbias = torch.empty_like(bias, dtype=torch.float32) if needed else counts.new_empty(0)
    return counts.new_empty(()), counts.new_empty(()), dx, dweight, dbias


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, right, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.kinds = [tensor.dtype for tensor in inputs[:3]]
    ctx.mark_non_differentiable(right, *gradients)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple:
    wanted = ctx.needs_input_grad[:3]
    if dloss is None:
        return (None,) * 6
    scaled = [
        (gradient.float() * dloss).to(kind) if needs else None
        for gradient, kind, needs in zip(ctx.saved_tensors, ctx.kinds, wanted, strict=True)
    ]
    return *scaled, None, None, None


_sums.register_autograd(_gradients, setup_context=_remember)
