"""Where an encoder looks: the attention of [S] and of chosen patches, as heat maps over the image.

Attention's kernels never hold the probabilities; here they are computed again from the same weights. Shape letters as
in pipeline.model.beit. Must not know runs, HTML or any stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.kernels.attention import pack
from beitforge.pipeline.evaluation.reconstructions import heat, outlined, to_bytes
from beitforge.pipeline.model.beit import Encoder
from beitforge.pipeline.model.blocks import Attention, Block
from beitforge.pipeline.model.pixels import normalise

_FAINT = 0.35  # of the image below the heat


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """One image; u8 [H, W, 3] each. `patches`: heat maps of the last block by the patch that looks, which is outlined
    in them; `middle` and `last`: of [S], after half of the blocks and in the last."""

    image: np.ndarray
    middle: np.ndarray
    last: np.ndarray
    patches: list[np.ndarray]


def iterate_blocks(
    encoder: Encoder, pixels_BCHW: Tensor, mask_BN: Tensor | None = None
) -> Iterator[tuple[Block, Tensor]]:
    """Every block and the hidden states [B, S, D] that go into it; pixels are normalised. Blocks are computed when the
    next is asked for, so whoever stops early leaves the rest out."""
    model, x_BSD = encoder.model, encoder.embed(pixels_BCHW, mask_BN)
    bias_ASS = encoder.shared_bias() if encoder.shared_bias is not None else None
    packed_AT = pack(bias_ASS, model.width // model.heads, x_BSD.dtype, model.kernels)
    for block in encoder.blocks:
        assert isinstance(block, Block), "an encoder is made of blocks"
        yield block, x_BSD
        x_BSD = block(x_BSD, bias_ASS, packed_AT, None)


def probabilities(attention: Attention, x_BSD: Tensor, bias_ASS: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ / √K + bias) [B, A, S, S] of a block's normalised input, and its values [B, A, S, K]."""
    q_BASK, k_BASK, v_BASK = attention.project(x_BSD).permute(2, 0, 3, 1, 4)
    logits_BASS = q_BASK @ k_BASK.transpose(-1, -2) / q_BASK.shape[-1] ** 0.5
    if attention.own_bias is not None:
        bias_ASS = attention.own_bias()
    return (logits_BASS if bias_ASS is None else logits_BASS + bias_ASS).softmax(dim=-1), v_BASK


@torch.no_grad()
def attention_of(encoder: Encoder, pixels_BCHW: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Attention [B, S, S] in these blocks (0 is the first), mean over heads; pixels normalised, nothing masked."""
    bias_ASS = encoder.shared_bias() if encoder.shared_bias is not None else None
    found: dict[int, Tensor] = {}
    for layer, (block, x_BSD) in enumerate(iterate_blocks(encoder, pixels_BCHW)):
        if layer in layers:
            found[layer] = probabilities(block.attention, block.norm1(x_BSD), bias_ASS)[0].mean(dim=1)
        if layer == max(layers):
            break
    return found


def attention_maps(encoder: Encoder, pixels_BCHW: Tensor) -> list[AttentionMaps]:
    """Of images in [0, 1], on the encoder's device in float32. The patches that look are the busiest and the
    plainest: those whose pixels vary most and least."""
    model = encoder.model
    middle, last = (len(encoder.blocks) - 1) // 2, len(encoder.blocks) - 1
    maps = attention_of(encoder, normalise(pixels_BCHW, model.mean, model.std), [middle, last])
    chosen = busiest_and_plainest(pixels_BCHW, model.patch_size)
    found = []
    for i, (pixels, looking) in enumerate(zip(pixels_BCHW.cpu(), chosen.tolist(), strict=True)):

        def over(layer: int, position: int, i: int = i, pixels: Tensor = pixels) -> np.ndarray:
            weights_N = maps[layer][i, position, 1:].cpu()
            return overlaid(pixels, weights_N.view(model.grid), model.patch_size)

        found.append(
            AttentionMaps(
                image=to_bytes(pixels),
                middle=over(middle, 0),
                last=over(last, 0),
                patches=[outlined(over(last, 1 + patch), patch, model.patch_size, model.grid[1]) for patch in looking],
            )
        )
    return found


def busiest_and_plainest(pixels_BCHW: Tensor, patch_size: int) -> Tensor:
    """The numbers of two patches of each image, i64 [B, 2]: of the largest and the smallest variance."""
    grey_B1HW = pixels_BCHW.mean(dim=1, keepdim=True)
    mean, square = (F.avg_pool2d(grey_B1HW**power, patch_size).flatten(1) for power in (1, 2))
    variance_BN = square - mean**2
    return torch.stack([variance_BN.argmax(dim=1), variance_BN.argmin(dim=1)], dim=1)


def overlaid(pixels_CHW: Tensor, weights_hw: Tensor, patch_size: int) -> np.ndarray:
    """The image, faint and grey, under the heat of its patches' weights; the largest weight is the brightest."""
    share = weights_hw / weights_hw.max().clamp(min=1e-12)
    share_HW = share.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    under = _FAINT * pixels_CHW.mean(dim=0)[..., None].numpy()
    return np.clip(255 * under + (1 - _FAINT) * heat(share_HW.numpy()).astype(np.float32), 0, 255).astype(np.uint8)
