"""Attention with a bias by PyTorch's scaled_dot_product_attention."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def attention_sdpa(qkv_BS3AK: torch.Tensor, bias_ASS: torch.Tensor | None) -> torch.Tensor:
    """As attention_reference. The bias is passed unexpanded, [1, A, S, S], so that no copy per image is made."""
    q_BASK, k_BASK, v_BASK = qkv_BS3AK.permute(2, 0, 3, 1, 4).unbind(0)
    bias = None if bias_ASS is None else bias_ASS.to(q_BASK.dtype)[None]
    return scaled_dot_product_attention(q_BASK, k_BASK, v_BASK, attn_mask=bias).transpose(1, 2)
