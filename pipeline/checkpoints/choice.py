"""Which checkpoint a run resumes from: the newest whose every byte is as it was written, on which all ranks agree.

Each rank reads a share of the files, of its own shape its own. Must not know torch, model, shards or any stage.
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from beitforge.pipeline.distributed.collectives import World, all_gather_lines, broadcast_object
from beitforge.pipeline.errors import SharedError
from beitforge.pipeline.runs.checkpoints import NO_DIGESTS, NotFinished, State, damage, passed_over, readable

_OF_RANK = re.compile(r"(?:pp_rank_|/rank)(\d{1,9})")


def newest_whole(
    run: Path, world: World, say: Callable[[str], None], usable: Callable[[int], bool] = lambda _: True
) -> tuple[Path, State] | None:
    """The newest checkpoint without damage; None when the run folder has no complete one. Every rank calls it.

    say, usable: as `runs.checkpoints.newest` takes them. Raises SharedError when there are complete ones and all are
    damaged: a run must not begin anew because of that.
    """
    damaged: list[str] = []

    def pass_over(folder: Path, problem: object) -> None:
        say(passed_over(folder, problem))
        if not isinstance(problem, NotFinished):
            damaged.append(f"{folder.name}: {problem}")

    offered = readable(run, pass_over, usable) if world.first else iter(())
    while (found := broadcast_object(next(offered, None), world)) is not None:
        folder, state = found
        mine = share(state.files, world.rank, world.size)
        problems = all_gather_lines(next(damage(folder, state, mine, whole=True), ""), world)
        if not problems:
            if not state.has_digests:
                say(NO_DIGESTS.format(f"checkpoint {folder.name}"))
            return folder, state
        pass_over(folder, problems[0])
    if damaged := broadcast_object(damaged, world):
        raise SharedError(
            f"{run} has no checkpoint to resume from ({'; '.join(damaged)}): bring back one from a copy, or remove "
            f"{run / 'checkpoints'} to begin again from step 0"
        )
    return None


def share(names: Collection[str], rank: int, world: int) -> list[str]:
    """The files that a rank checks: each is one rank's, and what a rank of the same shape loads its own."""
    shared = []
    for place, name in enumerate(sorted(names)):
        of_rank = _OF_RANK.search(name)
        if (int(of_rank[1]) if of_rank else -1 - place) % world == rank:
            shared.append(name)
    return shared
