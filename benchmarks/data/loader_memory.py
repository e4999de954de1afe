"""Does a loader's worker grow? The memory of two workers over 10,000 batches."""

import functools
import multiprocessing
import sys

import numpy as np

from beitforge.pipeline.config.settings import Mask, Model
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Stream, load
from beitforge.shards.stream.order import Order, OrderPolicy, RankBatches
from beitforge.shards.stream.view_sources import RecordedViews
from benchmarks.data.loader_corpus import tiny_corpus
from benchmarks.data.loader_resume import large_set, large_stream
from benchmarks.results import write

IMAGES, PER_SHARD, BATCH, WORKERS = 4000, 100, 16, 2
AT, AT_DRY = (100, 1000, 2500, 5000, 10_000), (10, 20)
READINGS = 20  # over the last fifth of the batches before a row
KINDS = ("USS MiB", "RSS MiB")  # of each worker
_MIB = 1024


def small_stream() -> Stream:
    """The whole stream over a small set: 40 shards, recorded views, tokens, masks."""
    collection = tiny_corpus(IMAGES, PER_SHARD)
    images = ImageSet(collection.shards)
    return Stream(
        images=images,
        places=Order(images.manifest.counts, OrderPolicy()),
        source=RecordedViews(images, collection.tokens),
        size=(224, 224),
        draw=functools.partial(sample_draws, Mask(), Model(), 0),
    )


def memory(pid: int) -> tuple[float, float]:
    """MiB of a process: pages that no other process maps, and all it has mapped."""
    kilobytes = {}
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        for line in list(file)[1:]:
            name, value = line.split()[:2]
            kilobytes[name.rstrip(":")] = int(value)
    return (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) / _MIB, kilobytes["Rss"] / _MIB


def watch(name: str, stream: Stream, at: tuple[int, ...]) -> list[dict]:
    """A row for each number of batches in `at`: the memory of every worker, the mean of the readings before it, since
    the batches on their way come and go."""
    # one batch more than is looked at, so that the workers are still there
    numbers, rows = RankBatches(0, BATCH, BATCH, 0, 1, at[-1] + 1), []
    readings: list[list[tuple[float, float]]] = []
    for taken, batch in enumerate(load(stream, numbers, workers=WORKERS, prefetch=4, pin=False)):
        assert len(batch.pixels) == BATCH and not batch.bad, "a batch is not whole"
        if any(0.8 * mark < taken <= mark and taken % max(1, mark // (5 * READINGS)) == 0 for mark in at):
            workers = sorted(process.pid or 0 for process in multiprocessing.active_children())
            assert len(workers) == WORKERS, f"{len(workers)} workers are running"
            readings.append([memory(pid) for pid in workers])
        if taken in at:
            found = np.mean(readings, axis=0)
            readings.clear()
            cells = {f"{kind}, {i + 1}": float(found[i, k]) for k, kind in enumerate(KINDS) for i in range(WORKERS)}
            rows.append({"set": name, "batches": taken, **cells})
    return rows


def growth(rows: list[dict], kind: str) -> float:
    """Memory at the last row over that at the second, of the worker that grew most."""
    names = [name for name in rows[0] if name.startswith(kind)]
    return max(rows[-1][name] / rows[1][name] for name in names)


def main(dry: bool) -> None:
    """A small set read 40 times over, and one of 1420 shards, more than stay open."""
    at = AT_DRY if dry else AT
    small = watch("4000 images, tokens, masks", small_stream(), at)
    large = watch("14.2 M listed in 1420 shards", large_stream(large_set()), at)
    rows, last = small + large, f"{at[-1]} / {at[1]} batches"
    ratios = {}
    for name, found in (("small", small), ("large", large)):
        for kind in KINDS:
            ratios[f"{name} set, {kind}, {last}"] = growth(found, kind)
    if dry:
        print(*rows, ratios, sep="\n")
        return
    note = (
        f"{WORKERS} workers, batches of {BATCH} tiny images cut to 224. USS: pages that no other process maps. Means "
    )
    note += f"of {READINGS} readings over the last fifth before each row; a batch on its way is 2.3 MiB, and some come "
    note += "and go. A ratio is that of the worker that grew most. The large set's indexes stay mapped, up to half of "
    note += "what a worker may have open, and their pages count as RSS; its views are drawn, without tokens or masks."
    write("loader_memory", "does a worker's memory stay flat?", rows, ratios, [note])


if __name__ == "__main__":
    main("--dry" in sys.argv)
