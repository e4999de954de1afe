"""Whole batches, built in the worker: decode, cut by the record, resize to uint8. With shards.stream.view_batches what
uses torch.

A batch is a pure function of the sample numbers asked for. Workers, ranks and restarts therefore never change it.
"""

import functools
import math
import mmap
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from beitforge.shards import counter_rng
from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import COLUMNS, FLAG_BAD, Row
from beitforge.shards.stream.image_set import DamagedSample, ImageSet, KnownBad
from beitforge.shards.stream.view_sources import Selection, ViewSource

_SUBSTITUTES = 32
TORCH = "torch bicubic"


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


class Batch(NamedTuple):
    """One micro batch, B samples.

    samples i64 [B] · pixels u8 [B, 3, H, W], cut and flipped, not yet jittered · tokenizer_pixels u8 [B, 3, h, w], the
    same views at the tokenizer's size (h = w = 0: not asked for) · tokens i64 [B, N] (N = 0: none recorded) · jitters
    f32 [B, 3], orders i64 [B], pivots f32 [B] (shards.format.views, levels) · labels i64 [B] · draws: what the caller's
    `draw` made of the sample numbers · bad: the substitutions made.
    """

    samples: torch.Tensor
    pixels: torch.Tensor
    tokenizer_pixels: torch.Tensor
    tokens: torch.Tensor
    jitters: torch.Tensor
    orders: torch.Tensor
    pivots: torch.Tensor
    labels: torch.Tensor
    draws: dict[str, torch.Tensor]
    bad: list[BadSample]

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [*(value for value in self if isinstance(value, torch.Tensor)), *self.draws.values()]

    def pinned(self) -> "Batch":
        """The batch in pinned memory, which a GPU copies from while the processor does something else."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        there: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return self._replace(**there, draws={name: tensor.pin_memory() for name, tensor in self.draws.items()})

    def to(self, device: torch.device) -> "Batch":
        """The batch with every tensor on `device`, copied asynchronously where the source is pinned."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        there: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        drawn = {name: tensor.to(device, non_blocking=True) for name, tensor in self.draws.items()}
        return self._replace(**there, draws=drawn)


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


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What turns sample numbers into batches. `size` is (H, W), `resample` a filter of `cut_into`; `tokenizer_size` and
    its filter ask for the same views once more, as a tokenizer sees them. `decoder`: one of
    shards.decode.jpeg.DECODERS. `augment` changes the pixels u8 [3, H, W] of a sample in place."""

    images: ImageSet
    places: SampleOrder
    source: ViewSource
    size: tuple[int, int]
    resample: str = TORCH
    tokenizer_size: tuple[int, int] = (0, 0)
    tokenizer_resample: str = "lanczos"
    decoder: str = "auto"
    seed: int = 0
    draw: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
    augment: Callable[[int, torch.Tensor], None] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one sample's pixels and tokenizer_pixels."""
        return (3, *self.size), (3, *self.tokenizer_size)

    def batch(self, samples: np.ndarray, into: tuple[torch.Tensor, torch.Tensor] | None = None) -> Batch:
        """Build the batch of these samples (i64 [B]), its pixels and tokenizer_pixels in the two tensors `into`.

        Raises ShardError when a shard cannot be read.
        """
        places = into or tuple(torch.empty((len(samples), *shape), dtype=torch.uint8) for shape in self.shapes)
        refused: dict[tuple[int, int], str] = {}
        while True:
            try:
                return self._batch(samples, refused, *places)
            except _Undecodable as error:
                refused[error.place] = str(error)

    def _batch(
        self, samples: np.ndarray, refused: dict[tuple[int, int], str], pixels: torch.Tensor, second: torch.Tensor
    ) -> Batch:
        """The batch, where `refused` says which rows cannot stand at which of its places, and why."""
        epochs, shards, rows = self.places.locate(samples)
        if self.images.reading is not None:
            self.images.reading.sample = int(samples.min())
        bad: list[BadSample] = []
        encoded, known = [], []
        for i, sample in enumerate(samples.tolist()):
            rows[i], facts, data = self._read_usable(i, sample, int(shards[i]), int(rows[i]), refused, bad)
            encoded.append(data)
            known.append(facts)
        columns = {
            name: np.array(values, COLUMNS[name])
            for name, values in zip(Row._fields, zip(*known, strict=True), strict=True)
        }
        keys, means, sizes = columns["key_hash"], columns["mean_grey"], (columns["width"], columns["height"])
        greys = functools.partial(self.images.greys, shards, rows, means)
        views, tokens = self.source.views(Selection(epochs, shards, rows, keys, sizes, means, greys))
        limits = views.levels[:, :2].tolist()
        records = zip(views.boxes.tolist(), views.flips.tolist(), limits, strict=True)
        how = zip(
            encoded,
            zip(*(side.tolist() for side in sizes), strict=True),
            columns["flags"].tolist(),
            records,
            strict=True,
        )
        for i, (data, size, flags, (box, flip, limit)) in enumerate(how):
            try:
                crop = codec.decode_view(data, box, size, flags, self.decoder)
            except codec.ImageError as error:
                raise _Undecodable((i, int(rows[i])), str(error)) from error
            except ShardError as error:
                name, index = self.images.manifest.shards[int(shards[i])].name, self.images.index(int(shards[i]))
                raise ShardError(f"{name} {index.key(int(rows[i]))}: {error}") from error
            cut_into(pixels[i], crop, bool(flip), limit, self.resample)
            if self.augment is not None:
                self.augment(int(samples[i]), pixels[i])
            if second.numel():
                cut_into(second[i], crop, bool(flip), limit, self.tokenizer_resample)
        drawn = self.draw(samples) if self.draw else {}
        return Batch(
            torch.from_numpy(samples),
            pixels,
            second,
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(views.jitters),
            torch.from_numpy(views.orders.astype(np.int64)),
            torch.from_numpy(views.levels[:, 2].astype(np.float32)),
            torch.from_numpy(columns["label"]),
            {name: torch.from_numpy(value) for name, value in drawn.items()},
            bad,
        )

    def _read_usable(
        self, i: int, sample: int, shard: int, row: int, refused: dict[tuple[int, int], str], bad: list[BadSample]
    ) -> tuple[int, Row, bytes]:
        """The image at place i, its row and what the index says of that, or those of the first usable substitute: a
        pure function of the sample."""
        entry, asked = self.images.manifest.shards[shard], self.images.row(shard, row)
        first: DamagedSample | None = None
        for candidate in self._candidates(shard, row, asked):
            try:
                if (i, candidate) in refused:
                    raise DamagedSample(refused[i, candidate])
                known = asked if candidate == row else self.images.row(shard, candidate)
                if not known.flags & FLAG_BAD:  # else that is the reason
                    self.source.check(shard, candidate)
                data = self.images.read_row(shard, candidate, known)
                break
            except DamagedSample as error:
                first = first or error
        else:
            key, tries = self.images.index(shard).key(row), _SUBSTITUTES
            raise ShardError(f"{entry.name}: {tries} samples tried for {key}, none usable; run `verify`")
        if candidate != row:
            index, reason = self.images.index(shard), str(first)
            is_known = isinstance(first, KnownBad)
            bad.append(BadSample(sample, entry.name, index.key(row), reason, index.key(candidate), is_known))
        return candidate, known, data

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


