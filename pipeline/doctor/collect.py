"""Findings of all ranks come together at the first, through torch's store and not through collectives: so that a rank
that never started, died or hangs is named instead of waited for.

Every rank shows a sign of life each second from a thread of its own; so does one whose main thread waits for another.
A rank without one is what the others wait for. Must not know model, shards or any stage.
"""

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from beitforge.pipeline.cluster.environment import RankInfo
from beitforge.pipeline.doctor.findings import STOP, Finding

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_SILENT_SECONDS = 12.0
_HEARD_SECONDS = 10.0
LOCAL, FAR = "local", "far"  # the two parts of a rank's results: before it meets the others, and after


class PortInUse(Exception):
    """The port to meet at is in use."""


def connect(place: RankInfo, address: str, port: int, seconds: float) -> dist.TCPStore:
    """The store; the first rank holds it. Raises Taken, or RuntimeError when it cannot be reached in time."""
    limit = datetime.timedelta(seconds=max(1.0, seconds))
    try:
        return dist.TCPStore(address, port, is_master=place.rank == 0, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        if place.rank == 0 and ("EADDRINUSE" in str(error) or "already in use" in str(error)):
            raise PortInUse(str(error)) from error
        raise


@dataclass
class RankReporter:
    """Sends this rank's findings to rank 0. `phase`: what it does now, for when it hangs."""

    place: RankInfo
    host: str
    address: str
    port: int
    until: float
    exit_code: Callable[[int], int]
    phase: str = "starting"
    store: Any = field(init=False)

    def __post_init__(self) -> None:
        self.store = connect(self.place, self.address, self.port, (self.until - time.monotonic()) * 0.45)
        self._beats = connect_again(self.place, self.address, self.port, self.until)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="beat")
        self._thread.start()

    def set_phase(self, phase: str) -> None:
        """What this rank does from here on."""
        self.phase = phase

    def send(self, part: str, content: dict) -> None:
        self.store.set(f"{part}/{self.place.rank}", json.dumps(content))

    def wait_for(self, key: str) -> str:
        """What the first rank says; waits for it as long as there is time."""
        self.store.wait([key], datetime.timedelta(seconds=max(1.0, self.until + 5 - time.monotonic())))
        return self.store.get(key).decode()

    def wait(self) -> None:
        """Until the first rank has the report; then this process ends."""
        self._thread.join()

    def _beat(self) -> None:
        """Signs of life; and the end of this process once the first rank has the report, wherever it is."""
        number = 0
        try:
            while not self._beats.check(["over"]):
                sign = {"host": self.host, "at": self.phase, "number": number, "time": time.time()}
                self._beats.set(f"beat/{self.place.rank}", json.dumps(sign))
                number += 1
                time.sleep(_BEAT_SECONDS)
            code = int(self._beats.get("over"))
            self._beats.set(f"bye/{self.place.rank}", "")
        except (RuntimeError, ValueError):
            code = 2
            if self.place.rank:
                line = (
                    f"error: rank 0 at {self.address}:{self.port} does not answer rank {self.place.rank} on {self.host}"
                )
                print(line, file=sys.stderr, flush=True)
        if self.place.rank:
            os._exit(self.exit_code(code))


def connect_again(place: RankInfo, address: str, port: int, until: float) -> dist.TCPStore:
    """A connection of its own for another thread: one in use by a thread that waits is of no use to others."""
    limit = datetime.timedelta(seconds=max(1.0, until - time.monotonic() + 10))
    return dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)


@dataclass
class _Rank:
    """What the first rank knows of one."""

    host: str
    at: str = ""
    number: int = -1
    changed: float = 0.0
    ahead: float = float("-inf")
    parts: dict[str, dict] = field(default_factory=dict)


class Collector:
    """The first rank's view of all."""

    def __init__(self, store: Any, hosts: list[str], starting: float, until: float):
        """hosts: where each rank should be, '' for unknown. starting: when all must have shown a sign of life, and
        until: when all must have said everything, of time.monotonic()."""
        self.store, self.starting, self.until = store, starting, until
        self.ranks = [_Rank(host) for host in hosts]

    def hosts(self) -> list[str]:
        return [rank.host or "?" for rank in self.ranks]

    def gather(self, part: str) -> list[Finding]:
        """Wait until every rank has sent a part; findings about those that will not."""
        while True:
            self._look(part)
            waiting = [number for number, rank in enumerate(self.ranks) if part not in rank.parts]
            found = [finding for number in waiting if (finding := self._lost(number)) is not None]
            if found or not waiting:
                # others may be about to be found out, too
                return self._all_lost(part, found) if found else []
            time.sleep(_LOOK_SECONDS)

    def _all_lost(self, part: str, found: list[Finding]) -> list[Finding]:
        until = time.monotonic() + 2 * _BEAT_SECONDS
        while time.monotonic() < until:
            self._look(part)
            time.sleep(_LOOK_SECONDS)
        waiting = [number for number, rank in enumerate(self.ranks) if part not in rank.parts]
        return [finding for number in waiting if (finding := self._lost(number)) is not None] or found

    def _look(self, part: str) -> None:
        now = time.monotonic()
        for number, rank in enumerate(self.ranks):
            if part in rank.parts:
                continue
            if self.store.check([f"{part}/{number}"]):
                rank.parts[part] = json.loads(self.store.get(f"{part}/{number}"))
            if self.store.check([f"beat/{number}"]):
                sign = json.loads(self.store.get(f"beat/{number}"))
                if sign["number"] != rank.number:
                    rank.host, rank.at, rank.number, rank.changed = sign["host"], sign["at"], sign["number"], now
                    rank.ahead = max(rank.ahead, sign["time"] - time.time())

    def _lost(self, number: int) -> Finding | None:
        """Why not to wait for a rank any more."""
        rank, now = self.ranks[number], time.monotonic()
        what = ""
        if rank.number < 0 and now > self.starting:
            what = "never started, or cannot reach the first rank"
            cure = "see its own output, and whether its host is up and may connect to the first one (firewall)"
        elif rank.number >= 0 and now - rank.changed > _SILENT_SECONDS:
            what = f"does not answer any more: died or stopped at: {rank.at}"
            cure = "see its own output and the kernel's log (dmesg: out of memory, GPU fell off); or leave the host out"
        elif now > self.until:
            what = f"is alive but stuck, for too long, at: {rank.at}"
            cure = "look there for what it waits for: a file system, a driver, another rank named here"
        if not what:
            return None
        return Finding(level=STOP, check="rank", host=rank.host or "?", rank=number, what=what, cure=cure)

    def release_ranks(self, code: int, lost: set[int]) -> None:
        """Tell every rank the end, and give those that are not lost time to hear it: the store ends with us."""
        self.store.set("over", str(code))
        until = time.monotonic() + _HEARD_SECONDS
        others = [f"bye/{number}" for number in range(1, len(self.ranks)) if number not in lost]
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until and not all(self.store.check([key]) for key in others):
                time.sleep(_LOOK_SECONDS)
