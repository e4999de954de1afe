"""Ends a training: the ranks agree on the reason, rank 0 writes the end marker, the process group is destroyed.

Must not know model or shards.
"""

import os
from collections.abc import Callable
from pathlib import Path

from beitforge.pipeline.cluster.signals import FINISHED, exit_code, strongest_reason, write_ended
from beitforge.pipeline.distributed.collectives import World, all_gather_objects
from beitforge.pipeline.distributed.process_group import destroy_process_group
from beitforge.pipeline.runs.checkpoints import newest


def shut_down(run: Path, finished: bool, stop: Callable[[], str], world: World) -> int:
    """Collective, after the last save; returns the exit code. A signal may have reached only some of the ranks."""
    reasons = all_gather_objects(stop(), world)
    found = newest(run, lambda _: None) if world.first else None
    if found is not None:
        write_ended(run, found[1].step, FINISHED if finished else strongest_reason(reasons))
    destroy_process_group()
    return exit_code(finished, os.environ)
