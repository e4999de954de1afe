"""Colour jitter, normalisation and cast of uint8 images, in one pass on a GPU.

Every implementation gives the same bits: tokens were made of these pixels, and whoever cuts the view again must see
what the tokenizer saw.
"""

import torch
from torch import Tensor

from beitforge.kernels.dispatch import runs_fused
from beitforge.kernels.pixels.reference import jittered_reference
from beitforge.kernels.probe import constant_when_compiled, passes


def jittered(
    pixels_BCHW: Tensor,
    jitters_B3: Tensor,
    orders_B: Tensor,
    pivots_B: Tensor,
    normal: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
) -> Tensor:
    """uint8 pixels [B, 3, H, W], each image jittered by its own factors in its own order, in [0, 1].

    jitters_B3: factors of brightness, contrast, saturation; orders_B: i64, rows of reference.ORDERS; pivots_B: 0-255,
    whole numbers, the mean grey of the whole image at its contrast's turn (shards.format.levels). Every operation
    blends with a base: black, the pivot, the pixel's own grey. As Pillow does it, each result is clamped and loses its
    fraction, and greys are whole numbers. normal: mean and standard deviation of each channel, for (x − mean) / std.
    Computed in float32, returned as dtype. Raises ValueError for pixels of another kind, and as
    kernels.dispatch.runs_fused.
    """
    if pixels_BCHW.dtype != torch.uint8 or pixels_BCHW.dim() != 4 or pixels_BCHW.shape[1] != 3:
        found = f"{tuple(pixels_BCHW.shape)} {pixels_BCHW.dtype}"
        raise ValueError(f"pixels are {found}; jittered takes uint8 [B, 3, H, W]")
    views = (pixels_BCHW, jitters_B3, orders_B, pivots_B)
    device = pixels_BCHW.device
    if runs_fused(implementation, device, lambda: _passes(device)):
        from beitforge.kernels.pixels.fused import jittered_fused

        return jittered_fused(*views, normal, dtype)
    return jittered_reference(*views, normal, dtype)


@constant_when_compiled
def _passes(device: torch.device) -> bool:
    def problems() -> list[str]:
        from beitforge.kernels.pixels import check

        return check.problems(33, 64, device)

    return passes("pixels", device, (), problems)
