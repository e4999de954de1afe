"""Blockwise masks (docs/recipe.md, "Mask"; the paper, §2.3, and the released MaskingGenerator), a batch at a time.

Randomness comes in as an argument, so a mask is a pure function of its sample. Must not know shards.
"""

import math
from collections.abc import Callable

import numpy as np

from beitforge.pipeline.config.settings import Mask

_TRIES = 10  # per block
_AT_ONCE = 8  # tries that are drawn together

# uniform(which, tries): float64 [n, T, 4] in [0, 1) (area, aspect, top, left) of the samples numbered `which` (i64 [n],
# in 0 … samples - 1) at these tries
Tries = Callable[[np.ndarray, range], np.ndarray]


def draw_masks(
    mask: Mask,
    grid: tuple[int, int],
    samples: int,
    uniform: Tries,
    fill: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Masks bool [samples, N] for a grid of (rows, columns) patches; True is masked.

    fill(which): float64 [n, N], which patches complete an exact mask; called only when mask.exact, for the samples that
    need it. A call takes a millisecond or two however few the samples: draw for many at once.
    """
    blocks = _Blocks(grid, samples)
    log_aspect = math.log(1 / mask.aspect_min)
    missing = np.full(samples, mask.num_patches)
    which = np.arange(samples if mask.num_patches > 0 else 0)  # that are not complete yet, and of these:
    left, failed, attempt = missing[which], np.zeros(len(which), np.int64), 0
    u = aspects = np.zeros(0)
    while which.size:
        if attempt % _AT_ONCE == 0:
            u = uniform(which, range(attempt, attempt + _AT_ONCE))
            aspects = np.exp(log_aspect * (2 * u[..., 1] - 1))
        numbers, aspect = u[:, attempt % _AT_ONCE], aspects[:, attempt % _AT_ONCE]
        attempt += 1
        most = np.minimum(left, mask.max_block or mask.num_patches)
        area = mask.min_block + numbers[:, 0] * (most - mask.min_block)
        height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        new = blocks.add(which, height, width, numbers[:, 2], numbers[:, 3], most)
        left -= new
        failed = np.where(new > 0, 0, failed + 1)
        goes_on = (left > 0) & (failed < _TRIES)
        if not goes_on.all():
            missing[which] = left
            which, left, failed = which[goes_on], left[goes_on], failed[goes_on]
            u, aspects = u[goes_on], aspects[goes_on]
    masks = blocks.masks()
    return _complete(masks, missing, fill) if mask.exact else masks


class _Blocks:
    """Masks under way: a grid's rows as bits, so that a block is looked at in a few operations on integers."""

    def __init__(self, grid: tuple[int, int], samples: int):
        self.rows, self.columns = grid
        size = next((size for size in (8, 16, 32) if self.columns <= size), 64)
        words = -(-self.columns // size)
        first = np.arange(words * size) < np.arange(self.columns + 1)[:, None]  # the first 0, 1, … columns
        self.first = np.packbits(first, axis=1, bitorder="little").view(f"<u{size // 8}")  # [columns + 1, words]
        self.ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
        self.bits = np.zeros((samples, self.rows, words), self.first.dtype)

    def add(
        self,
        which: np.ndarray,
        height: np.ndarray,
        width: np.ndarray,
        down: np.ndarray,
        across: np.ndarray,
        most: np.ndarray,
    ) -> np.ndarray:
        """Mask a block (i64 [n] each) in each of the samples `which`, where it fits and masks at least one more patch
        and `most` at most; how many more, 0 where it does not. down, across: its place, in [0, 1)."""
        fits = (height < self.rows) & (width < self.columns)
        height, width = height * fits, width * fits
        top = (down * (self.rows - height + 1)).astype(np.int64)
        start = (across * (self.columns - width + 1)).astype(np.int64)
        row = np.arange(self.rows)
        lies = (row >= top[:, None]) & (row < (top + height)[:, None])
        block = lies[:, :, None] * (self.first[start + width] ^ self.first[start])[:, None, :]
        present = self.bits[which]
        block &= ~present
        new = self.ones[block.reshape(len(which), -1).view(np.uint8)].sum(axis=1, dtype=np.int64)
        taken = np.flatnonzero((new > 0) & (new <= most))
        self.bits[which[taken]] = present[taken] | block[taken]
        return np.where((new > 0) & (new <= most), new, 0)

    def masks(self) -> np.ndarray:
        """bool [samples, N]."""
        flat = np.unpackbits(self.bits.view(np.uint8), axis=2, bitorder="little")
        return flat[:, :, : self.columns].reshape(len(flat), self.rows * self.columns).view(bool)


def kept_branches(drop_path: float, layers: int, uniform: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Which residual branches survive drop path, linear over depth: bool [samples, L, 2].

    uniform(numbers): float64 [samples, L, 2] in [0, 1), for the branches i64 [1, L, 2].
    """
    drop = drop_path * np.arange(layers) / max(1, layers - 1)
    return uniform(np.arange(2 * layers).reshape(1, layers, 2)) >= drop[None, :, None]


def _complete(masks: np.ndarray, missing: np.ndarray, fill: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Mask `missing` more patches of each sample: the unmasked ones of lowest score (BEiT v2's completion)."""
    short = np.flatnonzero(missing)
    if short.size:
        turns = np.argsort(np.where(masks[short], 2.0, fill(short)), axis=1, kind="stable")[:, : missing.max()]
        sample, turn = np.nonzero(np.arange(turns.shape[1]) < missing[short, None])
        masks[short[sample], turns[sample, turn]] = True
    return masks
