"""Antialiased resizing of many images at once on any device, to the bits that torch and Pillow give on a processor.

Both weigh pixels by integers and round after each of two passes, so matrix products give the same bits wherever they
are made, as long as every sum is exact: weights are multiplied a byte at a time, which leaves sums below 2^24 that
float32 holds (and TF32 takes no digit from numbers of 8 bits). Sources: torch's
aten/src/ATen/native/cpu/UpSampleKernel.cpp (_compute_index_ranges_int16_weights), Pillow's src/libImaging/Resample.c
(precompute_coeffs, normalize_coeffs_8bpc, and in 13.0 which pass is first).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from beitforge.shards.decode import codec
from beitforge.shards.stream.loader import TORCH, TORCH_LANCZOS

_PILLOW_BITS = 22
_MOST_TORCH_BITS, _TORCH_LIMIT = 22, 1 << 15
_BYTES = 3  # of a weight
_MOST_TAPS = 1 << 8  # pixels that one is made of: sums of products of bytes stay below 2^24
_AT_ONCE = 1 << 27  # bytes of the images that are resized together, as floats


class _Taps(NamedTuple):
    """Of each of n pixels the first source pixel i64 [n], the weights of those from it on i64 [n, taps], and how many
    bits they are shifted by."""

    first: np.ndarray
    weights: np.ndarray
    bits: int


def _cubic(x: float) -> float:
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


_KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    TORCH: (_cubic, 2.0),
    TORCH_LANCZOS: (_lanczos, 3.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


@functools.lru_cache(maxsize=2048)
def _taps(source: int, target: int, resample: str) -> _Taps:
    """How `target` pixels are made of `source`."""
    kernel, reach = _KERNELS[resample]
    scale = source / target
    stretch = max(scale, 1.0)
    support = reach * stretch
    firsts, rows = [], []
    for i in range(target):
        center = scale * (i + 0.5)
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), source)
        row = [kernel((j - center + 0.5) / stretch) for j in range(first, last)]
        total = sum(row)
        firsts.append(first)
        rows.append([value / total for value in row])
    bits = _PILLOW_BITS
    if resample in (TORCH, TORCH_LANCZOS):
        largest = max(max(row) for row in rows)
        fits = (bits for bits in range(_MOST_TORCH_BITS) if int(0.5 + largest * (2 << bits)) >= _TORCH_LIMIT)
        bits = next(fits, _MOST_TORCH_BITS)
    weights = np.zeros((target, max(map(len, rows))))
    for i, row in enumerate(rows):
        weights[i, : len(row)] = row
    scaled = weights * (1 << bits)
    return _Taps(np.array(firsts), np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int64), bits)


def resizes(box: Sequence[int], size: tuple[int, int], resample: str) -> bool:
    """Whether an image of box (h, w) is resized here to size (H, W): not where a pixel is made of too many."""
    reach = _KERNELS[resample][1]
    return all(
        2 * reach * max(1.0, source / target) + 2 <= _MOST_TAPS for source, target in zip(box, size, strict=True)
    )


def resize(images: list[torch.Tensor], size: tuple[int, int], resample: str) -> torch.Tensor:
    """u8 [n, 3, H, W] of images u8 [h, w, 3] of any sizes, on their device, by a filter of shards.stream.loader.

    The bits are those of shards.stream.loader.cut_into for each.
    """
    out = torch.empty((len(images), 3, *size), dtype=torch.uint8, device=images[0].device)
    boxes = [(image.shape[0], image.shape[1]) for image in images]
    turned = [resample not in (TORCH, TORCH_LANCZOS) and _columns_first(box, size) for box in boxes]
    for turn in (False, True):
        mine = [i for i in range(len(images)) if turned[i] == turn]
        for group in _groups([boxes[i] for i in mine]) if mine else ():
            rows = [mine[i] for i in group]
            if turn:
                found = _resize([images[i].transpose(0, 1) for i in rows], size[::-1], resample).transpose(2, 3)
            else:
                found = _resize([images[i] for i in rows], size, resample)
            out[rows] = found
    return out


def _columns_first(box: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether Pillow resizes columns before rows: those of newer versions where that leaves less to do."""
    shorter, narrower = box[0] - size[0], box[1] - size[1]
    return shorter > 0 and shorter > 2 * narrower and _pillow_has_two_orders()


