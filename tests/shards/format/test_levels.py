"""Levels: what a crop's jitter has to know of the whole image, against the image itself."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from beitforge.shards import counter_rng
from beitforge.shards.decode import codec
from beitforge.shards.format.levels import (
    BRIGHTNESS,
    CONTRAST,
    KNOTS,
    SATURATION,
    Greys,
    levels_of_means,
    tone_table,
    view_levels,
    without_tones,
)

ENHANCERS = {BRIGHTNESS: ImageEnhance.Brightness, CONTRAST: ImageEnhance.Contrast, SATURATION: ImageEnhance.Color}
LUMA = np.array([0.299, 0.587, 0.114])


def random_image(kind: str, seed: int) -> np.ndarray:
    """u8 [40, 50, 3]: values of all levels, mostly white, of one channel, or of two colours."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (40, 50, 3), np.uint8)
    if kind == "bright":
        return np.maximum(image, 255 - image // 4)
    if kind == "red":
        return image * np.array([1, 0, 0], np.uint8)
    if kind == "two colours":
        return np.where(image[..., :1] < 100, rng.integers(0, 256, 3), rng.integers(0, 256, 3)).astype(np.uint8)
    return image


KINDS = ("any", "bright", "red", "two colours")


def greys_of(image: np.ndarray) -> Greys:
    mean, tones = codec.greys(image)
    return Greys(np.array([mean], np.float32), np.array([tones], np.uint16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tone_table_says_how_much_lies_above_each_level(kind):
    image = random_image(kind, 1)
    table = np.array(tone_table(Image.fromarray(image).histogram())) / 257
    for knot in range(KNOTS):
        above = np.maximum(image.astype(float) - 8 * knot, 0).mean(axis=(0, 1)) @ LUMA
        assert abs(table[knot] - above) <= 0.5 / 257 + 1e-9


def test_the_tables_of_black_and_white():
    black, white = (tone_table(Image.new("RGB", (3, 2), colour).histogram()) for colour in ("black", "white"))
    assert black == (0,) * KNOTS and white == tuple(257 * (255 - 8 * knot) for knot in range(KNOTS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.1, 1.4, 2.0, 9.0])
def test_the_pivot_after_brightness_is_pillows(kind, factor):
    """To a level; a mean that is only scaled is up to 70 levels off."""
    for seed in range(5):
        image = random_image(kind, seed)
        brightened = np.array(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))
        factors, operations = np.array([[factor, 0.7, 1.0]], np.float32), np.array([[BRIGHTNESS, CONTRAST, SATURATION]])
        found = view_levels(factors, operations, greys_of(image))[0, 2]
        assert abs(int(found) - codec.greys(brightened)[0]) <= 1.5


@pytest.mark.parametrize(
    "before", [(), (BRIGHTNESS,), (SATURATION,), (BRIGHTNESS, SATURATION), (SATURATION, BRIGHTNESS)]
)
def test_the_pivot_in_every_order(before):
    """Of an image of all colours, under the recipe's jitter: what saturation clips is the only thing not foreseen."""
    rest = tuple(operation for operation in (BRIGHTNESS, CONTRAST, SATURATION) if operation not in before)
    order = (*before, CONTRAST, *(operation for operation in rest if operation != CONTRAST))
    rng = np.random.default_rng(3)
    for seed in range(6):
        image, factors = random_image("any", seed), 0.6 + 0.8 * rng.random(3).astype(np.float32)
        whole = Image.fromarray(image)
        for turn, operation in enumerate(before):
            whole = ENHANCERS[operation](whole).enhance(float(factors[turn]))
        found = view_levels(factors[None], np.array([order]), greys_of(image))[0, 2]
        assert abs(int(found) - codec.greys(np.array(whole))[0]) <= 2


def second_arithmetic(factors: np.ndarray, operations: np.ndarray, mean: float) -> tuple[list[int], float]:
    """Limits and contrast's base as version 2 had them: the loader in float64, the jitter in float32, in torch."""
    slope, offset, low, high, counts, grey = 1.0, 0.0, 0.0, 255.0, True, float(np.float32(mean))
    base, on_device = 0.0, torch.tensor(mean, dtype=torch.float32)
    for operation, factor in zip(operations.tolist(), factors, strict=True):
        f = float(factor)
        counts = counts and (operation != SATURATION or f >= 1)
        if operation == CONTRAST:
            base = (on_device + 0.5).floor().item()
        if counts and operation != SATURATION and f > 0:
            about = np.floor(grey + 0.5) if operation == CONTRAST else 0.0
            offset, slope = offset * f + about * (1 - f), slope * f
            low, high = max(low, -offset / slope), min(high, (255 - offset) / slope)
        if operation == BRIGHTNESS:
            grey, on_device = grey * f, on_device * torch.tensor(factor)
        if f != 1:
            grey, on_device = grey - 0.5, on_device - 0.5
        grey, on_device = min(max(grey, 0.0), 255.0), on_device.clamp(0, 255)
    low = np.floor(low)
    return [int(min(max(value, 0), 255)) for value in (low, max(np.ceil(high), low))], base


def test_the_second_arithmetic_is_kept_to_the_bit():
    """Token sets recorded under it, and images indexed under it, give the pixels they gave."""
    count = 400
    uniform = counter_rng.uniform(97, np.arange(count)[:, None], np.arange(5))
    factors = np.where(uniform[:, :3] < 0.1, 1.0, 0.4 + 1.4 * uniform[:, :3]).astype(np.float32)
    operations = np.stack([np.random.default_rng(i).permutation(3) for i in range(count)])
    means = (255 * uniform[:, 3]).astype(np.float32)
    found = levels_of_means(factors, operations, means)
    assert np.array_equal(found, view_levels(factors, operations, without_tones(means)))
    for i in range(count):
        limits, base = second_arithmetic(factors[i], operations[i], means[i])
        assert found[i].tolist() == [*limits, int(base)]


def test_views_of_images_with_and_without_tables_in_one_batch():
    """Each as if it were alone."""
    with_table, image = greys_of(random_image("bright", 2)), np.array([1.1, 0.7, 1.2], np.float32)
    operations = np.array([BRIGHTNESS, CONTRAST, SATURATION])
    bare = without_tones(with_table.means)
    both = Greys(np.repeat(with_table.means, 2), np.concatenate([with_table.tones, bare.tones]))
    alone = [view_levels(image[None], operations[None], greys)[0].tolist() for greys in (with_table, bare)]
    assert view_levels(np.stack([image] * 2), np.stack([operations] * 2), both).tolist() == alone
    assert alone[0] != alone[1]
