"""What is arithmetic alone of a batch, for many batches at once: where its samples lie, and what they draw.

Most of what that costs is of the call, not of the samples. Must not know torch.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

_SAMPLES = 1024  # that are planned together, some hundred bytes each

# What samples (i64 [n]) draw: arrays [n, …] by name, each row a function of its sample alone or, in a batch of pairs
# (shards.stream.order.RankBatches), of its sample and the one as far from the batch's other end.
Draw = Callable[[np.ndarray], dict[str, np.ndarray]]


class SampleOrder(Protocol):
    """Where a sample lies: shards.stream.order.Order, shards.stream.label_subset.Subset, or SequentialOrder."""

    samples: int

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


class BatchSampler(Protocol):
    """The sample numbers (i64 [B]) of batch 0, 1, …: a list, or order.RankBatches."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> np.ndarray: ...


class Planned(NamedTuple):
    """One batch: its samples, and of each the epoch, the shard and the row it lies in (i64 [B] each), and its draws."""

    samples: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    draws: dict[str, np.ndarray]


class BatchPlan:
    """The batches of `numbers` that one process builds, in turn; a plan never changes a batch, only what it costs."""

    def __init__(self, places: SampleOrder, draw: Draw | None, numbers: BatchSampler, every: int = 1):
        """every: the process builds each so-manieth batch."""
        self.places, self.draw, self.numbers, self.every = places, draw, numbers, every
        self._ready: dict[int, Planned] = {}

    def __getitem__(self, number: int) -> Planned:
        if number not in self._ready:
            batches = list(self._following(number))
            planned = plan(self.places, self.draw, batches)
            self._ready = {number + place * self.every: one for place, one in enumerate(planned)}
        return self._ready.pop(number)

    def _following(self, number: int) -> Iterator[np.ndarray]:
        samples = 0
        while samples < _SAMPLES and number < len(self.numbers):
            yield (batch := self.numbers[number])
            samples, number = samples + max(1, len(batch)), number + self.every


def plan(places: SampleOrder, draw: Draw | None, batches: list[np.ndarray]) -> list[Planned]:
    """Of these batches, each as it would be planned alone.

    They are laid around one another: first halves, then second halves from the last batch to the first. That is a batch
    of pairs where each of them is one.
    """
    ends = np.cumsum([len(batch) for batch in batches]).tolist()
    parts = [slice(end - len(batch), end) for batch, end in zip(batches, ends, strict=True)]
    turns = [np.arange(part.start, part.stop) for part in parts]
    laid = np.concatenate(
        [*(turn[: len(turn) // 2] for turn in turns), *(turn[len(turn) // 2 :] for turn in turns[::-1])]
    )
    samples, back = np.concatenate(batches), np.argsort(laid)
    epochs, shards, rows = places.locate(samples)
    drawn = {name: value[back] for name, value in (draw(samples[laid]) if draw else {}).items()}
    return [
        Planned(
            samples[part],
            epochs[part],
            shards[part],
            rows[part],
            {name: value[part] for name, value in drawn.items()},
        )
        for part in parts
    ]