@functools.lru_cache(maxsize=1)
def _pillow_has_two_orders() -> bool:
    """Asked of the Pillow that is installed: 12.2 has one order."""
    tall = (np.arange(40 * 8 * 3, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).reshape(40, 8, 3)
    rows_first = _resize([torch.from_numpy(tall)], (7, 5), "bicubic")[0].permute(1, 2, 0).numpy()
    return not np.array_equal(codec.resize(tall, (7, 5), "bicubic"), rows_first)


def _groups(boxes: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Images of like sizes together, as many as memory for all of the largest of them allows."""
    group: list[int] = []
    tallest = widest = 0
    for i in sorted(range(len(boxes)), key=lambda i: boxes[i][0] * boxes[i][1]):
        height, width = max(tallest, boxes[i][0]), max(widest, boxes[i][1])
        if group and 12 * height * width * (len(group) + 1) > _AT_ONCE:
            yield group
            group, height, width = [], *boxes[i]
        group.append(i)
        tallest, widest = height, width
    yield group


def _resize(images: list[torch.Tensor], size: tuple[int, int], resample: str) -> torch.Tensor:
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    padded = images[0].new_zeros((len(images), height, width, 3))
    for place, image in zip(padded, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    across = _Matrices([_taps(image.shape[1], size[1], resample) for image in images], width, padded.device)
    down = _Matrices([_taps(image.shape[0], size[0], resample) for image in images], height, padded.device)
    lines = across.times(padded.transpose(1, 2).reshape(len(images), width, height * 3))  # [n, W, h · 3]
    lines = lines.reshape(len(images), size[1], height, 3).permute(0, 2, 3, 1).reshape(len(images), height, -1)
    found = down.times(lines)  # [n, H, 3 · W]
    return found.reshape(len(images), size[0], 3, size[1]).transpose(1, 2)


class _Matrices:
    """Weights of n images as matrices f32 [n, target, most], one for each byte, the highest with the sign."""

    def __init__(self, taps: list[_Taps], most: int, device: torch.device):
        longest = max(one.weights.shape[1] for one in taps)
        weights = np.zeros((len(taps), len(taps[0].first), longest), np.int64)
        for place, one in zip(weights, taps, strict=True):
            place[:, : one.weights.shape[1]] = one.weights
        columns = np.stack([one.first for one in taps])[:, :, None] + np.arange(longest)
        weights[columns >= most] = 0  # behind a row's last tap, where they are zero
        places = torch.from_numpy(columns.clip(max=most - 1)).to(device)
        dense = torch.zeros((*weights.shape[:2], most), dtype=torch.int32, device=device)
        dense.scatter_add_(2, places, torch.from_numpy(weights.astype(np.int32)).to(device))
        self.bits = torch.tensor([one.bits for one in taps], dtype=torch.int32, device=device)[:, None, None]
        low = [(dense >> (8 * i)) & 255 for i in range(_BYTES - 1)]
        self.planes = [plane.float() for plane in (*low, dense >> (8 * (_BYTES - 1)))]

    def times(self, pixels: torch.Tensor) -> torch.Tensor:
        """u8 [n, target, k] of pixels u8 [n, most, k]."""
        numbers = pixels.float()
        total = torch.zeros((), dtype=torch.int32, device=pixels.device)
        for i, plane in enumerate(self.planes):
            total = total + (torch.bmm(plane, numbers).to(torch.int32) << (8 * i))
        half = torch.ones_like(self.bits) << (self.bits - 1)
        return ((total + half) >> self.bits).clamp(0, 255).to(torch.uint8)
