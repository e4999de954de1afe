"""The nearest neighbours of images: in the encoder's feature space, and by raw pixels for comparison.

Shape letters as in pipeline.model.beit. Must not know runs, HTML or any stage.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.pipeline.evaluation.attention_maps import iterate_blocks
from beitforge.pipeline.evaluation.probe import feature_depth, standardised
from beitforge.pipeline.evaluation.reconstructions import to_bytes
from beitforge.pipeline.model.beit import Encoder
from beitforge.pipeline.model.pixels import normalise
from beitforge.shards.stream.loader import Batch, Stream, load

_MICRO = 32  # images a batch
_RAW = 32  # pixels a side that raw images are compared at
_KEPT = 96  # pixels a side that images are kept at, at most


@dataclass(frozen=True, kw_only=True)
class FeatureBank:
    """n images of a set, spread over it. numbers: which of the set's; features f32 [n, D] after `layer`
    blocks; raw f32 [n, P]; images: u8 [H, W, 3] each, small."""

    numbers: np.ndarray
    features: Tensor
    raw: Tensor
    images: list[np.ndarray]
    labels: Tensor
    layer: int


@torch.no_grad()
def collect_features(encoder: Encoder, stream: Stream, samples: int, most: int, seconds: float) -> FeatureBank:
    """Of at most `most` images, and as many as `seconds` allow (one batch at least): the features at two thirds of
    the depth, mean over patches, unmasked."""
    layer = feature_depth(len(encoder.blocks))
    device = next(encoder.parameters()).device
    until, model = time.monotonic() + seconds, encoder.model
    numbers, features, raw, images, labels = [], [], [], [], []
    for batch in _batches(stream, spread(samples, most)):
        pixels = batch.pixels.to(device).float() / 255
        states = iterate_blocks(encoder, normalise(pixels, model.mean, model.std))
        _, x_BSD = next(itertools.islice(states, layer, None))
        features.append(x_BSD[:, 1:].mean(dim=1).cpu())
        raw.append(F.interpolate(pixels, (_RAW, _RAW), mode="area").flatten(1).cpu())
        height, width = pixels.shape[2:]
        scale = max(1.0, max(height, width) / _KEPT)
        small = (
            F.interpolate(pixels, (round(height / scale), round(width / scale)), mode="area") if scale > 1 else pixels
        )
        images += [to_bytes(image) for image in small.cpu()]
        numbers.append(batch.samples.numpy())
        labels.append(batch.labels)
        if time.monotonic() > until:
            break
    return FeatureBank(
        numbers=np.concatenate(numbers),
        features=torch.cat(features),
        raw=torch.cat(raw),
        images=images,
        labels=torch.cat(labels),
        layer=layer,
    )


def _batches(stream: Stream, numbers: np.ndarray) -> Iterator[Batch]:
    parts = [numbers[i : i + _MICRO] for i in range(0, len(numbers), _MICRO)]
    return load(stream, parts, workers=0, prefetch=0, pin=False)


def spread(samples: int, most: int) -> np.ndarray:
    """At most `most` of 0 … samples - 1, each once, in an order whose every beginning is spread over all of them."""
    stride = max(1, round(samples * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, samples) > 1:
        stride += 1
    return np.arange(min(samples, most), dtype=np.int64) * stride % samples


def by_features(gathered: FeatureBank, count: int) -> tuple[Tensor, Tensor]:
    """The most alike others of each image and their cosines, [n, count], nearest first, of standardised features."""
    features = F.normalize(standardised(gathered.features, gathered.features), dim=1)
    return _nearest(features @ features.T, count)


def by_pixels(gathered: FeatureBank, count: int) -> tuple[Tensor, Tensor]:
    """The same by the distance of small images; the values are distances below zero."""
    return _nearest(-torch.cdist(gathered.raw, gathered.raw), count)


def _nearest(alike_nn: Tensor, count: int) -> tuple[Tensor, Tensor]:
    alike_nn = alike_nn.clone().fill_diagonal_(-math.inf)
    values, nearest = alike_nn.topk(min(count, len(alike_nn) - 1), dim=1)
    return nearest, values


def agreement(nearest: Tensor, labels: Tensor) -> float:
    """The share of neighbours [n, k] that have their image's label."""
    return float((labels[nearest] == labels[:, None]).double().mean())
