"""What is read of each sample of a batch: the image or, where it cannot be used, the one that stands in for it, what
the index says of it, and what its view takes. A pure function of the sample, which any thread may compute."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from beitforge.shards import counter_rng
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_BAD, Row
from beitforge.shards.stream.image_set import DamagedSample, ImageSet, KnownBad
from beitforge.shards.stream.view_sources import Ready, ViewSource

_SUBSTITUTES = 32


@dataclass(frozen=True)
class BadSample:
    """A sample that was replaced: where it lies, why, and which row of the same shard stood in. known: whether the sets
    themselves said so, so that it was known before the first sample was read."""

    sample: int
    shard: str
    key: str
    reason: str
    substitute: str
    known: bool = False


class Place(NamedTuple):
    """Where a sample lies."""

    sample: int
    epoch: int
    shard: int
    row: int


class Found(NamedTuple):
    """What was read of a sample: the row of the image, that of a substitute where `bad` says so, what the index says of
    it, its encoded bytes, and what its view takes."""

    row: int
    known: Row
    data: bytes
    ready: Ready
    bad: BadSample | None


class SampleOrder(Protocol):
    """Where a sample lies: shards.stream.order.Order, shards.stream.label_subset.Subset, or SequentialOrder."""

    samples: int

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


class SequentialOrder:
    """Samples in manifest order, epoch 0: for evaluation."""

    def __init__(self, shard_samples: list[int] | np.ndarray):
        self.ends = np.cumsum(shard_samples)
        self.samples = int(self.ends[-1])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch (zeros), shard and row of the samples numbered `samples`, each < self.samples."""
        shards = np.searchsorted(self.ends, samples, side="right")
        starts = np.concatenate([[0], self.ends[:-1]])
        return np.zeros_like(samples), shards, samples - starts[shards]


def placed(order: SampleOrder, samples: np.ndarray) -> list[Place]:
    """The places of the samples numbered `samples` (i64 [n])."""
    columns = (samples, *order.locate(samples))
    return [Place(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


@dataclass(frozen=True)
class Samples:
    """The samples of a set. seed: of the substitutes."""

    images: ImageSet
    source: ViewSource
    seed: int

    def read(self, place: Place, refused: Mapping[int, str] | None = None) -> Found:
        """The sample at a place, or the first usable substitute; `refused` says which rows cannot stand there, and why.
        Raises ShardError when a shard cannot be read."""
        _, epoch, shard, row = place
        asked = self.images.row(shard, row)
        first: DamagedSample | None = None
        for candidate in self._candidates(shard, row, asked):
            try:
                if refused and candidate in refused:
                    raise DamagedSample(refused[candidate])
                known = asked if candidate == row else self.images.row(shard, candidate)
                ready: Ready = None
                if not known.flags & FLAG_BAD:  # else that is the reason
                    ready = self.source.read(self.images, shard, candidate, known.key_hash, epoch)
                data = self.images.read_row(shard, candidate, known)
                break
            except DamagedSample as error:
                first = first or error
        else:
            key, tries = self.images.index(shard).key(row), _SUBSTITUTES
            name = self.images.manifest.shards[shard].name
            raise ShardError(f"{name}: {tries} samples tried for {key}, none usable; run `verify`")
        bad = None if candidate == row else self._replaced(place, candidate, first)
        return Found(candidate, known, data, ready, bad)

    def _replaced(self, place: Place, candidate: int, why: DamagedSample | None) -> BadSample:
        index, entry = self.images.index(place.shard), self.images.manifest.shards[place.shard]
        known = isinstance(why, KnownBad)
        return BadSample(place.sample, entry.name, index.key(place.row), str(why), index.key(candidate), known)

    def _candidates(self, shard: int, row: int, asked: Row) -> Iterator[int]:
        """A row, then those that may stand in for it: drawn from all of its shard, at last only from those that are not
        known to be bad."""
        samples, good = self.images.manifest.shards[shard].samples, np.empty(0, np.int64)
        yield row
        for attempt in range(2 * _SUBSTITUTES - 1):
            drawn = counter_rng.uniform(counter_rng.SUBSTITUTE, self.seed, asked.key_hash, attempt)[0]
            if attempt < _SUBSTITUTES - 1:
                yield int(drawn * samples)
                continue
            if attempt == _SUBSTITUTES - 1:
                good = np.flatnonzero((self.images.index(shard).flags & FLAG_BAD) == 0)
                if len(good) in (0, samples):
                    return
            yield int(good[int(drawn * len(good))])
