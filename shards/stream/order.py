"""The order of samples: arithmetic on one integer, the same for any number of ranks, nodes and workers.

Sample s of a run belongs to epoch s div E at position s mod E: E is the number of samples of the set, less those that
an epoch leaves out at its end (OrderPolicy.multiple). An epoch permutes all chunks of the set (C consecutive samples
each, one read) and lays them end to end; cuts that sequence into L lanes; and permutes each lane within windows
of G chunks' worth. Global position p of the epoch is lane p mod L, step p div L. (docs/architecture.md, "Order".)

Nothing is as long as the set: the permutation of the chunks is computed place by place, and where a place lies in the
sequence follows from the few chunks that are short, the last ones of their shards.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from beitforge.shards import counter_rng
from beitforge.shards.errors import ShardError

# The number of the order's arithmetic, which checkpoints carry: a change of it makes another sequence of samples.
ARITHMETIC = 2


@dataclass(frozen=True, kw_only=True)
class OrderPolicy:
    """seed · chunk C in samples · window G in chunks · lanes L · what an epoch's samples are a multiple of: the last
    ones of its sequence, fewer than that, are left out. Changing any of them changes the order of a run."""

    seed: int = 0
    chunk: int = 64
    window: int = 16
    lanes: int = 256
    multiple: int = 1


class Chunks(NamedTuple):
    """n chunks of a shard set by shard and by number within it; i64 [n] each."""

    shards: np.ndarray
    numbers: np.ndarray


class Order:
    """Where sample s of a run lies. State: none but caches of pure functions."""

    def __init__(self, shard_samples: list[int] | np.ndarray, policy: OrderPolicy):
        """`shard_samples`: number of samples of each shard, in manifest order. `samples` is that of an epoch."""
        self.policy = policy
        samples = np.asarray(shard_samples, dtype=np.int64)
        self._whole = int(samples.sum())
        self.samples = self._whole // policy.multiple * policy.multiple
        if self._whole == 0:
            raise ShardError("the shard set holds no samples; pack some images first")
        if self.samples == 0:
            raise ShardError(
                f"the shard set holds {self._whole} samples, fewer than the {policy.multiple} of one global batch, so "
                f"that drop_last leaves nothing of an epoch: set it to false, or a smaller global_batch"
            )
        chunks = -(-samples // policy.chunk)
        self._first_chunk = np.concatenate([[0], np.cumsum(chunks)])
        short = np.flatnonzero(samples % policy.chunk)
        self._short_chunk = self._first_chunk[short + 1] - 1
        self._short_by = policy.chunk - samples[short] % policy.chunk
        self._make_caches()

    def _make_caches(self) -> None:
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)
        self._window = lru_cache(maxsize=2 * self.policy.lanes)(self._permute_window)

    def _open_epoch(self, epoch: int) -> "_Epoch":
        shuffle = counter_rng.Shuffle(int(self._first_chunk[-1]), counter_rng.CHUNK_ORDER, self.policy.seed, epoch)
        return _Epoch(shuffle, self.policy.chunk, self._short_chunk, self._short_by)

    def _permute_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """The permutation within a window, in as few bytes as hold it; shorter at the end of a lane."""
        start, stop = self._window_ends(lane, window)
        drawn = counter_rng.permutation(stop - start, counter_rng.WINDOW_ORDER, self.policy.seed, epoch, lane, window)
        return drawn.astype(np.min_scalar_type(stop - start))

    def _window_ends(self, lane: int, window: int) -> tuple[int, int]:
        """Where a window of a lane begins and ends in the epoch's sequence; empty behind the lane's end."""
        length, longer = divmod(self._whole, self.policy.lanes)  # the first `longer` lanes have one sample more
        start, size = lane * length + min(lane, longer), self.policy.chunk * self.policy.window
        stop = start + length + (lane < longer)
        return min(start + window * size, stop), min(start + (window + 1) * size, stop)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, shard and row (i64 [n] each) of the samples numbered `samples` (i64 [n], any order)."""
        epochs, positions = np.divmod(samples.astype(np.int64), self.samples)
        shards, rows = np.empty_like(epochs), np.empty_like(epochs)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            sequence = self._sequence(epoch, positions[here])
            chunks, within = self._epoch(epoch).chunks(sequence)
            shards[here], numbers = self._place(chunks)
            rows[here] = numbers * self.policy.chunk + within
        return epochs, shards, rows

    def _sequence(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Where in the epoch's sequence of chunks laid end to end the samples at `positions` lie."""
        steps, lanes = np.divmod(positions, self.policy.lanes)
        windows, within = np.divmod(steps, self.policy.chunk * self.policy.window)
        places, which = np.unique(windows * self.policy.lanes + lanes, return_inverse=True)
        sequence = np.empty_like(positions)
        turns = np.argsort(which, kind="stable")
        ends = np.cumsum(np.bincount(which, minlength=len(places)))
        for place, turn in zip(places.tolist(), np.split(turns, ends[:-1]), strict=True):
            window, lane = divmod(place, self.policy.lanes)
            sequence[turn] = self._window(epoch, lane, window)[within[turn]]
            sequence[turn] += self._window_ends(lane, window)[0]
        return sequence

    def _place(self, chunks: np.ndarray) -> Chunks:
        """Shards and numbers within them of chunks counted through the set."""
        shards = np.searchsorted(self._first_chunk, chunks, side="right") - 1
        return Chunks(shards, chunks - self._first_chunk[shards])

    def ahead(self, sample: int, rank: int, world: int) -> Iterator[tuple[int, Chunks]]:
        """What a rank reads from a sample on, window by window without end: the number of the sample at which a window
        begins, and its chunks. It reads the lanes of its class: as many classes as lanes and world have for a greatest
        common divisor, so that with lanes a multiple of the world they are its own."""
        step = self.policy.chunk * self.policy.window * self.policy.lanes
        epoch, position = divmod(sample, self.samples)
        first, chunks = position // step, self._read_by if self._is_sparse(world) else self._covering
        while True:
            for window in range(first, -(-self.samples // step)):
                yield epoch * self.samples + window * step, self._place(chunks(epoch, window, rank, world))
            epoch, first = epoch + 1, 0

    def _is_sparse(self, world: int) -> bool:
        """Whether enough ranks share a lane for one rank's samples of a window to leave out some of its chunks."""
        return 6 * world > self.policy.chunk * math.gcd(self.policy.lanes, world)

    def _covering(self, epoch: int, window: int, rank: int, world: int) -> np.ndarray:
        """All chunks of a rank's lanes in a window."""
        ends = [self._window_ends(lane, window) for lane in self._lanes_of(rank, world, epoch)]
        spans = [(start, stop) for start, stop in ends if stop > start]
        return self._epoch(epoch).covering(spans) if spans else np.zeros(0, np.int64)

    def _read_by(self, epoch: int, window: int, rank: int, world: int) -> np.ndarray:
        """The chunks that a rank's samples of a window lie in, from these themselves."""
        step = self.policy.chunk * self.policy.window * self.policy.lanes
        first, end = epoch * self.samples + window * step, (epoch + 1) * self.samples
        samples = np.arange(first + (rank - first) % world, min(first + step, end), world)
        _, shards, rows = self.locate(samples)
        return np.unique(self._first_chunk[shards] + rows // self.policy.chunk)

    def _lanes_of(self, rank: int, world: int, epoch: int) -> range:
        """The lanes that a rank reads in an epoch. Ranks take samples by their number in the run, lanes go by that in
        the epoch: with every epoch a rank moves on by the epoch's length."""
        classes = math.gcd(self.policy.lanes, world)
        return range((rank - epoch * self.samples) % classes, self.policy.lanes, classes)

    def next_use(self, chunks: Chunks, sample: int, ranks: range, world: int) -> np.ndarray:
        """The number of the next sample from `sample` on (i64 [n]) for which any of the ranks reads each of the chunks,
        to the window: `sample` itself where it is in use, 2^62 where it is not used in this epoch and the next."""
        numbers = self._first_chunk[chunks.shards] + chunks.numbers
        found = np.full(len(numbers), 2**62)
        classes = math.gcd(self.policy.lanes, world)
        reading = np.zeros(classes, bool)
        reading[np.arange(ranks.start, ranks.stop) % classes] = True
        first = sample // self.samples
        for epoch in (first, first + 1):
            unknown = np.flatnonzero(found == 2**62)  # the next epoch's uses come after all of this one's
            for start, end, lanes in self._uses(epoch, numbers[unknown]) if unknown.size else ():
                begin = np.maximum(start, sample)
                counts = reading[(lanes + epoch * self.samples) % classes] & (end > begin)
                found[unknown] = np.where(counts, np.minimum(found[unknown], begin), found[unknown])
        return found

    def _uses(self, epoch: int, chunks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """First sample, end and lane of the windows that each chunk falls into, one after the other, the last of them
        again where others fall into more. Mostly two: more where lanes or their last windows are shorter than a chunk.
        """
        length, longer = divmod(self._whole, self.policy.lanes)
        size, border = self.policy.chunk * self.policy.window, longer * (length + 1)
        place, last = self._epoch(epoch).span(chunks)
        while True:
            before, after = place // (length + 1), longer + (place - border) // max(length, 1)
            lanes = np.where(place < border, before, after)
            begin = lanes * length + np.minimum(lanes, longer)
            windows = (place - begin) // size
            start = epoch * self.samples + windows * size * self.policy.lanes
            yield start, np.minimum(start + size * self.policy.lanes, (epoch + 1) * self.samples), lanes
            behind = begin + np.minimum((windows + 1) * size, length + (lanes < longer))
            if (behind > last).all():
                return
            place = np.minimum(behind, last)

    def __getstate__(self) -> dict:
        """Caches stay behind when a worker process receives the order."""
        return {name: value for name, value in vars(self).items() if name not in ("_epoch", "_window")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._make_caches()


class _Epoch:
    """The sequence of one epoch: all chunks in their permuted order, end to end. Slot i holds chunk shuffle(i)."""

    def __init__(self, shuffle: counter_rng.Shuffle, chunk: int, short_chunks: np.ndarray, short_by: np.ndarray):
        """short_chunks: those of fewer than `chunk` samples, and by how many."""
        self.shuffle, self.chunk = shuffle, chunk
        slots = shuffle.inverse(short_chunks)
        turn = np.argsort(slots)
        self._short_slots, self._missing = slots[turn], np.concatenate([[0], np.cumsum(short_by[turn])])
        # behind every short chunk a run begins in which slots are evenly spaced
        self._run_slot = np.concatenate([[0], self._short_slots + 1])
        self._run_start = self._run_slot * chunk - self._missing

    def chunks(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chunk in which each place of the sequence lies, and the place within it."""
        slots, within = self._slots(sequence)
        different, which = np.unique(slots, return_inverse=True)
        return self.shuffle.forward(different)[which], within

    def _slots(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        run = np.searchsorted(self._run_start, sequence, side="right") - 1
        behind, within = np.divmod(sequence - self._run_start[run], self.chunk)
        return self._run_slot[run] + behind, within

    def covering(self, spans: list[tuple[int, int]]) -> np.ndarray:
        """The chunks that spans (start, stop) of the sequence touch, each once."""
        ends, _ = self._slots(np.array([(start, stop - 1) for start, stop in spans], dtype=np.int64).reshape(-1))
        slots = [np.arange(first, last + 1) for first, last in ends.reshape(-1, 2).tolist()]
        return self.shuffle.forward(np.unique(np.concatenate(slots)))

    def span(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the first and the last sample of each chunk in the sequence."""
        slots = self.shuffle.inverse(chunks)
        before = np.searchsorted(self._short_slots, slots, side="left")
        start = slots * self.chunk - self._missing[before]
        return start, start + self.chunk - 1 - self._short(slots, before)

    def _short(self, slots: np.ndarray, before: np.ndarray) -> np.ndarray:
        """How many samples the chunk in each slot is short of."""
        padded = np.concatenate([self._short_slots, [-1]])
        return np.where(padded[before] == slots, np.diff(self._missing, append=self._missing[-1])[before], 0)


def rank_batches(
    *, first_sample: int, global_batch: int, micro_batch: int, rank: int, world: int, steps: int, paired: bool = False
) -> "RankBatches":
    """The sample numbers of every micro batch of one rank; see RankBatches."""
    if paired and micro_batch % 2:
        raise ShardError(f"a micro batch of {micro_batch} does not divide into pairs")
    if global_batch % (micro_batch * world):
        raise ShardError(
            f"a global batch of {global_batch} does not divide into micro batches of {micro_batch} on {world} ranks"
        )
    return RankBatches(first_sample, global_batch, micro_batch, rank, world, steps, paired)


@dataclass(frozen=True)
class RankBatches:
    """Sample numbers (i64 [micro_batch]) for micro batch 0, 1, … of a rank: positions ≡ rank (mod world) of each step.

    Step t takes samples first_sample + t · global_batch …; the union over ranks and micro batches is the same for any
    world and micro batch. With `paired`, so are partners: a micro batch holds samples of the step's first half, then
    those half a global batch after each of them, in reverse.
    """

    first_sample: int
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    steps: int
    paired: bool = False

    def __len__(self) -> int:
        return self.steps * (self.global_batch // (self.micro_batch * self.world))

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(number)
        accumulation = self.global_batch // (self.micro_batch * self.world)
        step, micro = divmod(number, accumulation)
        size = self.micro_batch // 2 if self.paired else self.micro_batch
        within = self.rank + self.world * (micro * size + np.arange(size, dtype=np.int64))
        if self.paired:
            within = np.concatenate([within, within[::-1] + self.global_batch // 2])
        return self.first_sample + step * self.global_batch + within
