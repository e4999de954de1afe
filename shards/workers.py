"""Whole shards spread over processes: progress per image, Ctrl-C ends cleanly, no orphans after kill -9."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from beitforge.shards.errors import ShardError
from beitforge.shards.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")
Beat = Callable[[int], None]

_POLL_SECONDS = 0.2


class Stopped(ShardError):
    """Raised inside a worker by its beat when the main process has given up."""


class _Channel:
    """What a worker process shares with the main one: units done, and whether to stop. Set once, by `_start`."""

    done: Any = None
    stop: Any = None


def each_shard(
    work: Callable[[Job, Beat], Result], jobs: Iterable[Job], num_workers: int, progress: Progress
) -> Generator[Result, None, None]:
    """Yield `work(job, beat)` of every job as it ends, in no particular order, advancing `progress` by the beats.

    With one worker in this process, else in `num_workers` spawned ones: then `work` must be a module's function, jobs
    and results picklable, and the running script guarded by `if __name__ == "__main__"`. `work` calls `beat(count)`
    often; it is also where a worker learns that it should stop. What `work` raises is raised here. Close the iterator
    (contextlib.closing) to stop early.
    """
    if num_workers <= 1:
        for job in jobs:
            yield work(job, progress.advance)
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start, initargs=(done, stop))
    try:
        yield from _drain(pool, work, iter(jobs), num_workers, done, progress)
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process was killed (out of memory?): run the same command again, with fewer --workers"
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


def _drain(
    pool: ProcessPoolExecutor,
    work: Callable[[Job, Beat], Result],
    jobs: Iterator[Job],
    num_workers: int,
    done: Any,
    progress: Progress,
) -> Iterator[Result]:
    pending: set[Future[Result]] = set()
    seen = 0
    while True:
        for job in itertools.islice(jobs, 2 * num_workers - len(pending)):
            with _interrupts_held():
                pending.add(pool.submit(_call, work, job))
        ended, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
        now = done.value
        progress.advance(now - seen)
        seen = now
        for future in ended:
            yield future.result()
        if not pending and not ended:
            return


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT back; processes started meanwhile then never see the terminal's Ctrl-C, the main one tells them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(done: Any, stop: Any) -> None:
    _Channel.done, _Channel.stop = done, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is always a child"
    wait_for([parent.sentinel])
    os._exit(1)


def _beat(count: int) -> None:
    if _Channel.stop.value:
        raise Stopped("stopped")
    with _Channel.done.get_lock():
        _Channel.done.value += count


def _call(work: Callable[[Job, Beat], Result], job: Job) -> Result:
    return work(job, _beat)


@contextlib.contextmanager
def in_megabytes(beat: Beat, size: int) -> Iterator[Beat]:
    """Turn a beat that counts MiB into one that is told bytes; at the end it has counted all of a file's `size`."""
    read = 0

    def tell(num_bytes: int) -> None:
        nonlocal read
        before, read = read >> 20, min(read + num_bytes, size)
        beat((read >> 20) - before)

    yield tell
    beat((size >> 20) - (read >> 20))
