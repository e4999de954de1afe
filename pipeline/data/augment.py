"""Augmentation of fine-tuning (docs/recipe.md, "Fine-tuning"): RandAugment by timm, rectangles to erase, how to mix.

RandAugment works on the cut image in the loader. Erasing and mixing are drawn here and done on the device
(pipeline.training.objectives): timm's own draw from global state and wait for the device. Everything is a pure function
of a seed and sample numbers. Must not know the loader, the model or any stage.
"""

import random
from collections.abc import Callable

import numpy as np
import torch

from beitforge.pipeline.config.settings import Finetune
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.masking import kept_branches
from beitforge.pipeline.torchvision_stub import install
from beitforge.shards import counter_rng

_TRIES = 10
_AREA, _ASPECT = (0.02, 1 / 3), 0.3  # of an erased rectangle, as timm and the released code have them
_TRANSLATE = 0.45  # of the shorter side, at most
_HALF_CUTMIX = 0.5  # where both are on, how often a pair is cut instead of mixed


class RandAugment:
    """timm's RandAugment of an image, its randomness that of the sample: the same in any worker of any rank."""

    def __init__(self, words: str, size: tuple[int, int], mean: tuple[float, ...], seed: int):
        """words: timm's, as rand-m9-mstd0.5-inc1. size: H, W. Raises ConfigError without timm, or for other words."""
        self.seed = seed
        self.operate = _operations(words, size, mean)

    def __call__(self, sample: int, pixels_CHW: torch.Tensor) -> None:
        """Change uint8 pixels [3, H, W] in place. timm draws from Python's and NumPy's global generators: they are
        left as they were found."""
        from PIL import Image

        number = int(counter_rng.bits(counter_rng.AUGMENT, self.seed, sample)[0])
        python, numpy = random.getstate(), np.random.get_state()
        try:
            random.seed(number)
            np.random.seed([number & 0xFFFFFFFF, number >> 32])
            changed = self.operate(Image.fromarray(np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
        pixels_CHW.copy_(torch.from_numpy(np.array(changed)).permute(2, 0, 1))


def _operations(words: str, size: tuple[int, int], mean: tuple[float, ...]) -> Callable:
    install()
    try:
        from timm.data import auto_augment
    except ImportError as error:
        raise ConfigError(
            f"finetune.randaugment {words} is timm's, which cannot be imported ({error}): `pip install timm`, or set "
            f'finetune.randaugment=""'
        ) from error
    from PIL import Image

    settings = {
        "translate_const": int(_TRANSLATE * min(size)),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return auto_augment.rand_augment_transform(words, settings)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"finetune.randaugment is {words!r}, which timm does not read; write it as rand-m9-mstd0.5-inc1"
        ) from error


def supervised_draws(tune: Finetune, layers: int, seed: int, samples: np.ndarray) -> dict[str, np.ndarray]:
    """What the samples (i64 [B]) of a micro batch draw, beside their views.

    keep bool [B, L, 2] with drop path · dropout i64 [B], the seeds of what it drops · erase i64 [B, 4] top, left,
    height, width (0: nothing is erased) and noise i64 [B], its seed · share, blend f32 [B] and box i64 [B, 4]: how each
    image is mixed with its partner (shards.stream.order.RankBatches, paired), the same for both, drawn from the number
    of the first.
    """
    drawn = {}
    if tune.drop_path > 0:
        drawn["keep"] = kept_branches(
            tune.drop_path,
            layers,
            lambda number: counter_rng.uniform(counter_rng.DROP_PATH, seed, samples[:, None, None], number),
        )
    if tune.dropout > 0 or tune.attention_dropout > 0:
        drawn["dropout"] = (counter_rng.bits(counter_rng.DROPOUT, seed, samples) >> np.uint64(32)).astype(np.int64)
    if tune.erase > 0:
        drawn["erase"] = erased_boxes(
            tune.input_size,
            tune.erase,
            lambda what, attempt: counter_rng.uniform(counter_rng.ERASE, seed, samples, what, attempt),
        )
        drawn["noise"] = (counter_rng.bits(counter_rng.ERASE, seed, samples, 9) >> np.uint64(32)).astype(np.int64)
    if tune.mixes:
        first = samples[: len(samples) // 2]
        uniform = counter_rng.uniform(counter_rng.MIX, seed, first, np.arange(4)[:, None])
        of_pairs = mixing(tune.input_size, tune.mixup, tune.cutmix, uniform)
        drawn |= {name: np.concatenate([drawn_P, drawn_P[::-1]]) for name, drawn_P in of_pairs.items()}
    return drawn


def erased_boxes(size: tuple[int, int], probability: float, uniform: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Rectangles to erase (Zhong et al. 2017, timm's limits): i64 [B, 4] top, left, height, width; zeros for none.

    uniform(what, attempt): f64 [B] in [0, 1). Ten tries for one that fits.
    """
    height, width = size
    wanted = uniform(0, 0) < probability
    boxes = np.zeros((len(wanted), 4), np.int64)
    for attempt in range(_TRIES):
        area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * uniform(1, attempt))
        aspect = np.exp(np.log(_ASPECT) * (1 - 2 * uniform(2, attempt)))
        tall = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        wide = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = wanted & (boxes[:, 2] == 0) & (tall < height) & (wide < width)
        top = (uniform(3, attempt) * (height - tall + 1)).astype(np.int64)
        left = (uniform(4, attempt) * (width - wide + 1)).astype(np.int64)
        boxes[fits] = np.stack([top, left, tall, wide], axis=-1)[fits]
    return boxes


def mixing(size: tuple[int, int], mixup: float, cutmix: float, uniform: np.ndarray) -> dict[str, np.ndarray]:
    """How P pairs are mixed: `share` f32 [P] of an image's own label, `blend` f32 [P] the weight of its own pixels
    outside a box, `box` i64 [P, 4] top, left, height, width, inside which they are its partner's.

    mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019), each with share from Beta(alpha, alpha); alpha 0 switches it
    off, with both on half of the pairs are cut. uniform: f64 [4, P] in [0, 1).
    """
    from scipy.special import betaincinv

    which, quantile, down, across = uniform
    cuts = (which < (_HALF_CUTMIX if mixup > 0 else 1.0)) & (cutmix > 0)
    alpha = np.where(cuts, cutmix, mixup)
    share = betaincinv(alpha, alpha, quantile)
    (top, tall), (left, wide) = _cut(size[0], share, down), _cut(size[1], share, across)
    box = np.where(cuts[:, None], np.stack([top, left, tall, wide], axis=-1), 0)
    share = np.where(cuts, 1 - tall * wide / (size[0] * size[1]), share)
    blend = np.where(cuts, 1.0, share)
    return {"share": share.astype(np.float32), "blend": blend.astype(np.float32), "box": box}


def _cut(side: int, share: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a box begins along a side, and how long it is: √(1 - share) of the side around a place in [0, 1)."""
    middle, length = (place * side).astype(np.int64), (side * np.sqrt(1 - share)).astype(np.int64)
    start, stop = np.maximum(0, middle - length // 2), np.minimum(side, middle + (length + 1) // 2)
    return start, stop - start
