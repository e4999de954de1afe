"""Colour jitter and normalisation on the device: the same function for `tokenize` and `pretrain`.

BEiT jitters the whole image, then crops. Here the crop is jittered, about the whole image's mean grey at the contrast's
turn, which the record has; the loader has clamped it to what the jitter does not clip (shards.format.levels). What then
differs is below what an eye sees (BENCHMARKS.md, views). Must not know shards.
"""

import torch
from torch import Tensor

from beitforge.kernels.pixels import jittered


def jitter(pixels_BCHW: Tensor, jitters_B3: Tensor, orders_B: Tensor, pivots_B: Tensor) -> Tensor:
    """uint8 pixels [B, 3, H, W] to float32 in [0, 1], each image with its own factors in its own order
    (kernels.pixels.jittered)."""
    return jittered(pixels_BCHW, jitters_B3, orders_B, pivots_B)


def normalise(pixels_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x − mean) / std per channel, for the encoder."""
    mean_C11 = torch.tensor(mean, device=pixels_BCHW.device).view(1, -1, 1, 1)
    std_C11 = torch.tensor(std, device=pixels_BCHW.device).view(1, -1, 1, 1)
    return (pixels_BCHW - mean_C11) / std_C11


def tokenizer_input(pixels_BCHW: Tensor) -> Tensor:
    """0.8 x + 0.1, the range of the DALL-E tokenizer (docs/recipe.md, "Input")."""
    return 0.8 * pixels_BCHW + 0.1


def from_tokenizer(values_BCHW: Tensor) -> Tensor:
    """The inverse of tokenizer_input, clamped to [0, 1]."""
    return ((values_BCHW - 0.1) / 0.8).clamp(0, 1)
