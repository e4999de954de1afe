"""Images/s of two workers where every read of the disk takes a while, over the rate where none does.

The delay is injected into os.pread. With "cold" it meets every image and every row of tokens, as of a set larger than
memory, and of what is smaller (indexes, records of views) each page that the process has not read before; with "no page
cache" it meets every read, of which a sample takes about eleven: its image, its tokens and the parts of its record.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from beitforge.shards.stream import read_ahead
from beitforge.shards.stream.loader import Stream, load
from beitforge.shards.stream.order import RankBatches
from benchmarks.data.loader import BATCH, IMAGES, IMAGES_DRY, PREFETCH
from benchmarks.data.loader_corpus import corpus
from benchmarks.data.loader_peers.ours import our_stream
from benchmarks.results import write

DELAYS = (0, 1, 5, 20)  # ms
WORKERS, ROUNDS = 2, 3
WARM, TIMED, TIMED_ALONE = 12, 48, 6  # batches; of those without look-ahead fewer, they are slow
_PAGE, _LARGE = 12, 256  # bits of a page's address; bytes from which on a read is an image or a row of tokens

Pread = Callable[[int, int, int], bytes]


def delayed(real: Pread, seconds: float, cached: bool) -> Pread:
    """os.pread of a disk that takes `seconds` a read of what is not in its page cache."""
    pages: set[tuple[int, int]] = set()

    def pread(descriptor: int, size: int, start: int) -> bytes:
        slow = not cached
        if cached:
            file = os.fstat(descriptor).st_ino
            wanted = {(file, page) for page in range(start >> _PAGE, ((start + size - 1) >> _PAGE) + 1)}
            slow = size >= _LARGE or not wanted <= pages
            pages.update(wanted)
        if slow and seconds:
            time.sleep(seconds)
        return real(descriptor, size, start)

    return pread


@contextmanager
def disk(milliseconds: int, cached: bool, ahead: bool) -> Iterator[None]:
    """Processes forked in the block read such a disk, with look-ahead or without."""
    real, most = os.pread, read_ahead.MOST_THREADS
    os.pread = delayed(real, milliseconds / 1e3, cached)
    read_ahead.MOST_THREADS = most if ahead else 0
    try:
        yield
    finally:
        os.pread, read_ahead.MOST_THREADS = real, most


def rate(stream: Stream, milliseconds: int, cached: bool, ahead: bool, timed: int) -> float:
    """Images/s of the batches behind WARM."""
    with disk(milliseconds, cached, ahead):
        began = 0.0
        numbers = RankBatches(0, BATCH, BATCH, 0, 1, WARM + timed)
        for taken, _ in enumerate(load(stream, numbers, workers=WORKERS, prefetch=PREFETCH, pin=False), 1):
            if taken == WARM:
                began = time.perf_counter()
        return timed * BATCH / (time.perf_counter() - began)


def check(stream: Stream) -> None:
    """No numbers unless what threads read is what is read without them."""
    numbers = RankBatches(0, BATCH, BATCH, 0, 1, 4)
    expected = [stream.batch(numbers[i]) for i in range(4)]
    with disk(2, cached=False, ahead=True):
        for found, wanted in zip(load(stream, numbers, workers=1, prefetch=1, pin=False), expected, strict=True):
            for one, other in zip(found.tensors(), wanted.tensors(), strict=True):
                assert torch.equal(one, other), "read ahead, a batch is another"


def main(dry: bool) -> None:
    torch.set_num_threads(1)
    collection = corpus(IMAGES_DRY if dry else IMAGES)
    stream = our_stream(collection.shards, collection.tokens)
    rounds, timed = (1, 2) if dry else (ROUNDS, TIMED)
    check(stream)
    kinds = [(cached, delay) for cached in (True, False) for delay in DELAYS]
    rates: dict[tuple[bool, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for cached, delay in kinds:
            rates[cached, delay].append(rate(stream, delay, cached, True, timed))
    alone = functools.partial(rate, stream, cached=True, ahead=False, timed=2 if dry else TIMED_ALONE)
    rows, ratios = [], {}
    for cached, delay in kinds:
        name, found = "cold" if cached else "no page cache", rates[cached, delay]
        share = float(np.median(np.array(found) / np.array(rates[cached, 0])))
        without = f"{alone(delay):.0f}" if cached and delay else ""
        row = {"disk": name, "ms a read": delay, "images/s": float(np.median(found)), "over 0 ms": share}
        rows.append({**row, "without look-ahead": without})
        if delay:
            ratios[f"{name}, {delay} ms / 0 ms"] = share
    if dry:
        print(*rows, ratios, sep="\n")
        return
    note = (
        f"Two workers, batch {BATCH}; medians of {rounds} rounds in turn, of rates and of their ratios. The delay is "
    )
    note += (
        "injected into os.pread. Cold: of every image, and of every page of indexes and tokens that the process has "
    )
    note += "not read before. No page cache: of every read, about eleven a sample. What threads read was compared with "
    note += "what is read without them before anything was timed."
    write("slow_storage", "how many images a second does a slow disk leave?", rows, ratios, [note])


if __name__ == "__main__":
    main("--dry" in sys.argv)
