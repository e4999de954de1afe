"""What the encoder makes of masked images, as pixels: view, masked view, decoded true and decoded predicted tokens,
and how far they are apart.

Shape letters as in pipeline.model.beit. Must not know runs, HTML or any stage.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.model.pixels import jitter
from beitforge.pipeline.tokenizers.storage import VisualTokenizer
from beitforge.pipeline.training.objectives import encoder_input
from beitforge.shards.stream.loader import Batch

_GREY, _EDGE = 0.5, 0.4  # of a masked patch, and of its edge: a grey image looks different
_WORST = 0.5  # a difference of pixels in [0, 1] from which on an error is as bright as can be
_RIGHT, _MARK = (34, 197, 94), (34, 211, 238)  # outlines: of a patch whose token is right, and of one that is meant
# heat from none to all, evenly spaced: dark to light also for those who see no colours
_HEAT = np.array([(4, 5, 26), (73, 16, 102), (156, 38, 98), (229, 92, 48), (251, 176, 40), (252, 253, 191)], np.float32)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One sample; images are u8 [H, W, 3]. `decoded`, `predicted` and `error` (their difference as heat, patches that
    are right outlined) are None without a tokenizer; `predicted`, `error` and `right` (masked patches whose token is
    predicted right) without an encoder."""

    image: np.ndarray
    masked: np.ndarray
    decoded: np.ndarray | None
    predicted: np.ndarray | None
    error: np.ndarray | None
    right: int | None
    num_masked: int


@torch.no_grad()
def reconstructions(
    config: Config, batch: Batch, tokenizer: VisualTokenizer | None, beit: Beit | None
) -> list[Reconstruction]:
    """Of every sample of a pretraining or held-out batch, on the CPU in float32."""
    view = jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots)
    mask_BN = batch.draws["mask"]
    masked = greyed(view, mask_BN, config.model.patch_size)
    guess_BN = predicted_tokens(config, beit, batch) if beit is not None else None
    grid = config.tokenizer.grid
    decoded = tokenizer.decode(batch.tokens, grid) if tokenizer is not None else None
    predicted = tokenizer.decode(guess_BN, grid) if tokenizer is not None and guess_BN is not None else None
    right_BN = (guess_BN == batch.tokens) & mask_BN if guess_BN is not None else None
    return [
        Reconstruction(
            image=to_bytes(view[i]),
            masked=to_bytes(masked[i]),
            decoded=to_bytes(decoded[i]) if decoded is not None else None,
            predicted=to_bytes(predicted[i]) if predicted is not None else None,
            error=(
                errors(decoded[i], predicted[i], right_BN[i], grid)
                if decoded is not None and predicted is not None and right_BN is not None
                else None
            ),
            right=int(right_BN[i].sum()) if right_BN is not None else None,
            num_masked=int(mask_BN[i].sum()),
        )
        for i in range(len(view))
    ]


@torch.no_grad()
def predicted_tokens(config: Config, beit: Beit, batch: Batch) -> Tensor:
    """Visual tokens i64 [B, N]: the true ones where patches are visible, the likeliest ones at masked patches."""
    logits_BMV, index_BM, weight_BM = beit(encoder_input(config, batch), batch.draws["mask"], config.mask.num_patches)
    true_BM = batch.tokens.gather(1, index_BM)
    guess_BM = torch.where(weight_BM.bool(), logits_BMV.argmax(dim=-1), true_BM)
    return batch.tokens.scatter(1, index_BM, guess_BM)


def sample_names(source: DataSource, batch: Batch) -> list[str]:
    """The key of each sample's image, or of the one that stood in for it."""
    _, shards, rows = source.stream.places.locate(batch.samples.numpy())
    images = source.stream.images
    substitutes = {sample.sample: sample.substitute for sample in batch.bad}
    places = zip(batch.samples.tolist(), shards.tolist(), rows.tolist(), strict=True)
    return [substitutes.get(sample) or images.index(shard).key(row) for sample, shard, row in places]


def greyed(pixels_BCHW: Tensor, mask_BN: Tensor, patch_size: int) -> Tensor:
    """The images, their masked patches grey with a darker edge to the right and below."""
    rows, columns = pixels_BCHW.shape[2] // patch_size, pixels_BCHW.shape[3] // patch_size
    mask_BHW = mask_BN.view(-1, rows, columns).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    cover = torch.full_like(pixels_BCHW, _GREY)
    cover[:, :, patch_size - 1 :: patch_size], cover[..., patch_size - 1 :: patch_size] = _EDGE, _EDGE
    return torch.where(mask_BHW[:, None], cover, pixels_BCHW)


def errors(decoded_CHW: Tensor, predicted_CHW: Tensor, right_N: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """How far the two images are apart, as heat u8 [H, W, 3]; patches that are right are outlined."""
    apart = (decoded_CHW - predicted_CHW).abs().mean(dim=0) / _WORST
    shown = heat(apart.clamp(max=1).numpy())
    for patch in right_N.nonzero().flatten().tolist():
        shown = outlined(shown, patch, len(shown) // grid[0], grid[1], _RIGHT)
    return shown


def heat(shares_HW: np.ndarray) -> np.ndarray:
    """Shares in [0, 1] as colours u8 [H, W, 3]."""
    place = np.clip(shares_HW, 0, 1) * (len(_HEAT) - 1)
    below = np.minimum(place.astype(np.int64), len(_HEAT) - 2)
    rest = (place - below)[..., None]
    return ((1 - rest) * _HEAT[below] + rest * _HEAT[below + 1]).round().astype(np.uint8)


def outlined(
    pixels_HWC: np.ndarray, patch: int, patch_size: int, columns: int, colour: tuple[int, int, int] = _MARK
) -> np.ndarray:
    """A copy in which one patch has an edge of this colour inside."""
    shown, thick = pixels_HWC.copy(), max(1, patch_size // 8)
    top, left = patch // columns * patch_size, patch % columns * patch_size
    square = shown[top : top + patch_size, left : left + patch_size]
    inside = square[thick:-thick, thick:-thick].copy()
    square[:] = colour
    square[thick:-thick, thick:-thick] = inside
    return shown


def to_bytes(pixels_CHW: Tensor) -> np.ndarray:
    """An image in [0, 1] as u8 [H, W, 3]."""
    return (pixels_CHW.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
