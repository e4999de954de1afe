"""Walk the order of a set that need not exist: is every sample seen once, how well is it mixed, what does a node read?

Nothing is read and nothing random is drawn but the order itself.
"""

import math
import time
import tracemalloc
from dataclasses import dataclass, field

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.lanes import suiting_lanes, times_read
from beitforge.shards.progress import Progress, Silent
from beitforge.shards.stream.order import Order, OrderPolicy

WALKED = 10**8  # samples of an epoch that are all walked unless told otherwise

_BATCHES = 16  # looked at for mixing
_WINDOWS = 4  # looked at for what a node reads
_STRETCHES = 8  # of an epoch that are walked where all of it is not
_STRETCH = 2**18  # samples, at most: what is in memory at once does not grow with the lanes


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A set and the cluster that reads it. bytes_per_sample: mean size of an image in its tar."""

    samples: int
    samples_per_shard: int = 10_000
    bytes_per_sample: int = 110_000
    ranks: int = 1
    ranks_per_node: int = 8
    global_batch: int = 2048
    epoch: int = 0
    order: OrderPolicy = field(default_factory=OrderPolicy)

    @property
    def shard_samples(self) -> list[int]:
        """Full shards and a last one of what is left."""
        full, rest = divmod(self.samples, self.samples_per_shard)
        return [self.samples_per_shard] * full + [rest] * (rest > 0)


def simulate(asked: Simulated, everything: bool, quiet: bool = False) -> dict:
    """What would happen, as a dict of plain values. everything: walk every sample however many there are.

    Raises ShardError for a cluster that cannot be, or when a sample is not seen exactly once.
    """
    if min(asked.samples, asked.samples_per_shard, asked.ranks, asked.ranks_per_node, asked.global_batch) < 1:
        raise ShardError("samples, shards, ranks, nodes and batches are counted from 1")
    if asked.global_batch % asked.ranks:
        raise ShardError(
            f"a global batch of {asked.global_batch} does not divide over {asked.ranks} ranks: choose a multiple"
        )
    cost = _cost(asked)
    order = Order(asked.shard_samples, asked.order)
    return {
        "samples": asked.samples,
        "shards": len(asked.shard_samples),
        "ranks": asked.ranks,
        "nodes": -(-asked.ranks // asked.ranks_per_node),
        **cost,
        **_walk(asked, order, everything or asked.samples <= WALKED, quiet),
        **_mixing(asked, order),
        **_reading(asked, order),
    }


def _cost(asked: Simulated) -> dict:
    """What the order costs a process: memory, and time from nothing to the places of a rank's first samples."""
    shards, share = asked.shard_samples, asked.global_batch // asked.ranks
    seconds = []
    for first in (asked.epoch * asked.samples, (asked.epoch + 1000) * asked.samples + asked.samples // 2):
        order = Order(shards, asked.order)
        started = time.perf_counter()
        order.locate(first + asked.ranks * np.arange(share))
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    try:
        order = Order(shards, asked.order)
        order.locate(asked.ranks * np.arange(share))
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return {
        "order, bytes a process": kept,
        "order, bytes at most while it is opened": most,
        "first batch from nothing, ms": round(1000 * seconds[0], 1),
        "batch a thousand epochs on, ms": round(1000 * seconds[1], 1),
    }


def _walk(asked: Simulated, order: Order, whole: bool, quiet: bool) -> dict:
    """Every sample of an epoch once, or of stretches spread over it no sample twice."""
    step = min(_STRETCH, asked.order.chunk * asked.order.window * asked.order.lanes)
    starts = np.arange(0, asked.samples, step)
    if not whole:
        starts = starts[np.unique(np.linspace(0, len(starts) - 1, _STRETCHES).astype(np.int64))]
    sizes = np.array(asked.shard_samples)
    first_row = np.cumsum(sizes) - sizes
    seen = np.zeros(asked.samples if whole else 0, dtype=bool)
    found = []
    with Silent() if quiet else Progress("walk", len(starts), "stretch") as progress:
        for start in starts.tolist():
            positions = asked.epoch * asked.samples + np.arange(start, min(start + step, asked.samples))
            _, shards, rows = order.locate(positions)
            numbers = first_row[shards] + rows
            if whole:
                seen[numbers] = True
            else:
                found.append(numbers)
            if _repeats(numbers) or (rows >= sizes[shards]).any():
                raise ShardError(f"samples are repeated between positions {start} and {start + step}: a defect")
            progress.advance(1)
    walked = asked.samples if whole else sum(len(numbers) for numbers in found)
    if not (seen.all() if whole else not _repeats(np.concatenate(found))):
        raise ShardError(f"some of {walked} positions repeat a sample: a defect")
    said = "all of an epoch, each sample once" if whole else "no sample twice; --all walks the whole epoch"
    return {"positions walked": walked, "found": said}


def _repeats(numbers: np.ndarray) -> bool:
    in_order = np.sort(numbers)
    return bool((in_order[1:] == in_order[:-1]).any())


def _mixing(asked: Simulated, order: Order) -> dict:
    """Of a few batches spread over an epoch: pairs from the same shard against a perfect permutation, as if every shard
    were a class of its own."""
    sizes = np.array(asked.shard_samples)
    perfect = float((sizes * (sizes - 1.0)).sum() / (asked.samples * (asked.samples - 1.0))) if asked.samples > 1 else 1
    pairs, distinct = [], []
    count = min(asked.global_batch, asked.samples)
    for first in np.linspace(0, asked.samples - count, _BATCHES).astype(np.int64).tolist():
        _, shards, _ = order.locate(asked.epoch * asked.samples + first + np.arange(count))
        counts = np.bincount(shards)
        pairs.append((counts * (counts - 1)).sum() / max(1, count * (count - 1)))
        distinct.append(np.count_nonzero(counts))
    ratio = float(np.mean(pairs) / perfect) if perfect else 1.0
    return {
        "same-shard pairs of a batch, against a perfect permutation": round(ratio, 3),
        "shards in a batch": round(float(np.mean(distinct)), 1),
    }


def _reading(asked: Simulated, order: Order) -> dict:
    """What the first node fetches and keeps open, from the first windows of an epoch: a chunk that two windows touch is
    fetched once."""
    policy, node = asked.order, range(min(asked.ranks, asked.ranks_per_node))
    classes = math.gcd(policy.lanes, asked.ranks)  # of ranks that read the same lanes
    walks = [order.ahead(asked.epoch * asked.samples, rank, asked.ranks) for rank in node]
    sizes, before = np.array(asked.shard_samples), np.zeros(0, np.int64)
    kept, fetched, parts, shards_of_rank = [], [], [], []
    windows = asked.samples / (policy.chunk * policy.window * policy.lanes)
    for _ in range(min(_WINDOWS, math.ceil(windows))):
        steps = [next(walk)[1] for walk in walks]
        named = np.unique(np.concatenate([step.shards << 32 | step.numbers for step in steps]))
        samples = np.minimum(policy.chunk, sizes[named >> 32] - (named & 0xFFFFFFFF) * policy.chunk)
        kept.append(int(samples.sum()) * asked.bytes_per_sample)
        fetched.append(int(samples[~np.isin(named, before)].sum()) * asked.bytes_per_sample)
        parts.append(len(named))
        shards_of_rank.append(len(np.unique(steps[0].shards)))
        before = named
    epoch_bytes = float(sum(fetched))
    if windows > _WINDOWS:  # all that were looked at are whole
        epoch_bytes = fetched[0] + float(np.mean(fetched[1:])) * (windows - 1)
    share = epoch_bytes / (asked.samples * asked.bytes_per_sample) / (min(len(node), classes) / classes)
    times = times_read(policy.lanes, asked.ranks, asked.ranks_per_node)
    return {
        "lanes of a rank": policy.lanes // classes,
        "ranks that share them": asked.ranks // classes,
        "bytes a node reads in an epoch": int(epoch_bytes),
        "read by all nodes, times the set": round(share * times, 2),
        "lanes that suit these ranks": suiting_lanes(policy.lanes, asked.ranks, asked.ranks_per_node),
        "bytes of a window on a node": max(kept),
        "cache that a node needs, bytes": 2 * max(kept),
        "requests of a node for a window": max(parts),
        "shards open in a process": max(shards_of_rank),
    }
