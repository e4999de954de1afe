"""Colour jitter and normalisation on the device: the same function for `tokenize` and `pretrain`.

BEiT jitters the whole picture, then crops. Here the crop is jittered, with the whole picture's mean grey for the
contrast, which the index stores; the loader has clamped it to what the jitter does not clip (shards.views). What then
differs is below what an eye sees (BENCHMARKS.md, views). Must not know shards.
"""

import torch
from torch import Tensor

# Rows: the order number of a view's record; entries: which factor comes first, second, third.
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")
_BRIGHTNESS, _CONTRAST = 0, 1


def jitter(pixels_BCHW: Tensor, jitters_B3: Tensor, orders_B: Tensor, mean_greys_B: Tensor) -> Tensor:
    """uint8 pixels [B, 3, H, W] to float32 in [0, 1], each picture with its own factors in its own order.

    jitters_B3: factors of brightness, contrast, saturation. mean_greys_B: 0-255, of the whole unjittered picture.
    Every operation blends with a base: black, the mean grey, the pixel's own grey. As Pillow does it, each result is
    clamped and loses its fraction, and greys are whole numbers.
    """
    x_BCHW = pixels_BCHW.float()
    luma_C11 = torch.tensor(_LUMA, device=x_BCHW.device).view(1, 3, 1, 1)
    mean_B = mean_greys_B.float()
    operations_B3 = torch.tensor(_ORDERS, device=x_BCHW.device)[orders_B]
    for turn in range(3):
        operation_B = operations_B3[:, turn]
        factor_B = jitters_B3.gather(1, operation_B[:, None])[:, 0]
        bright_B, contrast_B = operation_B == _BRIGHTNESS, operation_B == _CONTRAST
        grey_B1HW = (x_BCHW * luma_C11).sum(dim=1, keepdim=True).round()
        flat_B111 = torch.where(contrast_B, (mean_B + 0.5).floor(), torch.zeros_like(mean_B))[:, None, None, None]
        base = torch.where((bright_B | contrast_B)[:, None, None, None], flat_B111, grey_B1HW)
        x_BCHW = (base + factor_B[:, None, None, None] * (x_BCHW - base)).clamp(0, 255).floor()
        mean_B = torch.where(bright_B, mean_B * factor_B, mean_B)
        mean_B = (mean_B - 0.5 * (factor_B != 1)).clamp(0, 255)  # the fractions cut off are half a level on average
    return x_BCHW / 255


def normalise(pixels_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x − mean) / std per channel, for the encoder."""
    mean_C11 = torch.tensor(mean, device=pixels_BCHW.device).view(1, -1, 1, 1)
    std_C11 = torch.tensor(std, device=pixels_BCHW.device).view(1, -1, 1, 1)
    return (pixels_BCHW - mean_C11) / std_C11


def tokenizer_input(pixels_BCHW: Tensor) -> Tensor:
    """0.8 x + 0.1, the range of the DALL-E tokenizer (RECIPE, "Input")."""
    return 0.8 * pixels_BCHW + 0.1


def from_tokenizer(values_BCHW: Tensor) -> Tensor:
    """The inverse of tokenizer_input, clamped to [0, 1]."""
    return ((values_BCHW - 0.1) / 0.8).clamp(0, 1)
