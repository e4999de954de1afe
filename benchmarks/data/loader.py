"""Images/s per core: our stream against BEiT's data path, plain webdataset, and the bare decode + crop + resize loop.

Every path runs on one core, worker and consumer together, in turn with the others, round after round.
"""

import dataclasses
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from beitforge.pipeline.config.settings import Mask, Model
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.shards.decode import codec
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import TORCH, Batch, Stream, cut_into, load
from beitforge.shards.stream.order import Order, OrderPolicy, RankBatches
from beitforge.shards.stream.view_sources import RecordedViews, Selection
from benchmarks.data import official_path
from benchmarks.data.loader_corpus import Corpus, corpus
from benchmarks.data.views import draw_photographs
from benchmarks.results import write

BATCH, SIZE, WARM, ROUNDS, PREFETCH, BUFFER = 64, 224, 2, 5, 4, 1000
IMAGES, IMAGES_DRY = 19 * BATCH, 4 * BATCH
EPOCHS = 2  # timed, of the paths that decode as we do; of the slower ones, one


@dataclass(frozen=True)
class Recorded:
    """An image with the view that the stream shows of it."""

    data: bytes
    size: tuple[int, int]
    flags: int
    box: list[int]
    flip: bool
    limits: list[int]

    def cut(self, out: torch.Tensor) -> None:
        """What the stream does with it."""
        cut_into(out, codec.decode_view(self.data, self.box, self.size, self.flags), self.flip, self.limits, TORCH)

    def cut_barely(self, out: torch.Tensor) -> None:
        """Decode, crop, resize; no flip, no clamp."""
        cut_into(out, codec.decode_view(self.data, self.box, self.size, self.flags), False, [0, 255], TORCH)


def our_stream(collection: Corpus) -> Stream:
    """As `pretrain` makes it: order, checksums, recorded views and tokens, masks, drop path."""
    images = ImageSet(collection.shards)
    return Stream(
        images=images,
        places=Order(images.manifest.counts, OrderPolicy()),
        source=RecordedViews(images, collection.tokens),
        size=(SIZE, SIZE),
        draw=functools.partial(sample_draws, Mask(), Model(), 0),
    )


def records(stream: Stream, samples: np.ndarray) -> dict[str, Recorded]:
    """The samples by key, put together beside the stream from the parts it is made of."""
    images = stream.images
    epochs, shards, rows = stream.places.locate(samples)
    indexes = [images.index(shard) for shard in shards.tolist()]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(index, name)[row] for index, row in zip(indexes, rows, strict=True)])

    sizes, means = (column("width"), column("height")), column("mean_grey")
    greys = functools.partial(images.greys, shards, rows, means)
    picked = Selection(epochs, shards, rows, column("key_hash"), sizes, means, greys)
    views, _ = stream.source.views(picked)
    limits, flags = views.levels[:, :2].tolist(), column("flags").tolist()
    found = {}
    for i, (index, shard, row) in enumerate(zip(indexes, shards.tolist(), rows.tolist(), strict=True)):
        box, flip = views.boxes[i].tolist(), bool(views.flips[i])
        size = int(sizes[0][i]), int(sizes[1][i])
        found[index.key(row)] = Recorded(images.read(shard, row), size, flags[i], box, flip, limits[i])
    return found


def beit_files(collection: Corpus, count: int) -> Iterable:
    """`count` batches, as each of the paths gives them: BEiT's transform on files."""
    files = collection.files()
    numbers = np.concatenate([np.random.default_rng(turn).permutation(len(files)) for turn in range(EPOCHS)])
    dataset = official_path.OfficialFiles([files[i] for i in numbers[: count * BATCH]])
    return DataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=PREFETCH)


def tars(collection: Corpus) -> webdataset.WebDataset:
    """webdataset's reader over our shards, shuffled as its documentation has it."""
    urls = collection.urls()
    return webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(BUFFER)


def official_sample(sample: dict) -> official_path.Sample:
    return official_path.transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))


