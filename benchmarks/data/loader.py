"""CPU time an image: our stream against other loaders, BEiT's data path, and the bare decode + crop + resize loop.

Every path shows the same boxes and flips, those of our recorded views, in uint8 batches; each runs on one core with
its workers, in a process of its own (loader_peers), in turn with the others, round after round. Peers that leave
decoding to their users have our decode. What does not install on a machine has a row that says so (./launch.sh setup
loader_peers).
"""

import contextlib
import functools
import io
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beitforge.shards.errors import ShardError
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.view_sources import RecordedViews, Selection
from benchmarks.data import official_path
from benchmarks.data.loader_child import Child, PeerFailed, environment, start
from benchmarks.data.loader_corpus import Corpus, corpus, with_fast_regions, write_tokens
from benchmarks.data.loader_peers.equal_work import Cut
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, SIZE, Given, read_given, write_given
from benchmarks.data.views import decibels, draw_photographs
from benchmarks.results import write

WARM, ROUNDS, EPOCH = PREFETCH + 2, 5, 19
IMAGES, IMAGES_DRY = EPOCH * BATCH, 4 * BATCH
LEAST_DECIBELS = 25.0  # a path below does not show the view that it was given
OURS, REGIONS, BARE, FASTEST_PEER = "ours", "ours, --fast-regions shards", "bare loop", "tf.data, fast"
CUT = "decode, crop, clamp, resize, flip"


@dataclass
class Timed:
    """One row: what runs it, and what it does. environment: the peer's, or this one. batches: of a round. exact: its
    pixels are ours to the bit."""

    path: str
    module: str
    variant: str
    does: str
    environment: str = ""
    batches: int = EPOCH
    exact: bool = False
    child: Child | None = None
    micros: list[float] = field(default_factory=list)
    found: str = ""  # its PSNR, or why there are no numbers


def timed_paths() -> list[Timed]:
    """In the order of the table."""
    beit = "PIL decode, jitter of the whole image, flip, own box at 224 and 112, float tensors, mask"
    own, turbo = "decode of the box and resize of its own", "fast DCT, chroma by repetition, bilinear without antialias"
    return [
        Timed(OURS, "ours", "shards-1", f"{CUT}; with order, checksums, tokens, masks, drop path", exact=True),
        Timed(REGIONS, "ours", "shards-regions-1", "the same, of JPEGs with a restart marker at every MCU", exact=True),
        Timed(BARE, "ours", "bare", "decode, crop, resize; bytes in memory, no other process, no loader"),
        Timed("webdataset, our decode", "webdataset", "ours", f"{CUT} to a uint8 batch", exact=True),
        Timed("litdata, our decode", "litdata", "ours", CUT, "litdata", exact=True),
        Timed("mosaicml-streaming, our decode", "mosaicml", "ours", CUT, "mosaicml", exact=True),
        Timed("grain, our decode", "grain", "ours", CUT, "grain", exact=True),
        Timed("HF datasets, our decode", "hf_datasets", "ours", CUT, "hf_datasets", exact=True),
        Timed("DALI, linear", "dali", "linear", f"{own}, bilinear without antialias; flip", "dali"),
        Timed("DALI, cubic", "dali", "cubic", f"{own}, bicubic with antialias; flip", "dali"),
        Timed("tf.data, accurate", "tf_data", "accurate", f"{own}, bicubic with antialias; flip", "tf_data"),
        Timed(FASTEST_PEER, "tf_data", "fast", f"{own}: {turbo}; flip", "tf_data"),
        Timed("FFCV", "ffcv", "jpg", "its own JPEGs of quality 90, whole decode, area resize; flip", "ffcv"),
        Timed("webdataset, Pillow", "webdataset", "pillow", "Pillow's decode, crop, bicubic resize; flip"),
        Timed("BEiT, from files", "beit", "files", beit, batches=4),
        Timed("BEiT, plain webdataset", "beit", "webdataset", beit, batches=4),
    ]


