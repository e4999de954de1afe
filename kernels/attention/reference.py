"""The definition of attention with a bias, in plain torch, at the precision of its input."""

from collections.abc import Callable

import torch


def attention_reference(
    qkv_BS3AK: torch.Tensor,
    bias_ASS: torch.Tensor | None,
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """softmax(q·kᵀ / √K + bias) · v for qkv [B, S, 3, A, K] and bias [A, S, S] or None; returns [B, S, A, K].

    drop: what becomes of the probabilities [B, A, S, S], which no other implementation holds.
    """
    q_BASK, k_BASK, v_BASK = qkv_BS3AK.permute(2, 0, 3, 1, 4).unbind(0)
    logits_BASS = (q_BASK * q_BASK.shape[-1] ** -0.5) @ k_BASK.transpose(-1, -2)
    if bias_ASS is not None:
        logits_BASS = logits_BASS + bias_ASS.to(logits_BASS.dtype)
    shares_BASS = logits_BASS.softmax(dim=-1)
    return ((shares_BASS if drop is None else drop(shares_BASS)) @ v_BASK).transpose(1, 2)
