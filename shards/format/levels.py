"""What a view's jitter needs to know of the whole image: the grey that contrast blends with, and what would be clipped.

BEiT jitters the whole image and crops it then; here the crop is jittered, with three levels (0-255) that stand in for
the rest of the image: `low` and `high`, which the crop is clamped to, and the `pivot` of the contrast. They are
computed once, when a view is drawn, from the image's greys in the index, by operations that round alike everywhere.
"""

from dataclasses import dataclass

import numpy as np

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2

KNOTS = 32  # of a tone table
NO_TONES = (0,) * KNOTS  # a black image's, and where there is none
_STEP, _WHITE = 8, 255
_SCALE = 257  # a tone table's units to a level: 255 levels are 65,535
_LUMA = (299, 587, 114)  # ITU-R 601, in thousandths


@dataclass(frozen=True)
class Greys:
    """Of n images: `means` f32 [n], the mean grey (shards.format.index); `tones` u16 [n, KNOTS], their tone tables: all
    zeros where an index of an earlier version has none."""

    means: np.ndarray
    tones: np.ndarray


def without_tones(means: np.ndarray) -> Greys:
    """Of images of which no more is known than their mean greys f32 [n]."""
    return Greys(means, np.zeros((len(means), KNOTS), np.uint16))


def tone_table(histogram: list[int]) -> tuple[int, ...]:
    """A tone table of an image from the counts of its red, green and blue values, 256 each.

    Entry k is the mean, over the image's values x weighted as luma weighs their channels, of max(0, x − 8k), in 1/257
    of a level: how much of the image lies above 8k. Brightness clips each channel by itself, so from it follows what
    the mean luma is afterwards (`_brightened`), where the luma's own histogram would not tell.
    """
    counts = np.array(_LUMA) @ np.array(histogram, np.int64).reshape(3, 256)
    total, at_least = counts.sum(), counts[::-1].cumsum()  # at_least[i]: of 255 - i and more
    above = at_least.cumsum()[254::-_STEP][:KNOTS]  # a level of every value beyond 8k, beyond 8k + 1, …
    return tuple(((2 * _SCALE * above + total) // (2 * total)).tolist())


def view_levels(factors: np.ndarray, operations: np.ndarray, greys: Greys) -> np.ndarray:
    """u8 […, 3]: low, high and pivot of views. factors f32 […, 3] and operations i64 […, 3]: the jitter's, in the order
    in which they are applied; greys are broadcast against the leading dimensions."""
    means, without = np.broadcast_to(greys.means, factors.shape[:-1]), greys.tones[..., :1] == 0
    pivots = _pivots(factors, operations, means, greys.tones)
    levels = np.concatenate([_limits(factors, operations, pivots), pivots[..., None].astype(np.uint8)], axis=-1)
    return np.where(without, levels_of_means(factors, operations, means), levels) if without.any() else levels


def levels_of_means(factors: np.ndarray, operations: np.ndarray, means: np.ndarray) -> np.ndarray:
    """`view_levels` by the second arithmetic of views (shards.format.views.ARITHMETIC), which took the mean after
    brightness for the mean times its factor, clipped or not: for what was recorded and indexed under it, bit for bit.

    means: f32 […], the mean greys.
    """
    pivots = _mean_pivots(factors, operations, means, np.float32)
    limits = _limits(factors, operations, _mean_pivots(factors, operations, means, np.float64))
    return np.concatenate([limits, pivots[..., None].astype(np.uint8)], axis=-1)


def _mean_pivots(factors: np.ndarray, operations: np.ndarray, means: np.ndarray, dtype: type) -> np.ndarray:
    """The second arithmetic's pivots. It computed them twice: for the jitter in float32, for the limits in float64."""
    mean: np.ndarray = means.astype(dtype)
    factors, half = factors.astype(dtype), dtype(0.5)
    pivots = np.zeros_like(mean)
    for turn in range(3):
        operation, factor = operations[..., turn], factors[..., turn]
        pivots = np.where(operation == CONTRAST, np.floor(mean + half), pivots)
        mean = np.where(operation == BRIGHTNESS, mean * factor, mean)
        mean = (mean - half * (factor != 1).astype(dtype)).clip(dtype(0), dtype(_WHITE))
    return pivots


def _pivots(factors: np.ndarray, operations: np.ndarray, means: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """f64 […]: the image's mean grey when its contrast is changed, a whole number. Before it may come brightness, which
    clips, and saturation, which keeps the mean but for what it clips; each cuts off fractions, half a level on
    average."""
    factors, mean = factors.astype(np.float64), means.astype(np.float64)
    pivots, cut = np.zeros_like(mean), np.zeros_like(mean)
    for turn in range(3):
        operation, factor = operations[..., turn], factors[..., turn]
        pivots = np.where(operation == CONTRAST, np.floor((mean - cut).clip(0, _WHITE) + 0.5), pivots)
        mean = np.where((operation == BRIGHTNESS) & (factor != 1), _brightened(tones, factor), mean)
        cut = cut + 0.5 * (factor != 1)
    return pivots


def _brightened(tones: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """f64 […]: the mean of min(255, factor · x) over the values x of images with these tone tables u16 [n, KNOTS],
    exact where the value from which on all is white, 255 / factor, is a multiple of 8, and linear between those."""
    table = np.broadcast_to(tones, (*factors.shape, KNOTS)).astype(np.float64) / _SCALE
    table = np.concatenate([table, np.zeros((*factors.shape, 1))], axis=-1)
    start = _WHITE / np.maximum(factors, 1)
    knot = np.minimum(start.astype(np.int64) // _STEP, KNOTS - 1)
    width = np.where(knot == KNOTS - 1, _WHITE - _STEP * (KNOTS - 1), _STEP)
    low = np.take_along_axis(table, knot[..., None], axis=-1)[..., 0]
    high = np.take_along_axis(table, knot[..., None] + 1, axis=-1)[..., 0]
    clipped = low + (high - low) * ((start - _STEP * knot) / width)
    return factors * (table[..., 0] - clipped)


def _limits(factors: np.ndarray, operations: np.ndarray, pivots: np.ndarray) -> np.ndarray:
    """u8 […, 2]: the lowest and highest value a grey pixel may have for no operation of its view's jitter to clip it.

    A crop clamped to them before it is resized looks, jittered afterwards, like one jittered before: what is clipped to
    white there cannot pull the resize beyond white here. Exact for brightness and contrast, one line for all channels;
    but a saturation below 1 draws coloured pixels back from the edge, so no limit comes after it.
    """
    factors, shape = factors.astype(np.float64), pivots.shape
    slope, offset, counts = np.ones(shape), np.zeros(shape), np.ones(shape, dtype=bool)
    low, high = np.zeros(shape), np.full(shape, 255.0)
    for turn in range(3):
        operation, factor = operations[..., turn], factors[..., turn]
        counts &= (operation != SATURATION) | (factor >= 1)
        line = counts & (operation != SATURATION) & (factor > 0)
        base = np.where(operation == CONTRAST, pivots, 0.0)
        offset = np.where(line, offset * factor + base * (1 - factor), offset)
        slope = np.where(line, slope * factor, slope)
        low = np.where(line, np.maximum(low, -offset / slope), low)
        high = np.where(line, np.minimum(high, (255 - offset) / slope), high)
    low = np.floor(low)
    return np.stack([low, np.maximum(np.ceil(high), low)], axis=-1).clip(0, 255).astype(np.uint8)