def one_view(collection: Corpus) -> Path:
    """A token set that has one view of each image, so that every epoch shows the same."""
    tokens = collection.shards.parent / "peers" / f"view of {collection.shards.name}"
    if not tokens.exists():
        write_tokens(collection.shards, tokens, num_views=1)
    return tokens


def given_views(collection: Corpus) -> Path:
    """Those views in a file for the children."""
    folder, tokens = collection.shards.parent, one_view(collection)
    file = folder / "peers" / "views.npz"
    images = ImageSet(collection.shards)
    source, parts = RecordedViews(images, tokens), []
    for shard in range(len(images.manifest.shards)):
        index = images.index(shard)
        rows = np.arange(len(index))
        shards, sizes = np.full_like(rows, shard), (index.width.astype(np.int64), index.height.astype(np.int64))
        picked = Selection(
            0 * rows, shards, rows, index.key_hash, sizes, index.mean_grey, functools.partial(getattr, index, "greys")
        )
        views, _ = source.views(picked)
        numbers = np.array([index.key(row) for row in range(len(index))], np.int64)
        flips, limits = views.flips.astype(bool), views.levels[:, :2].astype(np.int64)
        parts.append((numbers, views.boxes.astype(np.int64), flips, limits, np.stack(sizes, 1), index.flags))
    numbers, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    in_order = np.argsort(numbers)
    assert np.array_equal(numbers[in_order], np.arange(len(numbers))), "keys are the images' numbers"
    write_given(file, Given(folder, *(column[in_order] for column in columns)))
    return file


def by_pillow(given: Given, number: int, clamped: bool) -> np.ndarray:
    """The reference: Pillow's pixels of a view, u8 [3, SIZE, SIZE]; clamped to its levels before the resize."""
    x, y, width, height = given.boxes[number].tolist()
    image = Image.open(io.BytesIO(given.data(number))).convert("RGB").crop((x, y, x + width, y + height))
    if clamped:
        image = Image.fromarray(np.array(image).clip(*given.limits[number].tolist()).astype(np.uint8))
    pixels = np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (pixels[:, ::-1] if given.flips[number] else pixels).transpose(2, 0, 1)


def quality(path: Timed, given: Given) -> str:
    """PSNR of its first batches against the reference, of all the pixels. Raises PeerFailed where they are others."""
    assert path.child is not None, "asked of what runs"
    if path.child.shown is None:
        return "own views"
    pixels, numbers = path.child.shown
    cut, bare = Cut(given), path.path == BARE
    if bare:  # what it leaves out is in its row
        pixels = np.stack(
            [found[..., ::-1] if given.flips[n] else found for found, n in zip(pixels, numbers, strict=True)]
        )
    if path.exact:
        same = [
            np.array_equal(found, cut.image(number, given.data(number)).numpy())
            for found, number in zip(pixels, numbers.tolist(), strict=True)
        ]
        assert all(same), f"{path.path} gives other pixels than our cut"
    errors = [
        np.square(found.astype(float) - by_pillow(given, number, clamped=path.exact)).mean()
        for found, number in zip(pixels, numbers.tolist(), strict=True)
    ]
    found = decibels(float(np.mean(errors)))
    if found < LEAST_DECIBELS:
        raise PeerFailed(f"wrong: {found:.1f} dB")
    return f"{found:.1f}" if max(errors) else "equal"


@contextlib.contextmanager
def running(paths: list[Timed], file: Path, given: Given, core: str) -> Iterator[list[Timed]]:
    """Those of the paths that start here and show their views."""
    try:
        for path in paths:
            try:
                path.child = start(path.module, path.variant, environment(path.environment), file, core)
                path.found = quality(path, given)
            except PeerFailed as error:
                drop(path, error)
            print(f"{path.path}: {path.found}", file=sys.stderr, flush=True)
        yield [path for path in paths if path.child]
    finally:
        for path in paths:
            if path.child:
                path.child.end()


