"""What do `pack --fast-regions` and its splicing save a crop, and what do they cost?

The loader benchmark's images and the same ones rewritten: crops of their recorded views, and whole batches of the
stream, on one core in turn, round after round. And images stored as progressive JPEGs, which most of the web's are.
"""

import io
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from beitforge.shards.decode import codec, regions
from beitforge.shards.decode.jpegtran import with_fast_regions
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Stream, load
from beitforge.shards.stream.order import RankBatches
from benchmarks.data import loader_corpus
from benchmarks.data.decoders import Crop, recorded
from benchmarks.data.loader_peers.ours import ENDLESS, our_stream
from benchmarks.results import write

Run = Callable[[], float]

IMAGES, ROUNDS, BATCH, PROGRESSIVE = 256, 7, 64, 64


def main() -> None:
    """Microseconds of CPU an image, in the median of the rounds; ratios are of what was measured side by side."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    plain = loader_corpus.corpus(IMAGES)
    fast = loader_corpus.with_fast_regions(plain)
    kept, spliced = recorded(ImageSet(plain.shards)), recorded(ImageSet(fast.shards))
    slow = [progressive(crop) for crop in kept[:PROGRESSIVE]]
    quick = [made_fast(crop) for crop in slow]
    for one, other in (*zip(kept, spliced, strict=True), *zip(slow, quick, strict=True)):
        assert np.array_equal(codec.decode_view(*one), codec.decode_view(*other)), "fast regions have other pixels"
    streams = [our_stream(one.shards, one.tokens) for one in (plain, fast)]
    both = (stream.batch(np.arange(IMAGES)).tensors() for stream in streams)
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True)), "fast regions make another batch"
    paths = {
        "crop": (crops(kept), crops(spliced)),
        "crop, by simplejpeg": (crops(kept, "simplejpeg"), crops(spliced, "simplejpeg")),
        "crop of a progressive one": (crops(slow), crops(quick)),
        "sample of the stream": (batches(streams[0]), batches(streams[1])),
    }
    spent = measure(paths)
    splicing = [each(spliced, lambda crop: regions.splice(*crop[:3])) for _ in range(ROUNDS)]
    rows = [row(name, *spent[name]) for name in paths]
    ratios = {f"{name}, plain / fast regions": ratio(*spent[name]) for name in paths}
    sizes = [sum(len(crop[0]) for crop in each_of) for each_of in (kept, spliced, slow, quick)]
    parts = [regions.splice(*crop[:3]) for crop in spliced]
    needed = sum(len(part[0]) for part in parts if part) / len(parts)
    ratios["bytes, fast regions / plain"] = sizes[1] / sizes[0]
    ratios["bytes, fast regions / progressive"] = sizes[3] / sizes[2]
    note = f"{plain.describe()} Every crop and batch was compared before it was timed: the same bits. Splicing alone "
    note += f"takes {np.median(splicing):.0f} µs. A crop needs {needed / 1e3:.0f} of the {sizes[1] / IMAGES / 1e3:.0f} "
    note += f"kB that its rewritten image has ({sizes[0] / IMAGES / 1e3:.0f} as it was)."
    write("regions", "what do fast regions save, and cost?", rows, ratios, [note])


def progressive(crop: Crop) -> Crop:
    """The same pixels, nearly, in a progressive JPEG."""
    file = io.BytesIO()
    Image.fromarray(codec.decode(crop[0])).save(file, "JPEG", quality=90, progressive=True)
    return file.getvalue(), crop[1], crop[2], codec.read_header(file.getvalue()).flags


def made_fast(crop: Crop) -> Crop:
    data, header, _ = with_fast_regions(crop[0], codec.read_header(crop[0]))
    return data, crop[1], crop[2], header.flags


def crops(of: list[Crop], decoder: str = "auto") -> Run:
    return lambda: each(of, lambda crop: codec.decode_view(*crop, decoder))


def each(of: list[Crop], does: Callable[[Crop], object]) -> float:
    """µs of CPU for one of them."""
    began = time.process_time()
    for crop in of:
        does(crop)
    return 1e6 * (time.process_time() - began) / len(of)


def batches(stream: Stream) -> Run:
    """µs of CPU for a sample of the stream: read, checked, decoded, cut and resized, masked."""
    numbers = RankBatches(0, BATCH, BATCH, 0, 1, ENDLESS)
    loaded = load(stream, numbers, workers=0, prefetch=2, pin=False)

    def run() -> float:
        began = time.process_time()
        for _ in range(IMAGES // BATCH):
            next(loaded)
        return 1e6 * (time.process_time() - began) / IMAGES

    return run


def measure(
    paths: dict[str, tuple[Callable[[], float], Callable[[], float]]],
) -> dict[str, tuple[list[float], list[float]]]:
    """What each of two ways of every path spent in each round."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in paths}
    for _ in range(ROUNDS):
        for name, ways in paths.items():
            for way, spent in zip(ways, found[name], strict=True):
                spent.append(way())
    return found


def ratio(one: list[float], other: list[float]) -> float:
    return float(np.median(np.divide(one, other)))


def row(name: str, plain: list[float], fast: list[float]) -> dict:
    found = {"CPU µs": name, "plain": round(float(np.median(plain))), "fast regions": round(float(np.median(fast)))}
    return {**found, "plain / fast regions": ratio(plain, fast)}


if __name__ == "__main__":
    main()
