"""How the ranks of a training open what they read: all, or none and the first says why. Must not know the model."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from pipeline.complaints import line_of
from pipeline.config import ConfigError
from pipeline.engine import World, gathered, start_world
from pipeline.rendezvous import place_of

Opened = TypeVar("Opened")


def start_with(opening: Callable[[], Opened], hang_seconds: float) -> tuple[World, Opened]:
    """Open what a training reads, then join the process group.

    What only some ranks can't open (a host without the data) is one ConfigError on every rank.
    """
    if place_of(os.environ).size == 1:
        opened = opening()
        return start_world(hang_seconds), opened
    tried = _tried(opening)
    world = start_world(hang_seconds)
    return world, _agreed(tried, world)


def on_every_rank(work: Callable[[], Opened], world: World) -> Opened:
    """What `work` returns; where it fails on some ranks, one ConfigError on every rank. It must not talk to others."""
    return _agreed(_tried(work), world)


@dataclass(frozen=True)
class _Tried(Generic[Opened]):
    """What came of some work: what it returned, or the line of its complaint."""

    opened: Opened | None
    line: str


def _tried(work: Callable[[], Opened]) -> _Tried[Opened]:
    """Errors that nobody expects are raised."""
    try:
        return _Tried(work(), "")
    except Exception as error:
        if not (line := line_of(error)):
            raise
        return _Tried(None, line)


def _agreed(tried: _Tried[Opened], world: World) -> Opened:
    """Raise ConfigError on every rank if one has a complaint: the first rank's, else another's with its host."""
    there = "" if world.first else f"host {socket.gethostname()}: "
    lines = gathered(tried.line and there + tried.line, world)
    if complaints := [line for line in lines if line]:
        raise ConfigError(complaints[0])
    return cast(Opened, tried.opened)