def drop(path: Timed, error: PeerFailed) -> None:
    """A peer that fails has a row that says so; what is ours must not."""
    if not path.environment:
        raise error
    if path.child:
        path.child.end()
    path.child, path.found, path.micros = None, str(error), []


def measure(paths: list[Timed], rounds: int) -> None:
    """CPU µs an image, each path in turn, round after round."""
    for _ in range(rounds):
        for path in paths:
            if path.child is None:
                continue
            try:
                spent = path.child.ask(f"{WARM} {path.batches}\n")
            except PeerFailed as error:
                drop(path, error)
                continue
            path.micros.append(1e6 * spent["cpu"] / (path.batches * BATCH))


def row(path: Timed) -> dict:
    micros = path.micros or [float("nan")]
    middle = float(np.median(micros))
    cells = (
        {"CPU µs an image": round(middle), "least": round(min(micros)), "most": round(max(micros))}
        if path.micros
        else {}
    )
    found = {"path": path.path, "what it does": path.does, "PSNR dB": path.found}
    return {
        **found,
        **dict.fromkeys(("CPU µs an image", "least", "most"), ""),
        **cells,
        "images/s": 1e6 / middle if path.micros else "",
    }


def ratios(paths: list[Timed]) -> dict[str, float]:
    """Medians over the rounds of what was measured in turn; above 1: ours takes less CPU."""
    micros = {path.path: np.array(path.micros) for path in paths if path.micros}
    found = {f"ours / {name}": float(np.median(other / micros[OURS])) for name, other in micros.items() if name != OURS}
    if REGIONS in micros:
        del found[f"ours / {REGIONS}"]
        for name in (OURS, FASTEST_PEER):
            if name in micros:
                found[f"{REGIONS} / {name}"] = float(np.median(micros[name] / micros[REGIONS]))
    return found


def workers(file: Path, given: Given, rounds: int, count: int) -> dict[str, float]:
    """Wall time of one worker on all cores, over that of two."""
    paths = [Timed(name, "ours", f"shards-{name}", "", exact=True) for name in ("1", "2")]
    with running(paths, file, given, "any") as both:
        walls = [[path.child.ask(f"{WARM} {count}\n")["wall"] for path in both if path.child] for _ in range(rounds)]
    return {"2 workers / 1 worker": float(np.median([one / two for one, two in walls]))}


def main(dry: bool) -> None:
    """All paths on the last core in turn, then one and two workers on all cores."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # children are ended by whoever started them
    for draw in draw_photographs(1):
        official_path.check(draw)
    rounds = 1 if dry else ROUNDS
    collection = corpus(IMAGES_DRY if dry else IMAGES)
    file = given_views(collection)
    given = read_given(file)
    paths = timed_paths()
    try:
        one_view(with_fast_regions(collection))
    except ShardError as error:
        next(path for path in paths if path.path == REGIONS).found = str(error)
    if dry:
        for path in paths:
            path.batches = 1
    with running([path for path in paths if not path.found], file, given, str(max(os.sched_getaffinity(0)))) as started:
        measure(started, rounds)
    found = ratios(paths) | workers(file, given, rounds, 1 if dry else EPOCH)
    rows = [row(path) for path in paths]
    if dry:
        print(*rows, found, sep="\n")
        return
    note = (
        f"{collection.describe()} Batch {BATCH}, uint8 [64, 3, 224, 224] given to a consumer on the worker's core; CPU "
        f"time of consumer, workers and threads, medians of {rounds} rounds in turn, of times and of their ratios; "
        "images/s are those of a whole core. Every path shows the boxes and flips of our recorded views, but BEiT's, "
        "which draw their own. PSNR: of four batches against Pillow's decode, crop and bicubic resize, clamped where "
        "the path clamps (our work for the jitter on the GPU, which no peer needs). With our decode: the peer's format "
        "and loader, our decode and cut called by its transform, equal to ours to the bit. FFCV packs JPEGs anew."
    )
    write("loader", "how much CPU does an image cost, and how many a second does a core load?", rows, found, [note])


if __name__ == "__main__":
    main("--dry" in sys.argv)
