"""What is arithmetic alone of a batch, for many batches at once: where its samples lie, and what they draw.

Most of what that costs is of the call, not of the samples. Must not know torch.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from beitforge.shards.stream.samples import Place, SampleOrder, placed

_SAMPLES = 1024  # that are planned together, some hundred bytes each

# What samples (i64 [n]) draw: arrays [n, …] by name, each row a function of its sample alone or, in a batch of pairs
# (shards.stream.order.RankBatches), of its sample and the one as far from the batch's other end.
Draw = Callable[[np.ndarray], dict[str, np.ndarray]]


class BatchSampler(Protocol):
    """The sample numbers (i64 [B]) of batch 0, 1, …: a list, or order.RankBatches."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> np.ndarray: ...


class PlannedBatch(list[Place]):
    """The places of a batch's samples, with what they draw."""

    def __init__(self, places: Iterable[Place], draws: dict[str, np.ndarray]):
        super().__init__(places)
        self.draws = draws


class BatchPlan:
    """The batches of `numbers` that one process builds, in turn; a plan never changes a batch, only what it costs."""

    def __init__(self, order: SampleOrder, draw: Draw | None, numbers: BatchSampler, every: int = 1):
        """every: the process builds one batch in `every`."""
        self.order, self.draw, self.numbers, self.every = order, draw, numbers, every
        self._ready: dict[int, PlannedBatch] = {}

    def __getitem__(self, number: int) -> PlannedBatch:
        if number not in self._ready:
            planned = plan(self.order, self.draw, list(self._following(number)))
            self._ready = {number + place * self.every: one for place, one in enumerate(planned)}
        return self._ready.pop(number)

    def _following(self, number: int) -> Iterator[np.ndarray]:
        samples = 0
        while samples < _SAMPLES and number < len(self.numbers):
            yield (batch := self.numbers[number])
            samples, number = samples + max(1, len(batch)), number + self.every


def plan(order: SampleOrder, draw: Draw | None, batches: list[np.ndarray]) -> list[PlannedBatch]:
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
    places = placed(order, samples)
    drawn = {name: value[back] for name, value in (draw(samples[laid]) if draw else {}).items()}
    return [PlannedBatch(places[part], {name: value[part] for name, value in drawn.items()}) for part in parts]
