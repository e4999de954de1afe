"""Where a run resumes does not matter: time to the first batch at sample 0 and deep into a set of 14.2 M samples."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from beitforge.shards.format.index import index_path
from beitforge.shards.format.manifest import read_image_manifest, write_manifest
from beitforge.shards.format.views import ViewPolicy
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Stream, load
from beitforge.shards.stream.order import Order, OrderPolicy, RankBatches
from beitforge.shards.stream.view_sources import DrawnViews
from benchmarks.data.loader_corpus import FOLDER, tiny_corpus
from benchmarks.results import write

SHARDS, PER_SHARD, BATCH, ROUNDS = 1420, 10_000, 64, 25
PLACES = {"0": 0, "5·10⁹": 5_000_000_000}
WORKERS = (0, 1)


def large_set() -> Path:
    """A set that lists 14.2 M samples: every shard is the same tar and index under a name of its own."""
    folder, shards = FOLDER / f"listed-{SHARDS}", tiny_corpus(PER_SHARD, PER_SHARD).shards
    manifest = read_image_manifest(shards)
    (entry,) = manifest.shards
    listed = replace(manifest, shards=[replace(entry, name=f"shard-{number:06d}") for number in range(SHARDS)])
    if not folder.exists() or read_image_manifest(folder) != listed:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for shard in listed.shards:
            os.link(shards / f"{entry.name}.tar", folder / f"{shard.name}.tar")
            os.link(index_path(shards, entry.name), index_path(folder, shard.name))
        write_manifest(folder, listed)
    return folder


def large_stream(folder: Path) -> Stream:
    """Views are drawn: the tokens of 14.2 M samples would not fit beside a benchmark."""
    images = ImageSet(folder)
    order = Order(images.manifest.counts, OrderPolicy())
    return Stream(images=images, places=order, source=DrawnViews(ViewPolicy()), size=(224, 224))


def first_batch(folder: Path, first: int, workers: int) -> float:
    """Seconds from nothing but imports to the first batch; refuses one that is not the batch asked for."""
    started = time.perf_counter()
    stream = large_stream(folder)
    batches = load(stream, RankBatches(first, BATCH, BATCH, 0, 1, 100), workers=workers, prefetch=4, pin=False)
    batch = next(batches)
    taken = time.perf_counter() - started
    samples = np.arange(first, first + BATCH)
    assert stream.places.samples == SHARDS * PER_SHARD and np.array_equal(batch.samples.numpy(), samples)
    expected = stream.batch(samples).pixels
    assert bool((batch.pixels == expected).all()) and not batch.bad, "the first batch is not the stream's"
    return taken


def in_fresh_process(folder: Path, first: int, workers: int) -> float:
    command = [sys.executable, "-m", "benchmarks.data.loader_resume", str(folder), str(first), str(workers)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(dry: bool) -> None:
    """Both places in turn, each time in a process of its own and one batch further: images and views differ."""
    folder, rounds = large_set(), 1 if dry else ROUNDS
    rows, ratios = [], {}
    for workers in WORKERS:
        found: dict[str, list[float]] = {name: [] for name in PLACES}
        for turn in range(rounds + 1):  # the first round warms the page cache
            for name in sorted(PLACES, reverse=turn % 2 == 1):
                seconds = in_fresh_process(folder, PLACES[name] + turn * BATCH, workers)
                found[name] += [1000 * seconds] if turn else []
        for name, times in found.items():
            spread = {"median ms": float(np.median(times)), "least": min(times), "most": max(times)}
            rows.append({"workers": workers, "first sample": name, **spread})
        start, deep = (np.array(found[name]) for name in PLACES)
        ratios[f"5·10⁹ / 0, {workers} worker{'s' * (workers != 1)}"] = float(np.median(deep / start))
    if dry:
        print(*rows, ratios, sep="\n")
        return
    note = (
        f"From nothing but imports to the first batch of {BATCH}: manifest, order, opened shards, the worker's start. "
    )
    note += (
        f"A fresh process each, {rounds} of each place in turn, each a batch behind the one before, since images and "
        "views cost what they cost; page cache warm; ratios are medians over the rounds. "
    )
    note += f"{SHARDS} shards of {PER_SHARD} tiny images, all links to one tar, views drawn; each batch was checked."
    write("loader_resume", "does it matter where a run of 14.2 M samples an epoch resumes?", rows, ratios, [note])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(first_batch(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    else:
        main("--dry" in sys.argv)
