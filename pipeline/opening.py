"""How the ranks of a training begin: with what they read open, and with the same config and sets, or none and the first
says why. Must not know the model."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from pipeline.complaints import EXPECTED, line_of
from pipeline.config import Config, ConfigError, SharedError, to_tree
from pipeline.engine import World, from_first, gathered, start_world
from pipeline.rendezvous import place_of
from pipeline.run import OF_HOST

Opened = TypeVar("Opened")

_TOLD = 3  # differences in one line


def start_with(
    config: Config, opening: Callable[[], Opened], facts: Callable[[Opened], dict[str, str]]
) -> tuple[World, Opened]:
    """Open what a training reads, then join the process group.

    What only some ranks can't open (a host without the data) is one SharedError on every rank, and so is another config
    or other `facts` of what was opened than the first rank's: they would train well, and not the same.
    """
    if place_of(os.environ).size == 1:
        opened = opening()
        return start_world(config.faults.hang_seconds), opened
    tried = _tried(opening)
    try:
        world = start_world(config.faults.hang_seconds)
    except RuntimeError as error:
        if tried.line:
            raise ConfigError(tried.line) from error
        raise
    mine = _settings(config) | (facts(tried.opened) if tried.opened is not None else {})
    first_host, first = from_first((socket.gethostname(), mine), world)
    return world, _agreed(tried if tried.line else _Tried(tried.opened, _differences(mine, first, first_host)), world)


def on_every_rank(work: Callable[[], Opened], world: World) -> Opened:
    """What `work` returns; where it fails on some ranks, one SharedError on every rank. It must not talk to others."""
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
    except EXPECTED as error:
        if not (line := line_of(error)):
            raise
        return _Tried(None, line)


def _agreed(tried: _Tried[Opened], world: World) -> Opened:
    """Raise SharedError if a rank has a complaint: the first rank's, else another's with its host."""
    there = "" if world.first else f"host {socket.gethostname()}: "
    lines = gathered(tried.line and there + tried.line, world)
    if complaints := [line for line in lines if line]:
        raise SharedError(complaints[0])
    return cast(Opened, tried.opened)


def _settings(config: Config) -> dict[str, str]:
    """Every setting that is not a host's own, by its dotted name; the deepspeed section, which has no keys of ours, as
    one."""
    tree = to_tree(config)
    free = {"deepspeed": json.dumps(tree.pop("deepspeed"), sort_keys=True)}
    return free | {
        f"{section}.{name}": str(value)
        for section, values in tree.items()
        for name, value in values.items()
        if name not in OF_HOST.get(section, ())
    }


def _differences(mine: dict[str, str], first: dict[str, str], first_host: str) -> str:
    """What is not as on the first rank, in words; ''. What that one lacks, it could not open."""
    apart = [name for name in mine if first.get(name, mine[name]) != mine[name]]
    if not apart:
        return ""
    told = ", ".join(f"{name} is {mine[name]!r:.80} and not {first[name]!r:.80}" for name in apart[:_TOLD])
    more = f", and {len(apart) - _TOLD} more" if len(apart) > _TOLD else ""
    cure = "bring the same config and sets to both; `doctor` compares hosts"
    return f"{told}{more}, as on {first_host}, the host of the first rank: {cure}"
