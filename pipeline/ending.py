"""How a training ends: the ranks agree why, the first leaves word of it, they part. Must not know model or shards."""

import os
from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoint import newest
from pipeline.engine import World, gathered, leave
from pipeline.signals import FINISHED, exit_code, strongest, write_ended


def end(run: Path, finished: bool, stop: Callable[[], str], world: World) -> int:
    """Every rank calls it, after the last save; returns the exit code. A signal may have reached some ranks only."""
    reasons = gathered(stop(), world)
    found = newest(run, lambda _: None) if world.first else None
    if found is not None:
        write_ended(run, found[1].step, FINISHED if finished else strongest(reasons))
    leave()
    return exit_code(finished, os.environ)
