"""Ends a process that has made no progress for too long, so that the launcher ends the run and it can start again.

A rank that hangs (stopped, swapped out, its node gone) leaves the others in a collective for as long as that may wait.
Must not know torch, model, shards or any stage.
"""

import faulthandler
import os
import re
import socket
import sys
import threading
import time
from types import TracebackType

from beitforge.pipeline.cluster.error_reporting import doing

EXIT_HUNG = 74  # EX_IOERR: nothing happened for too long; start again to go on from the newest checkpoint
_FIRST = 3  # times as long for the first of a kind of work: kernels are compiled, caches are cold
_GRACE = 30.0  # seconds after which a process whose own thread cannot run is ended from outside the interpreter


def longest(seconds: float) -> float:
    """The longest that a watchdog of `seconds` ever waits."""
    return _FIRST * seconds + _GRACE


class Watchdog:
    """Ends the process when `beat` is not called for `seconds` (0: never). To be used in a with statement."""

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        # what is done, since when, and how long it may take: replaced whole, since a thread looks at it at any moment
        self._now = ("the start", time.monotonic(), _FIRST * seconds)
        self._seen: set[str] = set()
        self._done = threading.Event()

    def beat(self, what: str, anew: bool = False) -> None:
        """Something has been done; `what` comes next. Work whose words but for numbers are new ("step 0", but then not
        "step 1") may take three times as long, and so may what is done `anew`."""
        kind = re.sub(r"\d+", "", what)
        self._begin(what, anew or kind not in self._seen)
        self._seen.add(kind)
        doing(what)

    def _begin(self, what: str, first: bool) -> None:
        limit = self.seconds * (_FIRST if first else 1)
        self._now = (what, time.monotonic(), limit)
        if self.seconds:
            faulthandler.dump_traceback_later(limit + _GRACE, exit=True, file=sys.__stderr__ or sys.stderr)

    def __enter__(self) -> "Watchdog":
        self._begin("the start", True)
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            what, since, limit = self._now
            waited = time.monotonic() - since
            if waited > limit:
                host = socket.gethostname()
                print(
                    f"error: rank {self.rank} on {host} stands still: {what} for {waited:.0f} s, more than "
                    f"faults.hang_seconds allows; ending it, start again to go on from the newest checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_HUNG)
