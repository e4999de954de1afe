"""The definition of jittered in plain PyTorch."""

import functools

import torch
from torch import Tensor

# Rows: the order number of a view's record; entries: which factor comes first, second, third.
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")
_CONTRAST, _SATURATION = 1, 2


@functools.lru_cache(maxsize=32)
def _orders(device: torch.device) -> Tensor:
    return torch.tensor(ORDERS, device=device)


def turns(jitters_B3: Tensor, orders_B: Tensor, pivots_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three blends of each image in its order: factors f32 [B, 3], the constant each blends with f32 [B, 3], and
    whether it blends with the pixel's own grey instead, bool [B, 3]."""
    operations_B3 = _orders(jitters_B3.device)[orders_B]
    factors_B3 = jitters_B3.float().gather(1, operations_B3)
    return factors_B3, (operations_B3 == _CONTRAST) * pivots_B.float()[:, None], operations_B3 == _SATURATION


def jittered_reference(
    pixels_BCHW: Tensor,
    jitters_B3: Tensor,
    orders_B: Tensor,
    pivots_B: Tensor,
    normal: tuple[tuple[float, ...], tuple[float, ...]] | None,
    dtype: torch.dtype,
) -> Tensor:
    """As kernels.pixels.jittered."""
    factors_B3, flats_B3, own_grey_B3 = turns(jitters_B3, orders_B, pivots_B)
    x_BCHW = pixels_BCHW.float()
    for turn in range(3):
        factor, flat, own = (values[:, turn, None, None, None] for values in (factors_B3, flats_B3, own_grey_B3))
        red, green, blue = x_BCHW.unbind(1)
        grey_B1HW = (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]).round()[:, None]
        base = torch.where(own, grey_B1HW, flat)
        x_BCHW = (base + factor * (x_BCHW - base)).clamp(0, 255).floor()
    # by a tensor: CUDA multiplies by the reciprocal of a plain number, which is another number
    x_BCHW = x_BCHW / torch.full((), 255.0, device=x_BCHW.device)
    if normal is not None:
        mean_C11, std_C11 = (torch.tensor(values, device=x_BCHW.device).view(-1, 1, 1) for values in normal)
        x_BCHW = (x_BCHW - mean_C11) / std_C11
    return x_BCHW.to(dtype)
