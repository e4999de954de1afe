"""A share of the labels: the same images of every class at any time, a larger share holds a smaller one."""

import numpy as np
import pytest

from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.label_subset import Subset, chosen_rows
from beitforge.shards.stream.order import OrderPolicy


@pytest.fixture(scope="module")
def images(tiny) -> ImageSet:
    """50 images of 5 classes in 4 shards."""
    return ImageSet(tiny.folder / "shards" / "train")


def places(rows: list[np.ndarray]) -> set[tuple[int, int]]:
    return {(shard, int(row)) for shard, chosen in enumerate(rows) for row in chosen}


@pytest.mark.parametrize(("share", "each"), [(0.001, 1), (0.1, 1), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_every_class_gives_its_share_and_at_least_one(images, share, each):
    rows = chosen_rows(images, share, seed=4)
    labels = np.concatenate([images.index(shard).columns["label"][chosen] for shard, chosen in enumerate(rows)])
    assert np.bincount(labels).tolist() == [each] * 5


def test_shares_are_nested_and_follow_the_seed(images):
    few, more = (places(chosen_rows(images, share, seed=4)) for share in (0.2, 0.5))
    assert few < more
    assert places(chosen_rows(images, 0.2, seed=5)) != few


def test_an_epoch_is_the_chosen_each_once(images):
    """In another order every epoch."""
    rows = chosen_rows(images, 0.5, seed=4)
    subset = Subset(rows, OrderPolicy(chunk=4, window=2, lanes=4))
    assert subset.samples == 25
    orders = []
    for epoch in range(3):
        epochs, shards, found = subset.locate(np.arange(25 * epoch, 25 * (epoch + 1)))
        assert (epochs == epoch).all()
        orders.append(list(zip(shards.tolist(), found.tolist(), strict=True)))
        assert set(orders[-1]) == places(rows) and len(set(orders[-1])) == 25
    assert orders[0] != orders[1] != orders[2]
    alone = [tuple(int(column[0]) for column in subset.locate(np.array([s]))[1:]) for s in range(25)]
    assert alone == orders[0]


def test_shards_without_a_chosen_image_are_left_out(images):
    rows = chosen_rows(images, 0.001, seed=1)
    assert any(not len(chosen) for chosen in rows) or len(rows) < 5
    subset = Subset(rows, OrderPolicy(chunk=4, window=2, lanes=4))
    _, shards, found = subset.locate(np.arange(subset.samples))
    assert set(zip(shards.tolist(), found.tolist(), strict=True)) == places(rows)
