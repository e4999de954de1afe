"""Attention over packed qkv with an additive bias shared by the images of a batch, differentiable in both.

`attention` chooses its implementation when called: PyTorch's scaled_dot_product_attention, or the plain reference that
defines the result. `expand_bias` turns BEiT's relative-position table into the bias.
"""

import torch

from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_sdpa


def attention(qkv_BS3AK: torch.Tensor, bias_ASS: torch.Tensor | None, implementation: str = "auto") -> torch.Tensor:
    """softmax(q·kᵀ / √K + bias) · v.

    qkv_BS3AK: [B, S, 3, A, K], read in place. bias_ASS: [A, S, S] in logits, or None. Returns [B, S, A, K].
    implementation: auto (sdpa), sdpa or reference. Raises ValueError for another name or shapes that do not fit.
    """
    if qkv_BS3AK.dim() != 5 or qkv_BS3AK.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv_BS3AK.shape)}; attention takes [B, S, 3, A, K]")
    _, s, _, a, _ = qkv_BS3AK.shape
    if bias_ASS is not None and bias_ASS.shape != (a, s, s):
        raise ValueError(f"bias has shape {tuple(bias_ASS.shape)}; for this qkv it must be {(a, s, s)}")
    if implementation in ("auto", "sdpa"):
        return attention_sdpa(qkv_BS3AK, bias_ASS)
    if implementation == "reference":
        return attention_reference(qkv_BS3AK, bias_ASS)
    raise ValueError(f"implementation is {implementation!r}; it takes auto, sdpa or reference")


def relative_index(rows: int, columns: int) -> torch.Tensor:
    """Row of the bias table for each pair of positions, i64 [S, S] with S = rows · columns + 1, [S] first.

    The table has (2·rows − 1)(2·columns − 1) rows for patch pairs by offset, then [S]→patch, patch→[S], [S]→[S]
    (BEiT's released code).
    """
    row, column = torch.arange(rows), torch.arange(columns)
    down = (row[:, None] - row[None, :] + rows - 1)[:, None, :, None]
    across = (column[:, None] - column[None, :] + columns - 1)[None, :, None, :]
    patches = (down * (2 * columns - 1) + across).reshape(rows * columns, rows * columns)
    pairs = (2 * rows - 1) * (2 * columns - 1)
    index = torch.full((rows * columns + 1, rows * columns + 1), pairs + 2)
    index[1:, 1:] = patches
    index[0, 1:] = pairs
    index[1:, 0] = pairs + 1
    return index


def expand_bias(table_RA: torch.Tensor, index_SS: torch.Tensor) -> torch.Tensor:
    """The bias [A, S, S] of a table [R, A] and its index i64 [S, S]."""
    return table_RA[index_SS.reshape(-1)].reshape(*index_SS.shape, -1).permute(2, 0, 1)
