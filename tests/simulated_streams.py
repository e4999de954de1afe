"""Streams and events of the simulated GPU: who is behind whom, and nothing that takes time."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

EVERY: "weakref.WeakSet[Stream]" = weakref.WeakSet()


class Stream:
    """A stream: a number for everything issued on it, and how far it is behind others."""

    def __init__(self, device: Any = None, **_: Any):
        self.issued, self.device = 0, torch.device("cuda", 0)
        self.seen: weakref.WeakKeyDictionary[Stream, int] = weakref.WeakKeyDictionary()
        EVERY.add(self)

    def now(self) -> dict["Stream", int]:
        """What is done once this stream is: its own work, and all that it has waited for."""
        return {**self.seen, self: self.issued}

    def wait(self, for_: dict["Stream", int]) -> None:
        for stream, number in for_.items():
            if stream is not self:
                self.seen[stream] = max(self.seen.get(stream, 0), number)

    def wait_stream(self, other: "Stream") -> None:
        self.wait(other.now())

    def wait_event(self, event: "Event") -> None:
        self.wait(event.point)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _host_waits("synchronize", self.now())

    def query(self) -> bool:
        return True


def _host_waits(what: str, for_: dict[Stream, int]) -> None:
    """Whatever is issued from now on comes after it, on any stream."""
    HERE.waits.append(what)
    for stream in EVERY:
        stream.wait(for_)


class Event:
    """A point of a stream."""

    def __init__(self, **_: Any):
        self.point: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.point = (stream or HERE.stream).now()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or HERE.stream).wait(self.point)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.point, "an event is waited for that was never recorded"
        _host_waits("synchronize", self.point)

    def elapsed_time(self, other: "Event") -> float:
        assert self.point and other.point, "time between events that were never recorded"
        return 1.0


@dataclass
class _Here:
    """Where this process is. waits: what the host waited for the device for, in order."""

    stream: Stream
    waits: list[str] = field(default_factory=list)


DEFAULT = Stream()  # of the process: what is kept from one simulation to the next was written on it
HERE = _Here(DEFAULT)


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """torch.cuda.stream."""
    before, HERE.stream = HERE.stream, stream or HERE.stream
    try:
        yield
    finally:
        HERE.stream = before


def synchronize(device: Any = None) -> None:
    """torch.cuda.synchronize."""
    for stream in EVERY:
        stream.synchronize()
