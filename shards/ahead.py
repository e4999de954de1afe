"""What a rank reads next of a remote set is fetched into the node's cache beforehand, by a process beside the rank.

The order says which chunks come; the process walks it as far ahead as the cache has room among what is used sooner.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from shards.errors import ShardError
from shards.images import ImageSet, Reading

_AT_ONCE = 8  # fetches of one rank
_PAUSE_SECONDS = 0.2
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def fetched_ahead(images: ImageSet, reading: Reading, rank: int, end: int) -> Iterator[Callable[[int], None]]:
    """Fetch what `rank` reads from reading.sample up to sample `end` while the block runs, which is given a function to
    say at which sample it is. Makes `images` know its readers."""
    images.reading = reading
    context = multiprocessing.get_context("fork")
    position = context.Value("q", reading.sample, lock=False)

    def tell(sample: int) -> None:
        position.value = sample

    walker = context.Process(target=_walk, args=(images, reading, rank, end, position, os.getpid()), daemon=True)
    walker.start()
    try:
        yield tell
    finally:
        walker.kill()  # it holds nothing that a kill could hurt
        walker.join()


def _walk(images: ImageSet, reading: Reading, rank: int, end: int, position: Any, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        _fetch_all(images, reading, rank, end, position, parent)
    except ShardError as error:  # whoever needs what cannot be fetched ends the run with the same words
        _log.warning("fetching ahead ends: %s", error)
    finally:
        os._exit(0)


def _fetch_all(images: ImageSet, reading: Reading, rank: int, end: int, position: Any, parent: int) -> None:
    """Chunk by chunk in the order of their first use, several at once."""

    def over() -> bool:
        reading.sample = position.value
        return os.getppid() != parent

    pending: set[Future[None]] = set()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start, chunks in reading.order.ahead(reading.sample, rank, reading.world):
            if start >= end:
                break
            for shard, number in zip(chunks.shards.tolist(), chunks.numbers.tolist(), strict=True):
                if len(pending) >= _AT_ONCE:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                if over():
                    os._exit(0)
                pending.add(pool.submit(_fetch, images.fetcher(shard, number), start, over))
        for future in pending:
            future.result()


def _fetch(fetch: Callable[[float], bool], start: int, over: Callable[[], bool]) -> None:
    """Fetch a chunk, waiting for room until somebody has gone on."""
    while not fetch(start):
        if over():
            return
        time.sleep(_PAUSE_SECONDS)
