"""What a rank reads next of a remote set is fetched into the node's cache beforehand, by a process beside the rank.

The order says which chunks come; the process walks it as far ahead as the cache has room among what is used sooner.
"""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from beitforge.shards.errors import ShardError
from beitforge.shards.stream.image_set import ImageSet, Reading

_AT_ONCE = 8  # fetches of one rank
_POLL_SECONDS = 0.2
_AGAIN_SECONDS = 10.0  # after which room is looked for again though nobody has gone on, and a failing store asked again
_PR_SET_PDEATHSIG = 1
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

    walker = context.Process(target=_run, args=(_Walk(images, reading, rank, end, position), os.getpid()), daemon=True)
    walker.start()
    try:
        yield tell
    finally:
        walker.kill()  # it holds nothing that a kill could hurt
        walker.join()


def _run(walk: "_Walk", parent: int) -> None:
    """The process: ends with its parent, and leaves stopping to it."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    code = 1
    try:
        if os.getppid() == parent:
            walk.all()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Walk:
    """Where one rank's fetching stands. `position`: the sample that the rank is at, which it writes."""

    def __init__(self, images: ImageSet, reading: Reading, rank: int, end: int, position: Any):
        self.images, self.reading, self.rank, self.end, self.position = images, reading, rank, end, position
        self.waiting = threading.Lock()  # one thread looks for room

    def all(self) -> None:
        """Window by window, several chunks at once; a store that fails is asked again later, and whoever needs what it
        does not give ends the run with its words."""
        complained = False
        while self.now() < self.end:
            try:
                self._fetch_from(self.now())
                return
            except ShardError as error:
                if not complained:
                    _log.warning("fetching ahead waits: %s", error)
                complained = True
                time.sleep(_AGAIN_SECONDS)

    def now(self) -> int:
        self.reading.sample = self.position.value
        return self.reading.sample

    def _fetch_from(self, sample: int) -> None:
        pending: set[Future[None]] = set()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start, chunks in self.reading.order.ahead(sample, self.rank, self.reading.world):
                if start >= self.end:
                    break
                for shard, number in zip(chunks.shards.tolist(), chunks.numbers.tolist(), strict=True):
                    if len(pending) >= _AT_ONCE:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                    self.now()
                    pending.add(pool.submit(self._fetch, self.images.fetcher(shard, number), start))
            for future in pending:
                future.result()

    def _fetch(self, fetch: Callable[[float], bool], start: int) -> None:
        """Fetch a chunk. Where there is no room, wait until the rank has gone on: what it read then makes some."""
        while not fetch(start):
            with self.waiting:
                seen, until = self._window(), time.monotonic() + _AGAIN_SECONDS
                while self._window() == seen and time.monotonic() < until:
                    time.sleep(_POLL_SECONDS)

    def _window(self) -> tuple[int, int]:
        """Epoch and window that the rank is in."""
        policy = self.reading.order.policy
        epoch, position = divmod(self.now(), self.reading.order.samples)
        return epoch, position // (policy.chunk * policy.window * policy.lanes)
