"""Attention over packed qkv with an additive bias shared by the images of a batch, differentiable in both.

`attention` chooses its implementation when called: the fused Triton kernels on a GPU, PyTorch's
scaled_dot_product_attention, or the plain reference that defines the result. `expand_bias` turns BEiT's
relative-position table into the bias, `pack` the bias into what the fused kernels read: both once for all layers that
share it.
"""

import torch

from beitforge.kernels.attention.reference import attention_reference
from beitforge.kernels.attention.sdpa import attention_sdpa
from beitforge.kernels.dispatch import runs_fused
from beitforge.kernels.probe import constant_when_compiled, passes

_LARGEST_HEAD = 128  # numbers a head that the fused kernels take


def chosen(
    implementation: str, device: torch.device, positions: int, heads: int, head_size: int, dtype: torch.dtype
) -> str:
    """What runs for qkv [·, S, 3, A, K] on a device: fused, sdpa or reference.

    auto is fused where kernels.dispatch.runs_fused, else sdpa; on a CPU in 16 bits the reference, which is faster there
    (BENCHMARKS.md, train_cpu). Raises ValueError as runs_fused, and for fused with heads it cannot take.
    """
    if head_size > _LARGEST_HEAD and implementation == "fused":
        raise ValueError(f"fused attention takes heads of up to {_LARGEST_HEAD}, not {head_size}; use auto, or sdpa")
    taken = head_size <= _LARGEST_HEAD and dtype != torch.float64
    if runs_fused(implementation, device, lambda: taken and _passes(device, positions, heads, head_size, dtype)):
        return "fused"
    slow = implementation == "auto" and device.type == "cpu" and dtype.itemsize == 2
    return "reference" if slow or implementation == "reference" else "sdpa"


@constant_when_compiled
def _passes(device: torch.device, positions: int, heads: int, head_size: int, dtype: torch.dtype) -> bool:
    def problems() -> list[str]:
        from beitforge.kernels.attention import check

        return check.problems(positions, heads, head_size, device, dtype)

    return passes("attention", device, (positions, heads, head_size, dtype), problems)


def pack(
    bias_ASS: torch.Tensor | None, head_size: int, dtype: torch.dtype, implementation: str = "auto"
) -> torch.Tensor | None:
    """What the fused kernels read of a bias, for qkv of this head size and dtype; None where they do not run."""
    if bias_ASS is None:
        return None
    heads, positions, _ = bias_ASS.shape
    if chosen(implementation, bias_ASS.device, positions, heads, head_size, dtype) != "fused":
        return None
    from beitforge.kernels.attention.operator import pack_bias

    return pack_bias(bias_ASS, head_size, dtype)


def attention(
    qkv_BS3AK: torch.Tensor,
    bias_ASS: torch.Tensor | None,
    packed_AT: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """softmax(q·kᵀ / √K + bias) · v.

    qkv_BS3AK: [B, S, 3, A, K], read in place. bias_ASS: [A, S, S] in logits, or None; packed_AT: `pack` of it, made
    here where it is missing. Returns [B, S, A, K]. Raises ValueError for shapes that do not fit, and as `chosen`.
    """
    if qkv_BS3AK.dim() != 5 or qkv_BS3AK.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv_BS3AK.shape)}; attention takes [B, S, 3, A, K]")
    _, s, _, a, k = qkv_BS3AK.shape
    if bias_ASS is not None and bias_ASS.shape != (a, s, s):
        raise ValueError(f"bias has shape {tuple(bias_ASS.shape)}; for this qkv it must be {(a, s, s)}")
    runs = chosen(implementation, qkv_BS3AK.device, s, a, k, qkv_BS3AK.dtype)
    if runs == "fused":
        from beitforge.kernels.attention.operator import attention_fused

        return attention_fused(qkv_BS3AK, bias_ASS, packed_AT)
    if runs == "reference":
        return attention_reference(qkv_BS3AK, bias_ASS)
    return attention_sdpa(qkv_BS3AK, bias_ASS)


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
    """The bias [A, S, S] of a table [R, A] and its index i64 [S, S]; float32, in which layers' gradients are summed.

    Contiguous: on a GPU PyTorch's fused attention takes no other bias.
    """
    table_RA = table_RA.to(torch.promote_types(table_RA.dtype, torch.float32))
    return table_RA[index_SS.reshape(-1)].reshape(*index_SS.shape, -1).permute(2, 0, 1).contiguous()
