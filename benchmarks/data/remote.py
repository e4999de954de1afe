"""Images/s of a worker on a set behind a network, over those on the same set in a folder.

HTTP and S3 through a proxy that answers after 50 ± 20 ms and misbehaves: errors, resets, answers that are cut, short or
damaged. Servers, proxy and the process that fetches ahead share a core, the worker and the consumer have one of their
own, which is what a node beside a store has. Every round begins with an empty cache, and what is timed lies in the
first epoch: each chunk is fetched while the worker reads those before it.
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fsspec.config import conf

from beitforge.pipeline.config.settings import Mask, Model
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.shards.format.index import index_path
from beitforge.shards.format.manifest import read_image_manifest, read_token_manifest, write_manifest
from beitforge.shards.format.tokens import token_path
from beitforge.shards.storage import remote
from beitforge.shards.storage.cache import Cache
from beitforge.shards.stream.image_set import ImageSet, Reading
from beitforge.shards.stream.loader import Stream, load
from beitforge.shards.stream.order import Order, OrderPolicy, RankBatches
from beitforge.shards.stream.prefetch import fetched_ahead
from beitforge.shards.stream.view_sources import RecordedViews
from benchmarks.data.loader import BATCH, IMAGES, IMAGES_DRY, PREFETCH
from benchmarks.data.loader_corpus import FOLDER, Corpus, corpus
from benchmarks.results import write
from tests.shards.storage.servers import Faults, faulty, http_server, s3_server

TIMES, WARM, ROUNDS = 4, 16, 3
ORDER = OrderPolicy(chunk=32, window=1, lanes=8)  # windows of 256 samples, so that an epoch has many
FAULTS = Faults(
    seed=5, error=0.02, reset=0.02, truncate=0.02, shorten=0.02, corrupt=0.02, slow=0.02, latency=(0.05, 0.02)
)
Core = set[int]


def repeated(source: Corpus) -> Path:
    """A folder with `shards` and `tokens`: the corpus several times over, each shard linked under other names."""
    folder = FOLDER / f"remote-{TIMES}-{source.shards.parent.name}"
    images, tokens = read_image_manifest(source.shards), read_token_manifest(source.tokens)
    names = [f"shard-{number:06d}" for number in range(TIMES * len(images.shards))]
    listed = replace(
        images, shards=[replace(s, name=n) for s, n in zip(TIMES * list(images.shards), names, strict=True)]
    )
    if not folder.exists() or read_image_manifest(folder / "shards") != listed:
        shutil.rmtree(folder, ignore_errors=True)
        for where in ("shards", "tokens"):
            (folder / where).mkdir(parents=True)
        for old, new in zip(TIMES * [shard.name for shard in images.shards], names, strict=True):
            os.link(source.shards / f"{old}.tar", folder / "shards" / f"{new}.tar")
            os.link(index_path(source.shards, old), index_path(folder / "shards", new))
            os.link(token_path(source.tokens, old), token_path(folder / "tokens", new))
        entries = [replace(s, name=n) for s, n in zip(TIMES * list(tokens.shards), names, strict=True)]
        write_manifest(folder / "tokens", replace(tokens, shards=entries))
        write_manifest(folder / "shards", listed)
    return folder


def stream_of(root: str, cache: Cache | None) -> Stream:
    images = ImageSet(f"{root}/shards", cache, ORDER.chunk)
    return Stream(
        images=images,
        places=Order(images.manifest.counts, ORDER),
        source=RecordedViews(images, f"{root}/tokens", cache),
        size=(224, 224),
        draw=functools.partial(sample_draws, Mask(), Model(), 0),
    )


@contextlib.contextmanager
def web(folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    with http_server(folder) as url, faulty(url, FAULTS) as found:
        yield found


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    with s3_server(folder, "images") as url, faulty(url, FAULTS) as (endpoint, counts):
        known, before = {"key": "test", "secret": "test", "endpoint_url": endpoint}, conf.get("s3")
        conf["s3"] = {**known, "client_kwargs": {"region_name": "us-east-1"}}
        try:
            yield "s3://images", counts
        finally:
            conf.pop("s3") if before is None else conf.update(s3=before)


def rate(root: str, batches: int, own: Core, others: Core) -> tuple[float, int]:
    """Images/s of the batches behind WARM, and a hash of all pixels."""
    numbers, seen, began = RankBatches(0, BATCH, BATCH, 0, 1, batches), 0, 0.0
    with contextlib.ExitStack() as stack:
        cache = None
        if remote.is_url(root):
            cache = Cache(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=FOLDER))) / "cache", 8 << 30)
        stream = stream_of(root, cache)
        tell: Callable[[int], None] = lambda _: None  # noqa: E731
        if cache is not None:
            assert isinstance(stream.places, Order), "training's"
            reading = Reading(stream.places, range(1), 1, 0)
            tell = stack.enter_context(fetched_ahead(stream.images, reading, 0, batches * BATCH))
        os.sched_setaffinity(0, own)
        try:
            for taken, batch in enumerate(load(stream, numbers, workers=1, prefetch=PREFETCH, pin=False), 1):
                assert not batch.bad, "a network damages no image"
                tell(int(batch.samples[0]))
                seen = hash((seen, int(batch.pixels.sum()), int(batch.tokens.sum())))
                if taken == WARM:
                    began = time.perf_counter()
            return (batches - WARM) * BATCH / (time.perf_counter() - began), seen
        finally:
            os.sched_setaffinity(0, others)


def main(dry: bool) -> None:
    torch.set_num_threads(1)
    folder = repeated(corpus(IMAGES_DRY if dry else IMAGES))
    batches = (IMAGES_DRY if dry else IMAGES) * TIMES // BATCH
    batches, rounds = (WARM + 4, 1) if dry else (batches, ROUNDS)
    cores = os.sched_getaffinity(0)
    own = {max(cores)}
    others = cores - own or own
    rates: dict[str, list[float]] = {"folder": [], "HTTP": [], "S3": []}
    os.sched_setaffinity(0, others)
    with web(folder) as (url, met_web), bucket(folder) as (store, met_store):
        roots = {"folder": str(folder), "HTTP": url, "S3": store}
        pixels = set()
        for _ in range(rounds):
            for name, root in roots.items():
                found, seen = rate(root, batches, own, others)
                rates[name].append(found)
                pixels.add(seen)
        assert len(pixels) <= 1, "a network gives other batches"
        met = {"folder": {}, "HTTP": met_web(), "S3": met_store()}
    os.sched_setaffinity(0, cores)
    rows, ratios = [], {}
    for name, found_ in rates.items():
        share = float(np.median(np.array(found_) / np.array(rates["folder"])))
        faults = sum(count for kind, count in met[name].items() if kind != "requests")
        row = {"set": name, "images/s": float(np.median(found_)), "over the folder": share}
        rows.append({**row, "requests": met[name].get("requests", ""), "faults met": faults if met[name] else ""})
        if met[name]:
            ratios[f"{name} / folder"] = share
    if dry:
        print(*rows, ratios, sep="\n")
        return
    note = (
        f"One worker and the consumer on a core of their own, batch {BATCH}; servers, proxy and the fetching process "
    )
    note += (
        f"on the rest. The proxy answers after 50 ± 20 ms and harms 12 % of its answers. Medians of {rounds} rounds "
    )
    note += f"in turn, each with an empty cache, of the batches behind the first {WARM} of one epoch of {TIMES} × "
    note += f"{IMAGES} images; every round gave the same batches, and no image was called bad."
    write("remote", "how many images a second does a network leave?", rows, ratios, [note])


if __name__ == "__main__":
    main("--dry" in sys.argv)
