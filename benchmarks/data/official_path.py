"""BEiT's own data path, as its datasets.py, transforms.py and masking_generator.py have it, without torchvision.

What torchvision's functional code does to a Pillow image is written out here with Pillow and torch; where numbers are
drawn, they are drawn as there.
"""

import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset

from beitforge.pipeline.config.settings import Mask
from beitforge.shards.format.views import JITTER_ORDERS
from benchmarks.data.masks import published_mask
from benchmarks.data.views import Draw, official_cut, official_jitter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER, AREA, ASPECT, TRIES = 0.4, (0.08, 1.0), (3 / 4, 4 / 3), 10
SIZE, SECOND_SIZE = 224, 112
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

Sample = tuple[torch.Tensor, torch.Tensor, np.ndarray]


class OfficialFiles(Dataset):
    """Item i of a folder of files: torchvision's ImageFolder with the released transform."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Sample:
        with open(self.files[i], "rb") as file:
            return transform(Image.open(file).convert("RGB"))


def transform(image: Image.Image) -> Sample:
    """DataAugmentationForBEiT: for the encoder f32 [3, 224, 224], for the tokenizer f32 [3, 112, 112], the mask."""
    order = torch.randperm(4)
    factors = [float(torch.empty(1).uniform_(1 - JITTER, 1 + JITTER)) for _ in _ENHANCERS]
    image = jittered(image, [int(turn) for turn in order if turn < len(_ENHANCERS)], factors)
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = drawn_box(image.width, image.height)
    patches = to_tensor(cut(image, box, SIZE, Image.Resampling.BICUBIC))
    visual = to_tensor(cut(image, box, SECOND_SIZE, Image.Resampling.LANCZOS))
    mean, std = (torch.as_tensor(values, dtype=patches.dtype)[:, None, None] for values in (MEAN, STD))
    uniforms = iter(lambda: [random.random() for _ in range(4)], None)
    mask, _ = published_mask(Mask(exact=False), uniforms)
    return patches.clone().sub_(mean).div_(std), 0.8 * visual + 0.1, mask


def jittered(image: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    """ColorJitter on Pillow's side: each operation of `order` on the whole image."""
    for operation in order:
        image = _ENHANCERS[operation](image).enhance(factors[operation])
    return image


def drawn_box(width: int, height: int) -> tuple[int, int, int, int]:
    """RandomResizedCropAndInterpolationWithTwoPic.get_params: left, top, width, height."""
    for _ in range(TRIES):
        area = random.uniform(*AREA) * width * height
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if crop_width <= width and crop_height <= height:
            top, left = random.randint(0, height - crop_height), random.randint(0, width - crop_width)
            return left, top, crop_width, crop_height
    crop_width, crop_height = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def cut(image: Image.Image, box: tuple[int, int, int, int], size: int, resample: Image.Resampling) -> Image.Image:
    """resized_crop on Pillow's side."""
    left, top, width, height = box
    return image.crop((left, top, left + width, top + height)).resize((size, size), resample)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """ToTensor: f32 [3, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(image.height, image.width, 3)
    return pixels.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)


def check(draw: Draw) -> None:
    """Jitter, flip and both cuts give the pixels of the transform that benchmarks.data.views compares ours with."""
    factors = [float(factor) for factor in draw.factors]
    image = jittered(Image.fromarray(draw.pixels), JITTER_ORDERS[draw.order].tolist(), factors)
    whole = official_jitter(draw)
    assert np.array_equal(np.array(image), whole), f"{draw.name}: another jitter"
    x, y, width, height = draw.box
    if draw.flip:
        image, x = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.width - x - width
    for size, resample in ((SIZE, Image.Resampling.BICUBIC), (SECOND_SIZE, Image.Resampling.LANCZOS)):
        ours = np.array(cut(image, (x, y, width, height), size, resample))
        assert np.array_equal(ours, official_cut(whole, draw, size, resample)), f"{draw.name}: another cut at {size}"
