"""A view: how an image is cut and coloured. Drawn once, by `tokenize`; recorded; cut by the record ever after.

The order of BEiT's transform (arXiv 2106.08254, released code): colour jitter of the whole image, horizontal flip,
one random resized crop. A record holds the crop box in source pixels, the flip, the jitter as factors and order, and
the levels by which a crop is jittered as its whole image would be (shards.format.levels).
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from beitforge.shards import counter_rng
from beitforge.shards.format.levels import BRIGHTNESS, CONTRAST, SATURATION, Greys, levels_of_means, view_levels

JITTER_ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION))), dtype=np.int64)
_TRIES = 10

# The number of the arithmetic that turns a record into pixels: clamp, cut, resize and flip in the loader, jitter on the
# device. To be raised whenever it changes: tokens made by another no longer match the pixels. Sets of the second are
# read by it: their records have no levels, which follow from their images' mean greys.
ARITHMETIC = 3
READ_ARITHMETICS = (2, 3)


@dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """What views are drawn from: crop area as a share of the image, aspect as width / height, jitter half-widths."""

    seed: int = 0
    area_min: float = 0.08
    area_max: float = 1.0
    aspect_min: float = 3 / 4
    aspect_max: float = 4 / 3
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4


@dataclass(frozen=True)
class Views:
    """Records of views; the leading dimensions are the caller's.

    boxes u32 […, 4] x, y, width, height in source pixels · flips u8 […] · jitters f32 […, 3] factors of brightness,
    contrast, saturation (1 changes nothing) · orders u8 […] row of JITTER_ORDERS · levels u8 […, 3] lowest and highest
    value the crop is clamped to, and the grey that contrast blends with; u8 […, 0] in sets of earlier versions.
    """

    boxes: np.ndarray
    flips: np.ndarray
    jitters: np.ndarray
    orders: np.ndarray
    levels: np.ndarray


FIELDS = tuple(field.name for field in dataclasses.fields(Views))


def draw_views(
    policy: ViewPolicy,
    key_hashes: np.ndarray,
    numbers: np.ndarray | int,
    widths: np.ndarray,
    heights: np.ndarray,
    greys: Greys,
) -> Views:
    """Views of n images, one each: view `numbers` of the images named by `key_hashes` (u64 [n]).

    A pure function of its arguments. The crop is torchvision's RandomResizedCrop: ten tries, then the largest central
    crop within the aspect limits. `exp` and `sqrt` may differ by an ulp between machines, so the record is what counts.
    """

    def uniform(which: np.ndarray, whats: range, attempt: int = 0) -> np.ndarray:
        """f64 [n, len(whats)] of the views numbered `which`."""
        number = numbers[which, None] if isinstance(numbers, np.ndarray) else numbers
        names = key_hashes[which, None], number, np.arange(whats.start, whats.stop)
        return counter_rng.uniform(counter_rng.VIEW, policy.seed, *names, attempt)

    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    boxes, every = _central_boxes(policy, widths, heights), np.arange(len(widths))
    log_min, log_max = math.log(policy.aspect_min), math.log(policy.aspect_max)
    unsettled, attempt = every, 0
    while unsettled.size and attempt < _TRIES:
        u, wide, tall = uniform(unsettled, range(4), attempt), widths[unsettled], heights[unsettled]
        attempt += 1
        area = wide * tall * (policy.area_min + (policy.area_max - policy.area_min) * u[:, 0])
        aspect = np.exp(log_min + (log_max - log_min) * u[:, 1])
        crop_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        crop_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (crop_w > 0) & (crop_w <= wide) & (crop_h > 0) & (crop_h <= tall)
        x = (u[:, 2] * (wide - crop_w + 1)).astype(np.int64)
        y = (u[:, 3] * (tall - crop_h + 1)).astype(np.int64)
        boxes[unsettled[fits]] = np.stack([x, y, crop_w, crop_h], axis=-1)[fits]
        unsettled = unsettled[~fits]
    flips, orders, *factors = uniform(every, range(4, 9)).T
    spread = np.array([policy.brightness, policy.contrast, policy.saturation])
    lowest = np.maximum(0.0, 1.0 - spread)
    spans = [lowest[op] + (1.0 + spread[op] - lowest[op]) * factors[op] for op in range(3)]
    jitters = np.stack(spans, axis=-1).astype(np.float32)
    turns = (orders * len(JITTER_ORDERS)).astype(np.uint8)
    return Views(
        boxes.astype(np.uint32),
        (flips < policy.flip).astype(np.uint8),
        jitters,
        turns,
        view_levels(*_applied(jitters, turns), greys),
    )


def impossible(views: Views) -> np.ndarray:
    """bool […]: the records that no policy gives, whatever the image."""
    factors = np.isfinite(views.jitters) & (views.jitters >= 0)
    wrong = (views.flips > 1) | (views.orders >= len(JITTER_ORDERS)) | ~factors.all(axis=-1)
    return wrong | (views.levels[..., 0] > views.levels[..., 1]) if views.levels.shape[-1] else wrong


def completed(views: Views, means: np.ndarray) -> Views:
    """The views with their levels; those recorded under the second arithmetic have none, and get them from the mean
    greys of their images, f32 broadcast against the leading dimensions."""
    if views.levels.shape[-1]:
        return views
    factors, operations = _applied(views.jitters, views.orders)
    return dataclasses.replace(
        views, levels=levels_of_means(factors, operations, np.broadcast_to(means, views.orders.shape))
    )


def _applied(jitters: np.ndarray, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of jitters in the order in which they are applied, and which operation each is of; […, 3] each."""
    operations = JITTER_ORDERS[orders]
    return np.take_along_axis(jitters, operations, axis=-1), operations


def _central_boxes(policy: ViewPolicy, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The largest central boxes (i64 [n, 4]) whose aspect is within the policy's limits."""
    crop_w = np.minimum(widths, np.rint(heights * policy.aspect_max).astype(np.int64)).clip(1)
    crop_h = np.minimum(heights, np.rint(widths / policy.aspect_min).astype(np.int64)).clip(1)
    return np.stack([(widths - crop_w) // 2, (heights - crop_h) // 2, crop_w, crop_h], axis=-1)


def central_views(widths: np.ndarray, heights: np.ndarray, aspect: float = 1.0, share: float = 0.875) -> Views:
    """The plain views of evaluation: `share` (224 of 256) of the largest central box of `aspect` = width / height, no
    jitter."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    tallest = np.minimum(widths / aspect, heights)
    crop_w = np.rint(tallest * aspect * share).astype(np.int64).clip(1)
    crop_h = np.rint(tallest * share).astype(np.int64).clip(1)
    boxes = np.stack([(widths - crop_w) // 2, (heights - crop_h) // 2, crop_w, crop_h], axis=-1)
    count = len(widths)
    return Views(
        boxes.astype(np.uint32),
        np.zeros(count, np.uint8),
        np.ones((count, 3), np.float32),
        np.zeros(count, np.uint8),
        np.tile(np.array([0, 255, 0], np.uint8), (count, 1)),
    )
