"""A share of a labelled set's images: of every class those whose hash is smallest. What few-label training reads."""

import numpy as np

from beitforge.shards import counter_rng
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.order import Order, OrderPolicy


class Subset:
    """The order of the chosen images alone: sample s of a run, as shards.stream.order.Order has it of all."""

    def __init__(self, rows: list[np.ndarray], policy: OrderPolicy):
        """rows: of every shard the chosen rows, i64, ascending. Raises ShardError where there are none at all."""
        self.order = Order([len(chosen) for chosen in rows], policy)
        self.samples = self.order.samples
        self._starts = np.concatenate([[0], np.cumsum([len(chosen) for chosen in rows])])
        self._rows = np.concatenate(rows)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, shard and row (i64 [n] each) of the samples numbered `samples` (i64 [n], any order)."""
        epochs, shards, places = self.order.locate(samples)
        return epochs, shards, self._rows[self._starts[shards] + places]


def chosen_rows(images: ImageSet, share: float, seed: int) -> list[np.ndarray]:
    """Of every shard the rows that belong to the share (0, 1]: round(share · n), at least one, of the n images of
    each class, those with the smallest hash of (seed, key). A larger share holds all of a smaller one's."""
    indexes = [images.index(shard) for shard in range(len(images.manifest.shards))]
    labels = np.concatenate([index.label for index in indexes])
    shards = np.repeat(np.arange(len(indexes)), [len(index) for index in indexes])
    rows = np.concatenate([np.arange(len(index)) for index in indexes])
    hashes = counter_rng.bits(counter_rng.LABEL_SHARE, seed, np.concatenate([index.key_hash for index in indexes]))
    taken = np.zeros(len(labels), bool)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        count = max(1, round(share * len(members)))
        taken[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return [rows[taken & (shards == shard)] for shard in range(len(indexes))]
