"""Triton kernel: jitter, normalise and cast in one pass. Imported when it is first asked for; needs Triton.

The same bits as the reference: products and sums are not contracted, divisions are rounded correctly.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from beitforge.kernels.dispatch import interpreted, on_device
from beitforge.kernels.pixels.reference import LUMA

BLOCK = 1024  # pixels of an image that a program holds
WARPS = 4
_HALVES: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 · 2²³: where float32 has no fractions left
_RED: tl.constexpr = tl.constexpr(LUMA[0])
_GREEN: tl.constexpr = tl.constexpr(LUMA[1])
_BLUE: tl.constexpr = tl.constexpr(LUMA[2])


@triton.jit
def _blend(x, base, factor):
    return tl.floor(tl.minimum(tl.maximum(base + factor * (x - base), 0.0), 255.0))


@triton.jit
def _store(out, x, mean, std, inside, NORMAL: tl.constexpr):
    x = tl.div_rn(x, tl.full(x.shape, 255.0, tl.float32))
    if NORMAL:
        x = tl.div_rn(x - mean, tl.zeros_like(x) + std)
    tl.store(out, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def jitter_pixels(pixels, out, jitters, orders, pivots, mean0, mean1, mean2, std0, std1, std2,
                  HW: tl.constexpr, BLOCK: tl.constexpr, NORMAL: tl.constexpr):  # fmt: skip
    """One program BLOCK pixels of one image, their three channels together."""
    image, at = tl.cast(tl.program_id(1), tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HW
    base_in, base_out = pixels + image * (3 * HW) + at, out + image * (3 * HW) + at
    red = tl.load(base_in, mask=inside, other=0).to(tl.float32)
    green = tl.load(base_in + HW, mask=inside, other=0).to(tl.float32)
    blue = tl.load(base_in + 2 * HW, mask=inside, other=0).to(tl.float32)
    order, pivot = tl.load(orders + image), tl.load(pivots + image)
    first = order // 2  # reference.ORDERS: the two others follow in rising order, or in falling
    second = tl.where(order % 2 == 0, tl.where(first == 0, 1, 0), tl.where(first == 2, 1, 2))
    for turn in tl.static_range(3):
        operation = first if turn == 0 else (second if turn == 1 else 3 - first - second)
        factor = tl.load(jitters + image * 3 + operation)
        grey = red * _RED + green * _GREEN + blue * _BLUE
        flat = tl.where(operation == 1, pivot, 0.0)
        base = tl.where(operation == 2, (grey + _HALVES) - _HALVES, flat)  # rounded to the nearest, halves to even
        red, green, blue = _blend(red, base, factor), _blend(green, base, factor), _blend(blue, base, factor)
    _store(base_out, red, mean0, std0, inside, NORMAL)
    _store(base_out + HW, green, mean1, std1, inside, NORMAL)
    _store(base_out + 2 * HW, blue, mean2, std2, inside, NORMAL)


def jittered_fused(
    pixels: Tensor,
    jitters: Tensor,
    orders: Tensor,
    pivots: Tensor,
    normal: tuple[tuple[float, ...], tuple[float, ...]] | None,
    dtype: torch.dtype,
) -> Tensor:
    """As jittered_reference, bit for bit."""
    mean, std = normal if normal is not None else ((), ())
    return _jittered(pixels, jitters, orders, pivots, list(mean), list(std), dtype)


@torch.library.custom_op("beitforge::jittered", mutates_args=())
def _jittered(
    pixels: Tensor,
    jitters: Tensor,
    orders: Tensor,
    pivots: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """mean, std: of each channel, or nothing for pixels in [0, 1]."""
    images, _, height, width = pixels.shape
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    normal = (*mean, *std) if mean else (0.0,) * 3 + (1.0,) * 3
    options = {} if interpreted() else {"num_warps": WARPS, "enable_fp_fusion": False}
    with on_device(pixels):
        jitter_pixels[(triton.cdiv(height * width, BLOCK), images)](
            pixels.contiguous(), out, jitters.float().contiguous(), orders.contiguous(), pivots.float(),
            *normal, height * width, BLOCK, bool(mean), **options,
        )  # fmt: skip
    return out


@_jittered.register_fake
def _(
    pixels: Tensor,
    jitters: Tensor,
    orders: Tensor,
    pivots: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
