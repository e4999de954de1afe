"""How well is class-sorted data mixed, and what does a place in the order cost?"""

import time

import numpy as np

from beitforge.shards.stream.order import Order, OrderPolicy
from benchmarks.results import write

SHARDS, PER_SHARD, BATCH, BATCHES = 1280, 1000, 2048, 8


def main() -> None:
    """Pairs of a batch from the same shard, against a perfect permutation; seconds to find a batch anywhere."""
    perfect = (PER_SHARD - 1) / (SHARDS * PER_SHARD - 1)
    rows = []
    for policy in (OrderPolicy(), OrderPolicy(window=32), OrderPolicy(chunk=16, window=64), OrderPolicy(chunk=1)):
        order = Order([PER_SHARD] * SHARDS, policy)
        check(order)
        pairs, distinct = [], []
        for number in np.linspace(0, order.samples // BATCH - 1, BATCHES).astype(int):
            _, shards, _ = order.locate(np.arange(number * BATCH, (number + 1) * BATCH))
            counts = np.bincount(shards, minlength=SHARDS)
            pairs.append((counts * (counts - 1)).sum() / (BATCH * (BATCH - 1)))
            distinct.append((counts > 0).sum())
        started = time.perf_counter()
        Order([PER_SHARD] * SHARDS, policy).locate(np.arange(5_000_000_000, 5_000_000_000 + BATCH))
        cold = time.perf_counter() - started
        rows.append(
            {
                "chunk": policy.chunk,
                "window": policy.window,
                "same-shard pairs against perfect": float(np.mean(pairs) / perfect),
                "distinct shards a batch": int(np.mean(distinct)),
                "first batch at sample 5·10⁹, ms": 1000 * cold,
            }
        )
    question = f"how well is class-sorted data mixed ({SHARDS} shards of {PER_SHARD}, batch {BATCH}, 256 lanes)?"
    note = (
        "A perfect permutation gives 1.0 pairs and about 1003 distinct shards. The last column is the whole cost of a "
    )
    note += "resume: building the order and finding the first batch."
    write("order", question, rows, {}, [note])


def check(order: Order) -> None:
    """Every sample once an epoch, or no numbers."""
    _, shards, rows = order.locate(np.arange(order.samples))
    assert len(np.unique(shards * PER_SHARD + rows)) == order.samples, "the order is not a permutation"


if __name__ == "__main__":
    main()
