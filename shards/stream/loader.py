"""Whole batches, built in the worker: decode, cut by the record, resize to uint8. With shards.stream.view_batches what
uses torch.

A batch is a pure function of the sample numbers asked for. Workers, ranks and restarts therefore never change it.
"""

import contextlib
import functools
import math
import mmap
import os
import resource
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, get_worker_info

from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import COLUMNS, Row
from beitforge.shards.format.levels import Greys
from beitforge.shards.stream.batch_plan import BatchPlan, Draw, PlannedBatch, plan
from beitforge.shards.stream.batch_plan import BatchSampler as BatchSampler
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.read_ahead import ReadAhead
from beitforge.shards.stream.samples import BadSample as BadSample
from beitforge.shards.stream.samples import Found, SampleOrder, Samples
from beitforge.shards.stream.samples import SequentialOrder as SequentialOrder
from beitforge.shards.stream.view_sources import Selection, ViewSource

TORCH, TORCH_LANCZOS = "torch bicubic", "torch lanczos"
_TORCH_MODES = {TORCH: "bicubic", TORCH_LANCZOS: "lanczos"}
_WATCH_SECONDS = 2.0
_LENDS = 3  # batches: the one a step computes with, the next, and the one that is received meanwhile


class Deferred(NamedTuple):
    """Row `row` of a batch, decoded where the batch is used: its image, and the view of it as cut_into has it."""

    row: int
    data: bytes
    box: list[int]
    flip: bool
    limits: list[int]


