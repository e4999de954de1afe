"""How the ranks of a training begin: with what they read open, and with the same config and sets, or none and the first
says why. Must not know the model."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from beitforge.pipeline.cluster.environment import rank_info
from beitforge.pipeline.cluster.error_reporting import USER_ERRORS, user_message
from beitforge.pipeline.config.identity import shared
from beitforge.pipeline.config.loading import to_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.distributed.collectives import World, all_gather_lines, broadcast_object
from beitforge.pipeline.distributed.process_group import start_world
from beitforge.pipeline.errors import ConfigError, SharedError

Opened = TypeVar("Opened")

_TOLD = 3  # differences in one line


def open_and_join(
    config: Config, opening: Callable[[], Opened], facts: Callable[[Opened], dict[str, str]]
) -> tuple[World, Opened]:
    """Open what a training reads, then join the process group.

    What only some ranks can't open (a host without the data) is one SharedError on every rank, and so is another config
    or other `facts` of what was opened than the first rank's: they would train well, and not the same.
    """
    if rank_info(os.environ).size == 1:
        opened = opening()
        return start_world(config.faults.hang_seconds), opened
    tried = _attempt(opening)
    try:
        world = start_world(config.faults.hang_seconds)
    except RuntimeError as error:
        if tried.line:
            raise ConfigError(tried.line) from error
        raise
    mine = _settings(config) | (facts(tried.opened) if tried.opened is not None else {})
    first_host, first = broadcast_object((socket.gethostname(), mine), world)
    return world, _raise_together(
        tried if tried.line else _Attempt(tried.opened, _differences(mine, first, first_host)), world
    )


def run_on_all_ranks(work: Callable[[], Opened], world: World) -> Opened:
    """What `work` returns; where it fails on some ranks, one SharedError on every rank. It must not talk to others."""
    return _raise_together(_attempt(work), world)


@dataclass(frozen=True)
class _Attempt(Generic[Opened]):
    """What came of some work: what it returned, or the line of its complaint."""

    opened: Opened | None
    line: str


def _attempt(work: Callable[[], Opened]) -> _Attempt[Opened]:
    """Errors that nobody expects are raised."""
    try:
        return _Attempt(work(), "")
    except USER_ERRORS as error:
        if not (line := user_message(error)):
            raise
        return _Attempt(None, line)


def _raise_together(tried: _Attempt[Opened], world: World) -> Opened:
    """Raise SharedError if a rank has a complaint: the first rank's, else another's with its host."""
    there = "" if world.first else f"host {socket.gethostname()}: "
    if complaints := all_gather_lines(tried.line and there + tried.line, world):
        raise SharedError(complaints[0])
    return cast(Opened, tried.opened)


def _settings(config: Config) -> dict[str, str]:
    """Every setting that is not a host's own, by its dotted name; the deepspeed section, which has no keys of ours, as
    one."""
    tree = to_dict(config)
    free = {"deepspeed": json.dumps(tree.pop("deepspeed"), sort_keys=True)}
    return free | {
        f"{section}.{name}": alike
        for section, values in tree.items()
        for name, value in values.items()
        if (alike := shared(section, name, value)) is not None
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