class _Undecodable(Exception):
    """An image whose bytes are as packed does not decode: its place in the batch and its row."""

    def __init__(self, place: tuple[int, int], reason: str):
        super().__init__(reason)
        self.place = place


def cut_into(out: torch.Tensor, crop: np.ndarray, flip: bool, limits: list[int], resample: str) -> None:
    """Write one view into `out` u8 [3, H, W] from its crop u8 [h, w, 3]: clamp, antialiased resize, flip.

    limits: lowest and highest value (shards.format.levels). resample: TORCH is torch's bicubic, four
    times Pillow's speed, for the encoder; bicubic and lanczos are Pillow's.
    """
    size = (out.shape[1], out.shape[2])
    if limits != [0, 255]:
        crop = torch.from_numpy(crop).clamp(limits[0], limits[1]).numpy()
    if resample == TORCH:
        resized = interpolate(torch.from_numpy(crop).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[0]
    else:
        resized = torch.from_numpy(codec.resize(crop, size, resample)).permute(2, 0, 1)
    out.copy_(resized.flip(-1) if flip else resized)


class BatchSampler(Protocol):
    """The sample numbers (i64 [B]) of batch 0, 1, …: a list, or order.RankBatches."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> np.ndarray: ...


class _Ring:
    """Memory for the pixels of a few batches, shared with the workers that are forked after it was made.

    A fresh piece of shared memory for every batch would cost more in page faults than a copy of it does. Batch i has
    slot i mod slots, which is free again: no more than `slots` - 1 batches are asked for before one is received.
    """

    def __init__(self, slots: int, samples: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]):
        """`samples`: of the largest batch; `shapes`: Stream.shapes."""
        self.slots, self.shapes, self.sizes = slots, shapes, [samples * math.prod(shape) for shape in shapes]
        self.memory = torch.frombuffer(mmap.mmap(-1, max(1, slots * sum(self.sizes))), dtype=torch.uint8)

    def places(self, number: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the pixels and tokenizer_pixels of batch `number` go, u8 [samples, *shape] each."""
        start, found = number % self.slots * sum(self.sizes), []
        for size, shape in zip(self.sizes, self.shapes, strict=True):
            found.append(self.memory[start : start + samples * math.prod(shape)].view(samples, *shape))
            start += size
        return found[0], found[1]


class _Sent:
    """A batch on its way from a worker: everything but the pixels, which lie in the ring."""

    def __init__(self, number: int, batch: Batch):
        self.number, self.bad = number, batch.bad
        none = torch.empty(0)
        kept = batch._replace(pixels=none, tokenizer_pixels=none, draws={}, bad=[])
        self.arrays = {name: value.numpy() for name, value in kept._asdict().items() if torch.is_tensor(value)}
        self.draws = {name: value.numpy() for name, value in batch.draws.items()}

    def received(self, ring: _Ring, pin: bool) -> Batch:
        """The batch in memory of its own, pinned where a GPU copies it from."""

        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        places = ring.places(self.number, len(self.arrays["samples"]))
        tensors |= {"pixels": places[0], "tokenizer_pixels": places[1]}
        drawn = {name: torch.from_numpy(array) for name, array in self.draws.items()}
        batch = Batch(**tensors, draws=drawn, bad=self.bad)
        return batch.pinned() if pin else batch._replace(pixels=places[0].clone(), tokenizer_pixels=places[1].clone())


class _Batches(Dataset):
    """torch's view of a stream: item i is the batch of numbers[i]."""

    def __init__(self, stream: Stream, numbers: BatchSampler, ring: _Ring):
        self.stream, self.numbers, self.ring = stream, numbers, ring

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> _Sent | str:
        """The batch, or the one line of its ShardError: raised in a worker it would come back as a traceback."""
        try:
            samples = self.numbers[i]
            return _Sent(i, self.stream.batch(samples, self.ring.places(i, len(samples))))
        except ShardError as error:
            return str(error)


def start_worker(_: int) -> None:
    """In a worker process: more open files; and signals are the training process's business, which still needs batches
    to finish its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))


def _as_it_is(sent: Any) -> Any:
    return sent


def load(stream: Stream, numbers: BatchSampler, *, workers: int, prefetch: int, pin: bool) -> Iterator[Batch]:
    """Iterate over the batches of `numbers` (see order.RankBatches; the first is the largest), in order.

    workers: processes beside this one, 0 to build batches here. prefetch: batches each worker keeps ready. pin: in
    pinned memory. Raises ShardError for a shard that cannot be read, whichever process met it.
    """
    if not workers or not len(numbers):
        for i in range(len(numbers)):
            batch = stream.batch(numbers[i])
            yield batch.pinned() if pin else batch
        return
    ring = _Ring(workers * prefetch + 1, len(numbers[0]), stream.shapes)
    loader: DataLoader = DataLoader(
        _Batches(stream, numbers, ring),
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        multiprocessing_context="fork",  # the ring is inherited
        worker_init_fn=start_worker,
    )
    for sent in loader:
        if isinstance(sent, str):
            raise ShardError(sent)
        yield sent.received(ring, pin)
