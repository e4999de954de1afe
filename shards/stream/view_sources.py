"""Where a stream's views come from: recorded beside their tokens, drawn afresh, or the plain central ones.

Each source answers one question for n images at once: which view of each, and which tokens belong to it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.format.levels import Greys, without_tones
from beitforge.shards.format.manifest import unreadable
from beitforge.shards.format.tokens import TokenRow, TokenSet, check_pairing
from beitforge.shards.format.views import ViewPolicy, Views, central_views, completed, draw_views, impossible
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.remote import cache_for
from beitforge.shards.stream.image_set import DamagedSample, ImageSet, KnownBad

_WORD = 2**64 - 1  # sums of hashes are taken modulo 2^64

Ready = TokenRow | np.ndarray | None


@dataclass(frozen=True)
class Selection:
    """n images by place, with what the index says of them (all [n]; `sizes` are widths and heights); `greys` gives the
    rest of that, `ready` what ViewSource.read gave of each, if it was read."""

    epochs: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    key_hashes: np.ndarray
    sizes: tuple[np.ndarray, np.ndarray]
    mean_greys: np.ndarray
    greys: Callable[[], Greys]
    ready: Sequence[Ready] = ()


class ViewSource(Protocol):
    """Views (leading dimension n) and tokens u16 [n, patches] of n images; tokens are empty where there are none."""

    def views(self, picked: Selection) -> tuple[Views, np.ndarray]: ...

    def read(self, images: ImageSet, shard: int, row: int, key_hash: int, epoch: int) -> Ready:
        """What `views` reads of one image. May be called by any thread. Raises DamagedSample where the image has no
        tokens, KnownBad where that was held against the budget before; ShardError."""


@dataclass(frozen=True)
class DrawnViews:
    """A fresh view every epoch: tokenizer training, online tokens, fine-tuning."""

    policy: ViewPolicy

    @property
    def _jittered(self) -> bool:
        """Else the mean greys tell all."""
        return self.policy.brightness > 0 and self.policy.contrast > 0

    def read(self, images: ImageSet, shard: int, row: int, key_hash: int, epoch: int) -> Ready:
        return images.tones(shard, row) if self._jittered else None

    def views(self, picked: Selection) -> tuple[Views, np.ndarray]:
        """View number = epoch."""
        greys = picked.greys() if self._jittered else without_tones(picked.mean_greys)
        drawn = draw_views(self.policy, picked.key_hashes, picked.epochs, *picked.sizes, greys)
        return drawn, np.zeros((len(picked.rows), 0), np.uint16)


@dataclass(frozen=True)
class CentralViews:
    """The same central part every time, of `aspect` = width / height and with `share` of the largest one's sides; for
    probes and tests."""

    aspect: float = 1.0
    share: float = 0.875

    def read(self, images: ImageSet, shard: int, row: int, key_hash: int, epoch: int) -> Ready:
        return None

    def views(self, picked: Selection) -> tuple[Views, np.ndarray]:
        views = central_views(*picked.sizes, self.aspect, self.share)
        return views, np.zeros((len(picked.rows), 0), np.uint16)


class RecordedViews:
    """The views `tokenize` recorded, with their tokens: view (epoch + hash(key)) mod K of each image."""

    def __init__(self, images: ImageSet, where: Path | str, cache: Cache | None = None):
        """where: a folder, or a URL with a cache. Raises ShardError when the token set there was not made from
        `images`."""
        self.tokens = TokenSet(where, cache)
        self.images = images
        check_pairing(images.manifest, self.tokens.manifest, where)

    def read(self, images: ImageSet, shard: int, row: int, key_hash: int, epoch: int) -> TokenRow:
        """One row. An image that `tokenize` could not read is KnownBad; DamagedSample in a set of an earlier version,
        which was held against no budget."""
        keys = functools.partial(self.images.key_hashes, shard)
        found = self.tokens.row(shard, keys, self._view(key_hash, epoch), row)
        if found is None:
            kind = DamagedSample if unreadable(self.tokens.manifest) is None else KnownBad
            raise kind("`tokenize` could not read it, so it has no tokens")
        return found

    def _view(self, key_hash: int, epoch: int) -> int:
        return ((key_hash + epoch) & _WORD) % self.tokens.manifest.num_views

    def views(self, picked: Selection) -> tuple[Views, np.ndarray]:
        columns = (picked.shards, picked.rows, picked.key_hashes, picked.epochs)
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        rows = picked.ready or [self.read(self.images, *place) for place in places]
        tokens, *records = (np.stack(column) for column in zip(*rows, strict=True))
        views = completed(Views(*records), picked.mean_greys)
        vocabulary = self.tokens.manifest.tokenizer["vocabulary"]
        wrong = np.flatnonzero(impossible(views) | (tokens >= vocabulary).any(axis=-1))
        if len(wrong):
            shard, row, key_hash, epoch = places[wrong[0]]
            name = f"{self.tokens.folder}/{self.tokens.manifest.shards[shard].name}"
            raise ShardError(
                f"{name}: view {self._view(key_hash, epoch)} of row {row} holds what no tokenizer and no view policy "
                "gives; `verify` says what"
            )
        return views, tokens


def open_tokens(
    where: Path | str, images: ImageSet, *, cache: Path | str = "", cache_gb: float = 100.0
) -> RecordedViews:
    """Open the token shard set in a folder or behind a URL, paired with the image set that it was made from.

    cache, cache_gb: as of shards.stream.image_set.open_images. Raises ShardError when the two do not belong together.
    """
    return RecordedViews(images, where, cache_for(str(where), str(cache), cache_gb))
