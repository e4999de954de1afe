"""Our stream as `pretrain` makes it, and the bare loop that it cannot be faster than."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from beitforge.pipeline.config.settings import Mask, Model
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Batch, Stream, load
from beitforge.shards.stream.order import Order, OrderPolicy, RankBatches
from beitforge.shards.stream.view_sources import RecordedViews
from benchmarks.data.loader_peers.equal_work import Cut, empty_batch, shown
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, SIZE, Given, LoaderPath, Shown

ENDLESS = 1 << 20  # batches


def our_stream(shards: Path, tokens: Path) -> Stream:
    """Order, checksums, recorded views and tokens, masks, drop path."""
    images = ImageSet(shards)
    return Stream(
        images=images,
        places=Order([shard.samples for shard in images.manifest.shards], OrderPolicy()),
        source=RecordedViews(images, tokens),
        size=(SIZE, SIZE),
        draw=functools.partial(sample_draws, Mask(), Model(), 0),
    )


def numbers_of(made: Stream, samples: np.ndarray) -> np.ndarray:
    """The images' numbers, which are their keys."""
    _, shards, rows = made.places.locate(samples)
    keys = [made.images.index(shard).key(row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
    return np.array(keys, np.int64)


def check(made: Stream) -> None:
    """A worker's batch is the one that the stream makes without workers, in every part."""
    numbers = RankBatches(0, BATCH, BATCH, 0, 1, 1)
    alone, loaded = made.batch(numbers[0]), next(load(made, numbers, workers=1, prefetch=PREFETCH, pin=False))
    assert loaded.tokens.shape == (BATCH, 196) and not loaded.bad, "our batch is not whole"
    pairs = zip(alone.tensors(), loaded.tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs), "a worker gives another batch"


def bare(given: Given) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bytes in memory, one batch filled over and over, in this process; no flip, no clamp."""
    cut, pixels, numbers = Cut(given, whole=False), empty_batch(), torch.empty(BATCH, dtype=torch.int64)
    images, number = [given.data(number) for number in range(len(given))], 0
    while True:
        for i in range(BATCH):
            cut.into(pixels[i], number, images[number])
            numbers[i] = number
            number = (number + 1) % len(given)
        yield pixels, numbers


def open_path(given: Given, variant: str) -> LoaderPath:
    """bare, or SHARDS-WORKERS: the names of a set in the corpus, and how many processes read it."""
    if variant == "bare":
        return LoaderPath(bare(given), shown)
    shards, workers = variant.rsplit("-", 1)
    made = our_stream(given.folder / shards, given.folder / "peers" / f"view of {shards}")
    check(made)

    def pixels(batch: Batch) -> Shown:
        return batch.pixels.numpy(), numbers_of(made, batch.samples.numpy())

    numbers = RankBatches(0, BATCH, BATCH, 0, 1, ENDLESS)
    return LoaderPath(load(made, numbers, workers=int(workers), prefetch=PREFETCH, pin=False), pixels)
