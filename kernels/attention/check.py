"""Attention and its gradients against the reference, at a shape."""

from collections.abc import Callable

import torch
from torch import Tensor

from beitforge.kernels.attention.reference import attention_reference
from beitforge.kernels.probe import differences

_IMAGES = 16  # Triton compiles for a number of images that 16 divides, as a batch's is
_WEIGHTS = 1 << 20  # attention weights of a head over all images; long rows get fewer of these


def problems(
    positions: int,
    heads: int,
    head_size: int,
    device: torch.device,
    dtype: torch.dtype,
    ours: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[str]:
    """What is wrong with `ours`, a function of qkv and bias; by default the fused kernels."""
    generator, images = torch.Generator().manual_seed(0), min(_IMAGES, max(2, _WEIGHTS // positions**2))
    qkv = torch.randn(images, positions, 3, heads, head_size, generator=generator).to(device, dtype)
    bias = torch.randn(heads, positions, positions, generator=generator).to(device)
    return differences("attention", ours or _fused, attention_reference, [qkv, bias], dtype)


def _fused(qkv: Tensor, bias: Tensor) -> Tensor:
    from beitforge.kernels.attention.operator import attention_fused

    return attention_fused(qkv, bias, None)
