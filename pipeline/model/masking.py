"""Blockwise masks (docs/recipe.md, "Mask"; the paper, §2.3, and the released MaskingGenerator), a batch at a time.

Randomness comes in as an argument, so a mask is a pure function of its sample. Must not know shards.
"""

import math
from collections.abc import Callable

import numpy as np

from beitforge.pipeline.config.settings import Mask

_TRIES = 10  # per block


def draw_masks(
    mask: Mask,
    grid: tuple[int, int],
    samples: int,
    uniform: Callable[[int], np.ndarray],
    fill: Callable[[], np.ndarray],
) -> np.ndarray:
    """Masks bool [samples, N] for a grid of (rows, columns) patches; True is masked.

    uniform(i): float64 [samples, 4] in [0, 1) for try i of each sample (area, aspect, top, left).
    fill(): float64 [samples, N], which patches complete an exact mask; called only when mask.exact.
    """
    rows, columns = grid
    masks = np.zeros((samples, rows, columns), dtype=bool)
    row, column = np.arange(rows)[None, :, None], np.arange(columns)[None, None, :]
    log_aspect = math.log(1 / mask.aspect_min)
    masked = np.zeros(samples, dtype=np.int64)
    tries = np.zeros(samples, dtype=np.int64)  # of the present block
    attempt = 0
    active = masked < mask.num_patches
    while active.any():
        u = uniform(attempt)
        attempt += 1
        most = np.minimum(mask.num_patches - masked, mask.max_block or mask.num_patches)
        area = mask.min_block + u[:, 0] * (most - mask.min_block)
        aspect = np.exp(log_aspect * (2 * u[:, 1] - 1))
        height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        top = (u[:, 2] * (rows - height + 1)).astype(np.int64)
        start = (u[:, 3] * (columns - width + 1)).astype(np.int64)
        fits = active & (height < rows) & (width < columns)
        down, across = row - top[:, None, None], column - start[:, None, None]
        block = (down >= 0) & (down < height[:, None, None]) & (across >= 0) & (across < width[:, None, None])
        new = (block & ~masks).sum(axis=(1, 2))
        takes = fits & (new > 0) & (new <= most)
        masks |= block & takes[:, None, None]
        masked += np.where(takes, new, 0)
        tries = np.where(takes, 0, tries + 1)
        active = (masked < mask.num_patches) & (tries < _TRIES)
    flat = masks.reshape(samples, rows * columns)
    return _complete(flat, mask.num_patches - masked, fill()) if mask.exact else flat


def kept_branches(drop_path: float, layers: int, uniform: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Which residual branches survive drop path, linear over depth: bool [samples, L, 2].

    uniform(numbers): float64 [samples, L, 2] in [0, 1), for the branches i64 [1, L, 2].
    """
    drop = drop_path * np.arange(layers) / max(1, layers - 1)
    return uniform(np.arange(2 * layers).reshape(1, layers, 2)) >= drop[None, :, None]


def _complete(masks: np.ndarray, missing: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mask `missing` more patches of each sample: the unmasked ones of lowest score (BEiT v2's completion)."""
    rank = np.argsort(np.argsort(np.where(masks, 2.0, scores), axis=1, kind="stable"), axis=1, kind="stable")
    return masks | (rank < missing[:, None])
