"""What fine-tuning does to pictures (RECIPE, "Fine-tuning"): RandAugment by timm, rectangles to erase, how to mix.

RandAugment works on the cut picture in the loader. Erasing and mixing are drawn here and done on the device
(pipeline.objective): timm's own draw from global state and wait for the device. Everything is a pure function of a
seed and sample numbers. Must not know the loader, the model or any stage.
"""

import random
from collections.abc import Callable

import numpy as np
import torch

from pipeline.config import ConfigError, Finetune
from pipeline.masking import kept_branches
from pipeline.stand_in import torchvision
from shards import draws

_TRIES = 10
_AREA, _ASPECT = (0.02, 1 / 3), 0.3  # of an erased rectangle, as timm and the released code have them
_TRANSLATE = 0.45  # of the shorter side, at most
_HALF_CUTMIX = 0.5  # where both are on, how often a batch is cut instead of mixed


class RandAugment:
    """timm's RandAugment of a picture, its randomness that of the sample: the same in any worker of any rank."""

    def __init__(self, words: str, size: tuple[int, int], mean: tuple[float, ...], seed: int):
        """words: timm's, as rand-m9-mstd0.5-inc1. size: H, W. Raises ConfigError without timm, or for other words."""
        self.seed = seed
        self.operate = _operations(words, size, mean)

    def __call__(self, sample: int, pixels_CHW: torch.Tensor) -> None:
        """Change uint8 pixels [3, H, W] in place. timm draws from Python's and NumPy's global generators: they are
        left as they were found."""
        from PIL import Image

        number = int(draws.bits(draws.AUGMENT, self.seed, sample)[0])
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
    torchvision()
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

    keep bool [B, L, 2] with drop path · erase i64 [B, 4] top, left, height, width (0: nothing is erased) and noise i64
    [B], its seed · share, blend f32 [B] and box i64 [B, 4]: how each picture is mixed with its partner, one draw for
    the micro batch (pipeline.objective.mixed).
    """
    drawn = {}
    if tune.drop_path > 0:
        drawn["keep"] = kept_branches(
            tune.drop_path, layers, lambda number: draws.uniform(draws.DROP_PATH, seed, samples[:, None, None], number)
        )
    if tune.erase > 0:
        drawn["erase"] = erased_boxes(
            tune.input_size, tune.erase, lambda what, attempt: draws.uniform(draws.ERASE, seed, samples, what, attempt)
        )
        drawn["noise"] = (draws.bits(draws.ERASE, seed, samples, 9) >> np.uint64(32)).astype(np.int64)
    if tune.mixup > 0 or tune.cutmix > 0:
        uniform = draws.uniform(draws.MIX, seed, int(samples[0]), np.arange(4)).tolist()
        share, blend, box = mixing(tune.input_size, tune.mixup, tune.cutmix, uniform)
        drawn["share"] = np.full(len(samples), share, np.float32)
        drawn["blend"] = np.full(len(samples), blend, np.float32)
        drawn["box"] = np.tile(np.array(box, np.int64), (len(samples), 1))
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


def mixing(
    size: tuple[int, int], mixup: float, cutmix: float, uniform: list[float]
) -> tuple[float, float, tuple[int, int, int, int]]:
    """How a batch is mixed: the share of a picture's own label, the weight of its own pixels outside a box, and the
    box (top, left, height, width) inside which they are its partner's.

    mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019), each with share from Beta(alpha, alpha); alpha 0 switches it
    off, with both on half of the batches are cut. uniform: four numbers in [0, 1).
    """
    from scipy.special import betaincinv

    cuts = cutmix > 0 and (mixup == 0 or uniform[0] < _HALF_CUTMIX)
    alpha = cutmix if cuts else mixup
    share = float(betaincinv(alpha, alpha, uniform[1]))
    if not cuts:
        return share, share, (0, 0, 0, 0)
    height, width = size
    ratio = (1 - share) ** 0.5
    middle = int(uniform[2] * height), int(uniform[3] * width)
    tall, wide = int(height * ratio), int(width * ratio)
    top, left = max(0, middle[0] - tall // 2), max(0, middle[1] - wide // 2)
    bottom, right = min(height, middle[0] + (tall + 1) // 2), min(width, middle[1] + (wide + 1) // 2)
    box = (top, left, bottom - top, right - left)
    return 1 - box[2] * box[3] / (height * width), 1.0, box
