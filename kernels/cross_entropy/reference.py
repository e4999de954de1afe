"""The definition of linear_cross_entropy in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, tokens_T: Tensor, counts_T: Tensor
) -> tuple[Tensor, Tensor]:
    """As kernels.cross_entropy.linear_cross_entropy; autograd keeps the logits, in x's type and in float32."""
    logits_TV = F.linear(x_TD, weight_VD, bias_V)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    each_T = F.cross_entropy(logits_TV, tokens_T, reduction="none")
    counts_T = counts_T.to(each_T.dtype)
    right_T = (logits_TV.detach().argmax(dim=-1) == tokens_T).to(each_T.dtype)
    return (each_T * counts_T).sum(), (right_T * counts_T).sum()
