"""The reads of the next batch, made by threads while this one is decoded: where storage is slow, and only there.

A worker that reads and decodes in turn waits for every read. On a disk whose reads take no time threads cost more than
they save, so what is waited for is measured, and the rule below says whether there are threads and how many. What is
read, in which order it is given and what it raises do not depend on that.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Name = TypeVar("Name")
Places = TypeVar("Places", bound=Sequence)
Found = TypeVar("Found")

MOST_THREADS = 64  # of a process
THREAD = "reads ahead"
_LEAST_THREADS = 4
_SLOW, _FAST = 0.15, 0.05  # waiting over other work: from where on threads pay, and below which they cost
_STALLED = 0.02  # waiting for threads over other work: more, and there are too few
_UNKNOWN = 1e-3  # seconds a sample that other work is taken to need before it was measured
_LOOK = 8  # samples after which a batch that is read here is looked at
_TRIES = 16, 1024  # batches to the next look whether reads have become fast: at first, and at most


@dataclass
class Rule:
    """How many threads read ahead, 0 where none do. Times are seconds a sample: `waited` for its reads, `other` on what
    else is done with it.

    Threads wait for each other, too, so what they wait for says only whether reads may have become fast. Then one batch
    is read without them now and then (`tries`), and that decides.
    """

    threads: int = 0
    tries: bool = False
    _gap: int = _TRIES[0]
    _since: int = 0

    def is_slow(self, waited: float, other: float) -> bool:
        """Whether threads pay, of what was read without them."""
        return waited > _SLOW * other

    def read_here(self, waited: float, other: float) -> None:
        """A batch, or the beginning of one, was read without threads."""
        self.tries, self._since = False, 0
        if self.is_slow(waited, other):
            wanted = int(1.5 * waited / max(other, 1e-6)) + 1
            self.threads = max(self.threads, min(MOST_THREADS, max(_LEAST_THREADS, wanted)))
            self._gap = _TRIES[0]
        elif waited < _FAST * other:
            self.threads, self._gap = 0, _TRIES[0]
        else:
            self._gap = min(2 * self._gap, _TRIES[1])

    def read_ahead(self, waited: float, stalled: float, other: float) -> None:
        """A batch was read by threads, for which `stalled` was waited."""
        if stalled > _STALLED * other:
            self.threads = min(MOST_THREADS, 2 * self.threads)
        self._since += 1
        self.tries = waited < other and self._since >= self._gap


class ReadAhead(Generic[Name, Places, Found]):
    """Reads batches by number or other name, each in order. A fork starts without: it has none of these threads."""

    def __init__(self, places: Callable[[Name], Places], read: Callable[[Any], Found]):
        """places: of a batch's samples. read: may be called by any thread."""
        self.rule = Rule()
        self._places, self._read = places, read
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running = 0
        self._ready: tuple[Name, Places, list[Future[tuple[Found, float]]]] | None = None
        self._left: float | None = None
        self._process = os.getpid()

    def batch(self, name: Name, coming: Name | None) -> tuple[Places, list[Found]]:
        """The places of a batch and what is found there; the batch that is asked for next is `coming`. Raises what
        `read` raises for the first place that it fails at."""
        if self._process != os.getpid():
            self.__init__(self._places, self._read)  # type: ignore[misc]
        entered, (ready, self._ready) = time.perf_counter(), (self._ready, None)
        if ready is not None and ready[0] == name:
            _, places, futures = ready
        else:
            places, futures = self._places(name), []
        each = max(1, len(places))
        other = _UNKNOWN if self._left is None else (entered - self._left) / each
        found: list[Found] = []
        if not futures:
            waited = self._read_here(places, found, other)
            if len(found) == len(places):
                self.rule.read_here(waited / each, other)
            else:
                futures = [self._later(place) for place in places[len(found) :]]
        if coming is not None and self.rule.threads and not self.rule.tries:
            others = self._places(coming)
            self._ready = coming, others, [self._later(place) for place in others]
        if futures:
            began = time.perf_counter()
            results = [future.result() for future in futures]
            found += [value for value, _ in results]
            waited = sum(seconds for _, seconds in results) / len(results)
            self.rule.read_ahead(waited, (time.perf_counter() - began) / each, other)
        self._left = time.perf_counter()
        return places, found

    def close(self) -> None:
        """End the threads, which nobody waits for."""
        self._ready = None
        for _ in range(self._running):
            self._jobs.put(None)

    def _read_here(self, places: Sequence, found: list[Found], other: float) -> float:
        """Read as many as shows whether threads pay, or all; the seconds waited."""
        waited = 0.0
        for place in places:
            value, seconds = _timed(self._read, place)
            found.append(value)
            waited += seconds
            if len(found) % _LOOK == 0 and self.rule.is_slow(waited / len(found), other):
                self.rule.read_here(waited / len(found), other)
                if self.rule.threads:
                    break
        return waited

    def _later(self, place: Any) -> "Future[tuple[Found, float]]":
        future: Future[tuple[Found, float]] = Future()

        def job() -> None:
            try:
                future.set_result(_timed(self._read, place))
            except BaseException as error:  # for whoever asks for the result
                future.set_exception(error)

        self._jobs.put(job)
        while self._running < self.rule.threads:
            threading.Thread(target=_work, args=(self._jobs,), name=THREAD, daemon=True).start()
            self._running += 1
        return future


def _timed(read: Callable[[Any], Found], place: Any) -> tuple[Found, float]:
    """What is read, and for how many seconds this thread had nothing to do meanwhile."""
    began, worked = time.perf_counter(), time.thread_time()
    found = read(place)
    return found, (time.perf_counter() - began) - (time.thread_time() - worked)


def _work(jobs: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    """A thread's life, which knows nothing of who made it."""
    while (job := jobs.get()) is not None:
        job()
