"""A view: how an image is cut and coloured. Drawn once, by `tokenize`; recorded; cut by the record ever after.

The order of BEiT's transform (arXiv 2106.08254, released code): colour jitter of the whole image, horizontal flip,
one random resized crop. A record holds the crop box in source pixels, the flip, and the jitter as factors and order.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from beitforge.shards import counter_rng

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
JITTER_ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION))), dtype=np.int64)
_TRIES = 10

# The number of the arithmetic that turns a record into pixels: clamp, cut, resize and flip in the loader, jitter on the
# device. To be raised whenever it changes: tokens made by another no longer match the pixels.
ARITHMETIC = 2


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
    contrast, saturation (1 changes nothing) · orders u8 […] row of JITTER_ORDERS.
    """

    boxes: np.ndarray
    flips: np.ndarray
    jitters: np.ndarray
    orders: np.ndarray


FIELDS = tuple(field.name for field in dataclasses.fields(Views))


def draw_views(
    policy: ViewPolicy, key_hashes: np.ndarray, numbers: np.ndarray | int, widths: np.ndarray, heights: np.ndarray
) -> Views:
    """Views of n images, one each: view `numbers` of the images named by `key_hashes` (u64 [n]).

    A pure function of its arguments. The crop is torchvision's RandomResizedCrop: ten tries, then the largest central
    crop within the aspect limits. `exp` and `sqrt` may differ by an ulp between machines, so the record is what counts.
    """

    def uniform(what: int, attempt: int = 0) -> np.ndarray:
        return counter_rng.uniform(counter_rng.VIEW, policy.seed, key_hashes, numbers, what, attempt)

    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    boxes = _central_boxes(policy, widths, heights)
    settled = np.zeros(len(widths), dtype=bool)
    log_min, log_max = math.log(policy.aspect_min), math.log(policy.aspect_max)
    for attempt in range(_TRIES):
        area = widths * heights * (policy.area_min + (policy.area_max - policy.area_min) * uniform(0, attempt))
        aspect = np.exp(log_min + (log_max - log_min) * uniform(1, attempt))
        crop_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        crop_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = ~settled & (crop_w > 0) & (crop_w <= widths) & (crop_h > 0) & (crop_h <= heights)
        x = (uniform(2, attempt) * (widths - crop_w + 1)).astype(np.int64)
        y = (uniform(3, attempt) * (heights - crop_h + 1)).astype(np.int64)
        boxes[fits] = np.stack([x, y, crop_w, crop_h], axis=-1)[fits]
        settled |= fits
    spread = np.array([policy.brightness, policy.contrast, policy.saturation])
    lowest = np.maximum(0.0, 1.0 - spread)
    jitters = np.stack([lowest[op] + (1.0 + spread[op] - lowest[op]) * uniform(6 + op) for op in range(3)], axis=-1)
    return Views(
        boxes.astype(np.uint32),
        (uniform(4) < policy.flip).astype(np.uint8),
        jitters.astype(np.float32),
        (uniform(5) * len(JITTER_ORDERS)).astype(np.uint8),
    )


def impossible(views: Views) -> np.ndarray:
    """bool […]: the records that no policy gives, whatever the image."""
    factors = np.isfinite(views.jitters) & (views.jitters >= 0)
    return (views.flips > 1) | (views.orders >= len(JITTER_ORDERS)) | ~factors.all(axis=-1)


def unclipped_limits(views: Views, mean_greys: np.ndarray) -> np.ndarray:
    """u8 […, 2]: the lowest and highest value a grey pixel may have for no operation of its view's jitter to clip it.

    A crop clamped to them before it is resized looks, jittered afterwards, like one jittered before: what is clipped to
    white there cannot pull the resize beyond white here. Exact for brightness and contrast, one line for all channels;
    but a saturation below 1 draws coloured pixels back from the edge, so no limit comes after it.
    mean_greys: f32, broadcast against the views' leading dimensions.
    """
    factors, orders = views.jitters.astype(np.float64), JITTER_ORDERS[views.orders]
    shape = views.orders.shape
    mean = np.broadcast_to(mean_greys.astype(np.float64), shape)
    slope, offset, counts = np.ones(shape), np.zeros(shape), np.ones(shape, dtype=bool)
    low, high = np.zeros(shape), np.full(shape, 255.0)
    for turn in range(3):
        operation = orders[..., turn]
        factor = np.take_along_axis(factors, operation[..., None], axis=-1)[..., 0]
        counts &= (operation != SATURATION) | (factor >= 1)
        line = counts & (operation != SATURATION) & (factor > 0)
        base = np.where(operation == CONTRAST, np.floor(mean + 0.5), 0.0)
        mean = np.where(operation == BRIGHTNESS, mean * factor, mean)
        mean = (mean - 0.5 * (factor != 1)).clip(0, 255)  # as pipeline.model.pixels.jitter has it
        offset = np.where(line, offset * factor + base * (1 - factor), offset)
        slope = np.where(line, slope * factor, slope)
        low = np.where(line, np.maximum(low, -offset / slope), low)
        high = np.where(line, np.minimum(high, (255 - offset) / slope), high)
    low = np.floor(low)
    return np.stack([low, np.maximum(np.ceil(high), low)], axis=-1).clip(0, 255).astype(np.uint8)


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
    )