class Batch(NamedTuple):
    """One micro batch, B samples.

    samples i64 [B] · pixels u8 [B, 3, H, W], cut and flipped, not yet jittered · tokenizer_pixels u8 [B, 3, h, w], the
    same views at the tokenizer's size (h = w = 0: not asked for) · tokens i64 [B, N] (N = 0: none recorded) · jitters
    f32 [B, 3], orders i64 [B], pivots f32 [B] (shards.format.views, levels) · labels i64 [B] · draws: what the caller's
    `draw` made of the sample numbers · bad: the substitutions made · deferred: rows whose pixels are not made yet.
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
    deferred: tuple[Deferred, ...] = ()

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


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What turns sample numbers into batches. `size` is (H, W), `resample` a filter of `cut_into`; `tokenizer_size` and
    its filter ask for the same views once more, as a tokenizer sees them. `decoder`: one of
    shards.decode.jpeg.DECODERS. `augment` changes the pixels u8 [3, H, W] of a sample in place. `defer`: leave JPEGs to
    whoever takes the batch (shards.stream.on_device)."""

    images: ImageSet
    places: SampleOrder
    source: ViewSource
    size: tuple[int, int]
    resample: str = TORCH
    tokenizer_size: tuple[int, int] = (0, 0)
    tokenizer_resample: str = "lanczos"
    decoder: str = "auto"
    seed: int = 0
    draw: Draw | None = None
    augment: Callable[[int, torch.Tensor], None] | None = None
    defer: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one sample's pixels and tokenizer_pixels."""
        return (3, *self.size), (3, *self.tokenizer_size)

    @functools.cached_property
    def samples(self) -> Samples:
        """What is read for the batches."""
        return Samples(self.images, self.source, self.seed)

    def batch(self, samples: np.ndarray) -> Batch:
        """Build the batch of these samples (i64 [B]). Raises ShardError when a shard cannot be read."""
        places = plan(self.places, self.draw, [samples])[0]
        return self.built(places, [self.samples.read(place) for place in places])

    def built(
        self, places: PlannedBatch, found: list[Found], into: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Batch:
        """Build the batch of samples that were read, its pixels and tokenizer_pixels in the two tensors `into`. What
        does not decode is read again, as what stands in for it. Raises as `batch` does."""
        pixels, second = into or tuple(torch.empty((len(places), *shape), dtype=torch.uint8) for shape in self.shapes)
        refused: dict[int, dict[int, str]] = {}
        if self.images.reading is not None:
            self.images.reading.sample = min(place.sample for place in places)
        while True:
            try:
                return self._built(places, found, pixels, second)
            except _Undecodable as error:
                i = error.place
                refused.setdefault(i, {})[found[i].row] = str(error)
                found[i] = self.samples.read(places[i], refused[i])

    def _built(self, places: PlannedBatch, found: list[Found], pixels: torch.Tensor, second: torch.Tensor) -> Batch:
        samples, epochs, shards = (np.array(column, np.int64) for column in list(zip(*places, strict=True))[:3])
        columns = {
            name: np.array(values, COLUMNS[name])
            for name, values in zip(Row._fields, zip(*(one.known for one in found), strict=True), strict=True)
        }
        keys, means, sizes = columns["key_hash"], columns["mean_grey"], (columns["width"], columns["height"])
        rows, ready = np.array([one.row for one in found], np.int64), [one.ready for one in found]

        def greys() -> Greys:
            return Greys(means, np.array(ready, np.uint16))

        views, tokens = self.source.views(Selection(epochs, shards, rows, keys, sizes, means, greys, ready))
        limits = views.levels[:, :2].tolist()
        deferred = []
        records = zip(found, views.boxes.tolist(), views.flips.tolist(), limits, strict=True)
        for i, (one, box, flip, limit) in enumerate(records):
            known = one.known
            try:
                if self.defer and codec.is_plain_jpeg(known.flags):
                    codec.check_box(box, (known.width, known.height))
                    deferred.append(Deferred(i, one.data, box, bool(flip), limit))
                    continue
                crop = codec.decode_view(one.data, box, (known.width, known.height), known.flags, self.decoder)
            except codec.ImageError as error:
                raise _Undecodable(i, str(error)) from error
            except ShardError as error:
                name, index = self.images.manifest.shards[places[i].shard].name, self.images.index(places[i].shard)
                raise ShardError(f"{name} {index.key(one.row)}: {error}") from error
            cut_into(pixels[i], crop, bool(flip), limit, self.resample)
            if self.augment is not None:
                self.augment(places[i].sample, pixels[i])
            if second.numel():
                cut_into(second[i], crop, bool(flip), limit, self.tokenizer_resample)
        return Batch(
            torch.from_numpy(samples),
            pixels,
            second,
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(views.jitters),
            torch.from_numpy(views.orders.astype(np.int64)),
            torch.from_numpy(views.levels[:, 2].astype(np.float32)),
            torch.from_numpy(columns["label"]),
            {name: torch.from_numpy(value) for name, value in places.draws.items()},
            [one.bad for one in found if one.bad is not None],
            tuple(deferred),
        )


class _Undecodable(Exception):
    """An image whose bytes are as packed does not decode: its place in the batch."""

    def __init__(self, place: int, reason: str):
        super().__init__(reason)
        self.place = place


def cut_into(out: torch.Tensor, crop: np.ndarray, flip: bool, limits: list[int], resample: str) -> None:
    """Write one view into `out` u8 [3, H, W] from its crop u8 [h, w, 3]: clamp, antialiased resize, flip.

    limits: lowest and highest value (shards.format.levels). resample: TORCH is torch's bicubic, four
    times Pillow's speed, for the encoder; TORCH_LANCZOS torch's Lanczos, of torch 2.13, five to six times Pillow's
    speed; bicubic and lanczos are Pillow's.
    """
    size = (out.shape[1], out.shape[2])
    if limits != [0, 255]:
        crop = torch.from_numpy(crop).clamp(limits[0], limits[1]).numpy()
    if mode := _TORCH_MODES.get(resample):
        resized = interpolate(torch.from_numpy(crop).permute(2, 0, 1)[None], size, mode=mode, antialias=True)[0]
    else:
        resized = torch.from_numpy(codec.resize(crop, size, resample)).permute(2, 0, 1)
    out.copy_(resized.flip(-1) if flip else resized)


class _Ring:
    """Memory for the pixels of a few batches, shared with the workers that are forked after it was made.

    A fresh piece of shared memory for every batch would cost more in page faults than a copy of it does. A batch that
    was received is lent to whoever uses it, uncopied, until none of its tensors is left; who keeps more than `lends`
    gets copies.
    """

    def __init__(self, slots: int, lends: int, samples: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]):
        """slots: beside those lent. `samples`: of the largest batch; `shapes`: Stream.shapes."""
        self.shapes, self.sizes = shapes, [samples * math.prod(shape) for shape in shapes]
        self.free, self.lent, self.lends = list(range(slots + lends)), set[int](), lends
        self.memory = mmap.mmap(-1, max(1, len(self.free) * sum(self.sizes)))
        self.given = set[int]()  # lent when another process was forked, which sees them: never written to again
        _keep_at_forks()
        _rings[:] = [*(known for known in _rings if known()), weakref.ref(self)]

    def numbered(self, batches: int) -> Iterator[tuple[int, int]]:
        """The numbers of batches, each with a slot, which is taken when it is asked for."""
        for number in range(batches):
            yield number, self.free.pop()

    def places(self, slot: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the pixels and tokenizer_pixels of a batch go, u8 [samples, *shape] each."""
        return self._views(np.frombuffer(self.memory, np.uint8, sum(self.sizes), slot * sum(self.sizes)), samples)

    def _views(self, memory: np.ndarray, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each a storage of its own, which is what is pickled of a tensor."""
        found = []
        for size, shape in zip(self.sizes, self.shapes, strict=True):
            found.append(torch.from_numpy(memory[: samples * math.prod(shape)]).view(samples, *shape))
            memory = memory[size:]
        return found[0], found[1]

    def received(self, slot: int, samples: int, pin: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What was written there, in memory that stays its reader's; pinned where a GPU copies it from."""
        if pin or len(self.lent) >= self.lends:
            copies = [place.pin_memory() if pin else place.clone() for place in self.places(slot, samples)]
            self.free.append(slot)
            return copies[0], copies[1]
        self.lent.add(slot)
        memory = np.frombuffer(self.memory, np.uint8, sum(self.sizes), slot * sum(self.sizes))
        weakref.finalize(memory, self._back, slot).atexit = False  # the storages of both tensors hold it
        return self._views(memory, samples)

    def _back(self, slot: int) -> None:
        if slot not in self.given:
            self.lent.discard(slot)
            self.free.append(slot)


_rings: list[weakref.ref[_Ring]] = []


@functools.cache
def _keep_at_forks() -> None:
    os.register_at_fork(before=_give_lent)


def _give_lent() -> None:
    """A forked process shares the memory of batches that are held: what it sees of them stays, though they are let go
    here. A ring lends that many fewer from then on."""
    for ring in [ring for known in list(_rings) if (ring := known())]:
        ring.given |= ring.lent


class _Sent:
    """A batch on its way from a worker: everything but the pixels, which lie in the ring."""

    def __init__(self, slot: int, batch: Batch):
        self.slot, self.bad, self.deferred = slot, batch.bad, batch.deferred
        none = torch.empty(0)
        kept = batch._replace(pixels=none, tokenizer_pixels=none, draws={}, bad=[])
        self.arrays = {name: value.numpy() for name, value in kept._asdict().items() if torch.is_tensor(value)}
        self.draws = {name: value.numpy() for name, value in batch.draws.items()}

    def received(self, ring: _Ring, pin: bool) -> Batch:
        """The batch in memory of its own, pinned where a GPU copies it from."""

        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        drawn = {name: torch.from_numpy(array) for name, array in self.draws.items()}
        batch = Batch(**tensors, draws=drawn, bad=self.bad, deferred=self.deferred)
        batch = batch.pinned() if pin else batch
        pixels, second = ring.received(self.slot, len(batch.samples), pin)
        return batch._replace(pixels=pixels, tokenizer_pixels=second)


class _Batches(Dataset):
    """torch's view of a stream: item i is the batch of numbers[i]."""

    def __init__(self, stream: Stream, numbers: BatchSampler, ring: _Ring):
        self.stream, self.numbers, self.ring = stream, numbers, ring
        self.ahead: ReadAhead[int, PlannedBatch, Found] | None = None  # made by the worker

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: tuple[int, int]) -> _Sent | str:
        """A batch by its number, with the slot for its pixels; or the one line of its ShardError: raised in a worker it
        would come back as a traceback."""
        (i, slot), worker = item, get_worker_info()
        step = worker.num_workers if worker else 1  # batches go to workers in turn
        self.ahead = self.ahead or reading_ahead(self.stream, self.numbers, step)
        try:
            places, found = self.ahead.batch(i, i + step if i + step < len(self) else None)
            return _Sent(slot, self.stream.built(places, found, self.ring.places(slot, len(places))))
        except ShardError as error:
            return str(error)


def reading_ahead(stream: Stream, numbers: BatchSampler, step: int = 1) -> ReadAhead[int, PlannedBatch, Found]:
    """What reads one in `step` of the batches of `numbers`."""
    return ReadAhead(BatchPlan(stream.places, stream.draw, numbers, step).__getitem__, stream.samples.read)


def start_worker(_: int) -> None:
    """In a worker process: more open files; and signals are the training process's business, which still needs batches
    to finish its step. A worker ends with it, though, however that ends, and when it says so: a process that ends sends
    SIGTERM to those that multiprocessing has started for it, and waits for them."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for _end_with, in every thread that begins from now on
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """torch's own watch only has the worker end by itself, which first waits for somebody to take its last batches."""
    while os.getppid() == parent:
        asked = signal.sigtimedwait({signal.SIGTERM}, _WATCH_SECONDS)
        if asked is not None and asked.si_pid == parent:
            os._exit(0)
    os._exit(1)


def _as_it_is(sent: Any) -> Any:
    return sent


def load(stream: Stream, numbers: BatchSampler, *, workers: int, prefetch: int, pin: bool) -> Iterator[Batch]:
    """Iterate over the batches of `numbers` (see order.RankBatches; the first is the largest), in order.

    workers: processes beside this one, 0 to build batches here. prefetch: batches each worker keeps ready. pin: in
    pinned memory. Raises ShardError for a shard that cannot be read, whichever process met it.
    """
    if not workers or not len(numbers):
        with contextlib.closing(reading_ahead(stream, numbers)) as ahead:
            for i in range(len(numbers)):
                batch = stream.built(*ahead.batch(i, i + 1 if i + 1 < len(numbers) else None))
                yield batch.pinned() if pin else batch
        return
    ring = _Ring(workers * prefetch + 1, 0 if pin else _LENDS, len(numbers[0]), stream.shapes)
    loader: DataLoader = DataLoader(
        _Batches(stream, numbers, ring),
        batch_size=None,
        sampler=ring.numbered(len(numbers)),
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
