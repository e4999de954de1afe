"""The cheapest setting that meets a deadline. Must not know torch."""

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.plan.estimate import CHECKPOINTING, LARGEST_MICRO, Estimate, Machine, estimate


def cheapest(
    config: Config, machine: Machine, counts: list[int], *, images: int, days: float
) -> tuple[Estimate | None, Estimate | None]:
    """Of all stages and kinds of checkpointing, at the largest micro batch: the fewest GPU-hours that meet the
    deadline (or None), and the fastest (or None where nothing fits)."""
    kinds = [kind for kind in CHECKPOINTING if kind != "selective" or not config.train.compile]
    fitting = []
    for gpus in counts:
        if config.train.global_batch % gpus:
            continue
        for stage in (0, 1, 2, 3):
            for checkpointing in kinds:
                row = estimate(
                    config,
                    machine,
                    gpus,
                    stage,
                    images=images,
                    checkpointing=checkpointing,
                    at_most=LARGEST_MICRO,
                    steps=20,
                )
                fitting += [row] if row.memory.fits(checkpointing) else []
    meeting = [row for row in fitting if row.days <= days]
    best = min(meeting, key=lambda row: row.gpu_hours, default=None)
    return best, min(fitting, key=lambda row: row.days, default=None)
