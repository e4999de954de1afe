"""Read a damaged set through the project's own front and say how it ended; nothing may pass that is not the truth.

A set is read for one whole epoch. Every sample must be, byte for byte, what the undamaged set holds in its place, or in
the place of the substitute that is named for it.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.views import central_views
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import BadSample, Batch, Stream, load
from beitforge.shards.stream.order import Order, OrderPolicy
from beitforge.shards.stream.view_sources import CentralViews, RecordedViews

OUTCOMES = ("repaired", "substituted", "refused", "harmless", "as found", "silent", "traceback")

SIZE = (16, 16)
_BATCH = 12
_SECONDS = 20.0
_POLICY = OrderPolicy(seed=1, chunk=4, window=2, lanes=4)

Place = tuple[str, str]  # a shard's name and a key


@dataclass(frozen=True)
class Verdict:
    """How a case ended, and the error or the difference, for whoever reproduces it."""

    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Truth:
    """What a whole set gives: each place's sample in bytes, and the place of each sample of the first epoch."""

    samples: dict[Place, bytes]
    order: list[Place]


class Hang(BaseException):
    """A case that takes too long. No Exception, so that nothing on the way takes it for an error of the disk."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang in this (the main) thread after `seconds`."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def open_stream(images: Path, tokens: Path | None) -> Stream:
    """A set as training reads it: with its recorded views and tokens, or by central views where there are none."""
    opened = ImageSet(images)
    places = Order(opened.manifest.counts, _POLICY)
    source = RecordedViews(opened, tokens) if tokens else CentralViews()
    return Stream(images=opened, places=places, source=source, size=SIZE, resample="lanczos")


def read_epoch(stream: Stream, samples: int, workers: int) -> tuple[dict[int, bytes], list[BadSample]]:
    """The first `samples` samples by number, and the substitutions; in this process, or by worker processes."""
    numbers = np.split(np.arange(samples), range(_BATCH, samples, _BATCH))
    batches = load(stream, numbers, workers=workers, prefetch=1, pin=False) if workers else map(stream.batch, numbers)
    found: dict[int, bytes] = {}
    bad: list[BadSample] = []
    for batch in batches:
        found.update(_rows(batch))
        bad += batch.bad
    return found, bad


def _rows(batch: Batch) -> Iterator[tuple[int, bytes]]:
    parts = (batch.pixels, batch.tokens, batch.jitters, batch.orders, batch.pivots, batch.labels)
    for i, sample in enumerate(batch.samples.tolist()):
        yield sample, b"".join(part[i].numpy().tobytes() for part in parts)


def places_of(stream: Stream, samples: int) -> list[Place]:
    """Shard and key of each sample of the first epoch, by the set's own order and indexes."""
    _, shards, rows = stream.places.locate(np.arange(samples))
    names = [shard.name for shard in stream.images.manifest.shards]
    return [
        (names[shard], stream.images.index(shard).key(row))
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
    ]


def truth_of(images: Path, tokens: Path | None) -> Truth:
    """The truth about a set that is known to be whole."""
    stream = open_stream(images, tokens)
    found, bad = read_epoch(stream, len(stream.images), 0)
    assert not bad, "the set is not whole"
    order = places_of(stream, len(found))
    return Truth({place: found[sample] for sample, place in enumerate(order)}, order)


def central_sample(data: bytes, label: int) -> bytes:
    """What a stream of central views must give for an image of these bytes, made here without it."""
    pixels = codec.decode(data)
    box = central_views(np.array([pixels.shape[1]]), np.array([pixels.shape[0]])).boxes[0].tolist()
    view = codec.resize(codec.crop(pixels, box), SIZE, "lanczos").transpose(2, 0, 1)
    parts = (view, np.ones(3, np.float32), np.int64(0), np.float32(0), np.int64(label))
    return b"".join(part.tobytes() for part in parts)


def compare(truth: Truth, found: dict[int, bytes], bad: list[BadSample]) -> Verdict:
    """Silent unless every sample is there and is the truth of its place, or of the substitute named for it."""
    if sorted(found) != list(range(len(truth.order))):
        return Verdict("silent", f"{len(found)} samples of {len(truth.order)}")
    substitutes = {entry.sample: entry for entry in bad}
    for sample, (shard, key) in enumerate(truth.order):
        entry = substitutes.get(sample)
        if entry and (entry.shard, entry.key) != (shard, key):
            return Verdict("silent", f"sample {sample} is {shard} {key}, logged as {entry.shard} {entry.key}")
        if found[sample] != truth.samples.get((shard, entry.substitute if entry else key)):
            return Verdict("silent", f"sample {sample}, {shard} {key}, is not what was stored ({entry})")
    if bad:
        return Verdict("substituted", bad[0].reason)
    return Verdict("harmless")


def ended(case: Callable[[], Verdict], names: list[str]) -> Verdict:
    """Run a case to its verdict. A refusal must be a ShardError of one line that says one of `names`."""
    try:
        with limited(_SECONDS):
            return case()
    except ShardError as error:
        message = str(error)
        if "\n" in message or not any(name in message for name in names):
            return Verdict("traceback", f"a refusal that names nothing: {message}")
        return Verdict("refused", message)
    except (Exception, Hang) as error:  # whatever it is: finding it is what the corpus is for
        return Verdict("traceback", f"{type(error).__name__}: {error}")
