"""Batches planned together are what they are alone, and cost one call for many."""

import functools

import numpy as np
import pytest

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Finetune, Mask, Model
from beitforge.pipeline.data.augment import supervised_draws
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.shards.stream.batch_plan import BatchPlan, PlannedBatch, plan
from beitforge.shards.stream.order import Order, OrderPolicy, rank_batches

ORDER = Order([100, 3, 0, 57], OrderPolicy(seed=3, chunk=8, window=2, lanes=4))
PRETRAINING = functools.partial(sample_draws, Mask(), Model(), 7)
FINE_TUNING = functools.partial(supervised_draws, Finetune(input_size=Size(32, 32), dropout=0.1), 4, 7)


def assert_same(one: PlannedBatch, other: PlannedBatch) -> None:
    assert list(one) == list(other)
    assert one.draws.keys() == other.draws.keys()
    for name, drawn in other.draws.items():
        assert drawn.dtype == one.draws[name].dtype
        np.testing.assert_array_equal(one.draws[name], drawn)


@pytest.mark.parametrize("micro", [2, 4, 8, 24])
@pytest.mark.parametrize(("draw", "paired"), [(PRETRAINING, False), (FINE_TUNING, True), (None, False)])
def test_together_as_alone(draw, paired, micro):
    """Of a rank's batches over two epochs; partners of a pair draw the same."""
    numbers = rank_batches(
        first_sample=130, global_batch=48, micro_batch=micro, rank=1, world=2, steps=5, paired=paired
    )
    batches = [numbers[i] for i in range(len(numbers))]
    for batch, together in zip(batches, plan(ORDER, draw, batches), strict=True):
        assert_same(together, plan(ORDER, draw, [batch])[0])
        for found, expected in zip(zip(*together, strict=True), (batch, *ORDER.locate(batch)), strict=True):
            np.testing.assert_array_equal(found, expected)
        for name, drawn in (draw(batch) if draw else {}).items():
            np.testing.assert_array_equal(together.draws[name], drawn)


def test_batches_of_odd_sizes():
    """The last batch of an evaluation is short."""
    batches = [np.arange(5), np.arange(5, 12), np.arange(12, 13), np.zeros(0, np.int64)]
    for batch, together in zip(batches, plan(ORDER, PRETRAINING, batches), strict=True):
        assert [place.sample for place in together] == batch.tolist()
        np.testing.assert_array_equal(together.draws["mask"], PRETRAINING(batch)["mask"])


@pytest.mark.parametrize("micro", [4, 64, 2048])
@pytest.mark.parametrize("every", [1, 3])
def test_one_call_for_many_batches(micro, every):
    """A process that builds every third batch asks for those, about a thousand samples at once, and for none twice."""
    asked: list[int] = []

    def draw(samples: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(len(samples))
        return {"number": samples}

    batches = 8192 // micro * every
    numbers = rank_batches(first_sample=0, global_batch=micro, micro_batch=micro, rank=0, world=1, steps=batches)
    planned = BatchPlan(ORDER, draw, numbers, every)
    for number in range(every - 1, batches, every):
        np.testing.assert_array_equal(planned[number].draws["number"], numbers[number])
        assert len(planned._ready) * micro < 1024
    assert sum(asked) == 8192
    assert len(asked) == min(8, 8192 // micro)


def test_any_batch_in_any_turn():
    """What was not foreseen is planned when it is asked for."""
    numbers = rank_batches(first_sample=0, global_batch=16, micro_batch=16, rank=0, world=1, steps=200)
    planned = BatchPlan(ORDER, PRETRAINING, numbers)
    for number in (3, 150, 4, 4, 0, 199):
        assert_same(planned[number], plan(ORDER, PRETRAINING, [numbers[number]])[0])
