"""The order of samples: arithmetic on one integer, the same for any number of ranks, nodes and workers.

Sample s of a run belongs to epoch s div N at position s mod N. An epoch permutes all chunks of the set (C consecutive
samples each, one read) and lays them end to end; cuts that sequence into L lanes; and permutes each lane within windows
of G chunks' worth. Global position p of the epoch is lane p mod L, step p div L. (ARCHITECTURE.md, "Order".)
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shards import draws
from shards.errors import ShardError


@dataclass(frozen=True, kw_only=True)
class OrderPolicy:
    """seed · chunk C in samples · window G in chunks · lanes L. Changing any of them changes the order of a run."""

    seed: int = 0
    chunk: int = 64
    window: int = 16
    lanes: int = 256


class Order:
    """Where sample s of a run lies. State: none but caches of pure functions."""

    def __init__(self, shard_samples: list[int], policy: OrderPolicy):
        """`shard_samples`: number of samples of each shard, in manifest order."""
        self.policy = policy
        self.samples = sum(shard_samples)
        if self.samples == 0:
            raise ShardError("the shard set holds no samples; pack some pictures first")
        starts = [np.arange(0, count, policy.chunk) for count in shard_samples]
        self._chunk_shard = np.repeat(np.arange(len(shard_samples)), [len(start) for start in starts])
        self._chunk_start = np.concatenate(starts)
        counts = np.asarray(shard_samples)[self._chunk_shard]
        self._chunk_samples = np.minimum(policy.chunk, counts - self._chunk_start)
        self._chunks_of_epoch = lru_cache(maxsize=2)(self._permute_chunks)
        self._window = lru_cache(maxsize=2 * policy.lanes)(self._permute_window)

    def _permute_chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        chunks = draws.permutation(len(self._chunk_shard), draws.CHUNK_ORDER, self.policy.seed, epoch)
        return chunks, np.concatenate([[0], np.cumsum(self._chunk_samples[chunks])])

    def _permute_window(self, epoch: int, lane: int, window: int, samples: int) -> np.ndarray:
        return draws.permutation(samples, draws.WINDOW_ORDER, self.policy.seed, epoch, lane, window)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, shard and row (i64 [n] each) of the samples numbered `samples` (i64 [n], any order)."""
        epochs, positions = np.divmod(samples.astype(np.int64), self.samples)
        shards, rows = np.empty_like(epochs), np.empty_like(epochs)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shards[here], rows[here] = self._locate_in_epoch(int(epoch), positions[here])
        return epochs, shards, rows

    def _locate_in_epoch(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps, lanes = np.divmod(positions, self.policy.lanes)
        length, longer = divmod(self.samples, self.policy.lanes)  # the first `longer` lanes have one sample more
        size = self.policy.chunk * self.policy.window
        windows, within = np.divmod(steps, size)
        sequence = np.empty_like(positions)
        for lane, window in np.unique(np.stack([lanes, windows], axis=-1), axis=0).tolist():
            here = (lanes == lane) & (windows == window)
            first = window * size
            count = min(size, length + (lane < longer) - first)
            lane_start = lane * length + min(lane, longer)
            sequence[here] = lane_start + first + self._window(epoch, lane, window, count)[within[here]]
        chunks, ends = self._chunks_of_epoch(epoch)
        slots = np.searchsorted(ends, sequence, side="right") - 1
        chunk = chunks[slots]
        return self._chunk_shard[chunk], self._chunk_start[chunk] + sequence - ends[slots]

    def __getstate__(self) -> dict:
        """Caches stay behind when a worker process receives the order."""
        return {name: value for name, value in vars(self).items() if name not in ("_chunks_of_epoch", "_window")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._chunks_of_epoch = lru_cache(maxsize=2)(self._permute_chunks)
        self._window = lru_cache(maxsize=2 * self.policy.lanes)(self._permute_window)


def rank_batches(
    *, first_sample: int, global_batch: int, micro_batch: int, rank: int, world: int, steps: int
) -> "RankBatches":
    """The sample numbers of every micro batch of one rank; see RankBatches."""
    if global_batch % (micro_batch * world):
        raise ShardError(
            f"a global batch of {global_batch} does not divide into micro batches of {micro_batch} on {world} ranks"
        )
    return RankBatches(first_sample, global_batch, micro_batch, rank, world, steps)


@dataclass(frozen=True)
class RankBatches:
    """Sample numbers (i64 [micro_batch]) for micro batch 0, 1, … of a rank: positions ≡ rank (mod world) of each step.

    Step t takes samples first_sample + t · global_batch …; the union over ranks and micro batches is the same for any
    world and micro batch.
    """

    first_sample: int
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    steps: int

    def __len__(self) -> int:
        return self.steps * (self.global_batch // (self.micro_batch * self.world))

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(number)
        accumulation = self.global_batch // (self.micro_batch * self.world)
        step, micro = divmod(number, accumulation)
        within = self.rank + self.world * (micro * self.micro_batch + np.arange(self.micro_batch, dtype=np.int64))
        return self.first_sample + step * self.global_batch + within
