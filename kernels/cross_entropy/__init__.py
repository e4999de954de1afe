"""A linear layer over a vocabulary and its cross entropy, without keeping the logits.

`linear_cross_entropy` chooses when called: on a GPU logits are made some thousand rows at a time and turned into their
gradient in place by a Triton kernel; elsewhere the plain reference that defines the result.
"""

import torch
from torch import Tensor

from beitforge.kernels.cross_entropy.reference import linear_cross_entropy_reference
from beitforge.kernels.dispatch import runs_fused
from beitforge.kernels.probe import constant_when_compiled, passes


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    tokens_T: Tensor,
    counts_T: Tensor,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Σ counts · cross entropy of softmax(x · weightᵀ + bias), and Σ counts over the rows whose largest logit is right.

    x_TD: [T, D]; tokens_T: i64 [T], each below V; counts_T: [T], what each row counts for (a mask's 0 or 1). Both sums
    are scalars in float32 (float64 for float64); the first is differentiable in x, weight and bias. Raises ValueError
    for shapes that do not fit, and as kernels.dispatch.runs_fused.
    """
    rows, width = x_TD.shape
    if weight_VD.shape[1] != width or bias_V.shape != weight_VD.shape[:1]:
        shapes = f"{tuple(weight_VD.shape)} and bias {tuple(bias_V.shape)}"
        raise ValueError(f"weight {shapes} do not fit rows of {width}; they are [V, D] and [V]")
    if tokens_T.shape != (rows,) or counts_T.shape != (rows,):
        shapes = f"tokens {tuple(tokens_T.shape)} and counts {tuple(counts_T.shape)}"
        raise ValueError(f"{shapes} do not fit {rows} rows; both are [T]")
    device, dtype, vocabulary = x_TD.device, x_TD.dtype, len(weight_VD)
    if not runs_fused(implementation, device, lambda: _passes(device, vocabulary, width, dtype)) or (
        dtype == torch.float64
    ):
        return linear_cross_entropy_reference(x_TD, weight_VD, bias_V, tokens_T, counts_T)
    from beitforge.kernels.cross_entropy.operator import linear_cross_entropy_fused

    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, weight_VD, bias_V))
    return linear_cross_entropy_fused(x_TD, weight_VD, bias_V, tokens_T, counts_T, needed)


@constant_when_compiled
def _passes(device: torch.device, vocabulary: int, width: int, dtype: torch.dtype) -> bool:
    def problems() -> list[str]:
        from beitforge.kernels.cross_entropy import check

        return check.problems(vocabulary, width, device, dtype)

    return dtype != torch.float64 and passes("cross entropy", device, (vocabulary, width, dtype), problems)