def beit_webdataset(collection: Corpus, count: int) -> Iterable:
    """BEiT's transform on plain webdataset."""
    dataset = tars(collection).map(official_sample).repeat().with_epoch(count * BATCH)
    return DataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=PREFETCH)


class EqualWork(IterableDataset):
    """webdataset's reader with our decode, cut and batch; views come from memory, nothing is checked or masked."""

    def __init__(self, collection: Corpus, known: dict[str, Recorded], count: int):
        self.reader, self.known, self.count = tars(collection).repeat(), known, count
        self.numbers = {key: number for number, key in enumerate(known)}

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        samples = iter(self.reader)
        for _ in range(self.count):
            pixels = torch.empty((BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
            numbers = torch.empty(BATCH, dtype=torch.int64)
            for i in range(BATCH):
                sample = next(samples)
                view = self.known[sample["__key__"]]
                numbers[i] = self.numbers[sample["__key__"]]
                dataclasses.replace(view, data=sample["jpg"]).cut(pixels[i])
            yield pixels, numbers


def equal_work(collection: Corpus, known: dict[str, Recorded], count: int) -> Iterable:
    return DataLoader(EqualWork(collection, known, count), batch_size=None, num_workers=1, prefetch_factor=PREFETCH)


def ours(stream: Stream, count: int, workers: int = 1) -> Iterator[Batch]:
    """The full stream; the warm batches end an epoch, so that those timed are whole ones."""
    numbers = RankBatches(stream.places.samples - WARM * BATCH, BATCH, BATCH, 0, 1, count)
    return load(stream, numbers, workers=workers, prefetch=PREFETCH, pin=False)


def bare(known: dict[str, Recorded], count: int) -> Iterator[torch.Tensor]:
    """Bytes in memory, one batch filled over and over, in this process."""
    pixels, views = torch.empty((BATCH, 3, SIZE, SIZE), dtype=torch.uint8), list(known.values())
    for number in range(count):
        for i in range(BATCH):
            views[(number * BATCH + i) % len(views)].cut_barely(pixels[i])
        yield pixels


def rate(batches: Iterable, count: int) -> float:
    """Images/s of the last `count` batches, taken by a consumer that does nothing with them."""
    started, ended, taken = 0.0, 0.0, 0
    for _ in batches:
        taken += 1
        if taken == WARM:
            started = time.perf_counter()
        if taken == WARM + count:
            ended = time.perf_counter()
    assert taken == WARM + count, f"{taken} batches came, not {WARM + count}"
    return count * BATCH / (ended - started)


def check(collection: Corpus, stream: Stream, known: dict[str, Recorded]) -> None:
    """No numbers unless every path gives what it should."""
    for draw in draw_photographs(1):
        official_path.check(draw)
    for batches in (beit_files(collection, 1), beit_webdataset(collection, 1)):
        shapes = [tuple(part.shape) for part in next(iter(batches))]
        assert shapes == [(BATCH, 3, SIZE, SIZE), (BATCH, 3, 112, 112), (BATCH, 14, 14)], f"BEiT's path gives {shapes}"
    samples = np.arange(stream.places.samples - WARM * BATCH, stream.places.samples - (WARM - 1) * BATCH)
    alone, loaded = stream.batch(samples), next(ours(stream, 1))
    assert loaded.tokens.shape == (BATCH, 196) and not loaded.bad, "our batch is not whole"
    for name in ("samples", "pixels", "tokens", "jitters", "orders", "pivots", "labels"):
        assert torch.equal(getattr(alone, name), getattr(loaded, name)), f"a worker gives other {name}"
    assert all(torch.equal(alone.draws[name], loaded.draws[name]) for name in alone.draws), "a worker gives other masks"
    shown, again = records(stream, samples), torch.empty((3, SIZE, SIZE), dtype=torch.uint8)
    for pixels, view in zip(alone.pixels, shown.values(), strict=True):
        view.cut(again)
        assert torch.equal(pixels, again), "the record's cut is not the stream's"
        if not view.flip and view.limits == [0, 255]:
            view.cut_barely(again)
            assert torch.equal(pixels, again), "the bare loop gives other pixels"
    views = list(known.values())
    pixels, numbers = next(iter(equal_work(collection, known, 1)))
    for found, number in zip(pixels, numbers.tolist(), strict=True):
        views[number].cut(again)
        assert torch.equal(found, again), "webdataset gives other pixels at equal work"


def measure(paths: Mapping[str, tuple[Callable[[int], Iterable], int]], rounds: int) -> dict[str, list[float]]:
    """Images/s of each path in each round; a path is (what gives WARM + n batches, n)."""
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, (batches, count) in paths.items():
            rates[name].append(rate(batches(WARM + count), count))
    return rates


def ratio(one: list[float], other: list[float]) -> float:
    """The median over the rounds of what was measured side by side."""
    return float(np.median(np.array(one) / np.array(other)))


def row(path: str, cores: str, does: str, rates: list[float]) -> dict:
    found = {"images/s": float(np.median(rates)), "least": min(rates), "most": max(rates)}
    return {"path": path, "runs on": cores, "what it does": does, **found}


BEIT = "PIL decode, jitter of the whole image, flip, one box at 224 and 112, float tensors, mask"
DOES = {
    "BEiT, from files": BEIT,
    "BEiT, plain webdataset": BEIT,
    "webdataset, our decode": "decode, crop, resize, flip, clamp to a uint8 batch",
    "ours": "the same with order, checksums, recorded views, tokens, masks, drop path",
    "bare loop": "decode, crop, resize; bytes in memory, no process, no loader",
}


def main(dry: bool) -> None:
    """One core each, then one and two workers on all cores."""
    cores, rounds = os.sched_getaffinity(0), 1 if dry else ROUNDS
    torch.set_num_threads(1)
    collection = corpus(IMAGES_DRY if dry else IMAGES)
    stream = our_stream(collection)
    epoch = stream.places.samples // BATCH
    known = records(stream, np.arange(stream.places.samples, 2 * stream.places.samples))
    check(collection, stream, known)
    os.sched_setaffinity(0, {max(cores)})
    paths: list[tuple[Callable[[int], Iterable], int]] = [
        (functools.partial(beit_files, collection), epoch),
        (functools.partial(beit_webdataset, collection), epoch),
        (functools.partial(equal_work, collection, known), EPOCHS * epoch),
        (functools.partial(ours, stream), EPOCHS * epoch),
        (functools.partial(bare, known), EPOCHS * epoch),
    ]
    rates = measure(dict(zip(DOES, paths, strict=True)), rounds)
    os.sched_setaffinity(0, cores)
    workers = {
        f"ours, {count} worker{'s' * (count > 1)}": (functools.partial(ours, stream, workers=count), EPOCHS * epoch)
        for count in (1, 2)
    }
    scaling = measure(workers, rounds)
    rows = [row(name, "one core", DOES[name], found) for name, found in rates.items()]
    rows += [row(name, f"{len(cores)} cores", DOES["ours"], found) for name, found in scaling.items()]
    ratios = {f"ours / {name}": ratio(rates["ours"], rates[name]) for name in DOES if name != "ours"}
    ratios["2 workers / 1 worker"] = ratio(scaling["ours, 2 workers"], scaling["ours, 1 worker"])
    if dry:
        print(*rows, ratios, sep="\n")
        return
    note = (
        f"{collection.describe()} Batch {BATCH}, one DataLoader worker and the consumer on the same core, medians of "
    )
    note += f"{rounds} rounds in turn, of rates and of their ratios; the bare loop runs in one process. "
    note += "Every path was checked before it was timed: ours against the stream without workers, webdataset's and the "
    note += "bare loop's pixels against ours, BEiT's against the transform of `views`."
    write("loader", "how many images a second does a core load?", rows, ratios, [note])


if __name__ == "__main__":
    main("--dry" in sys.argv)
