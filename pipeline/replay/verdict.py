"""`replay RUN`: what is said of steps done again, the exit code, and the page of one of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from beitforge.pipeline.config.identity import differences
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import say
from beitforge.pipeline.distributed.collectives import World, all_gather_objects, barrier, broadcast_object
from beitforge.pipeline.distributed.device import device_name
from beitforge.pipeline.distributed.process_group import destroy_process_group
from beitforge.pipeline.replay.page import MicroBatch, samples_page
from beitforge.pipeline.replay.steps import Replayed, Span, fits, replay
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.folder import environment
from beitforge.pipeline.runs.recorded import Recorded
from beitforge.pipeline.training.trainer import Job
from beitforge.shards.storage.files import write_text
from beitforge.shards.stream.order import rank_batches

EQUAL, DIFFERENT, NOT_COMPARED = 0, 1, 2  # exit codes
_NAMED = ("device", "python", "cpus", "threads", "commit")  # of environment.json, beside the versions
Prepare = Callable[[Config, Callable[[], bool]], tuple[World, Job]]


def run(config: Config, folder: Path, recorded: Recorded, span: Span, page: Path | None, prepare: Prepare) -> int:
    """Replay, say what differs, write the page; returns the exit code. prepare: of the stage that made the run."""
    config = _unjudged(config, recorded.job)
    world, job = prepare(config, lambda: newest(folder, lambda _: None, fits(folder, span)) is None)
    job, recorded = replace(job, run=folder), broadcast_object(recorded, world)
    lines = _changed(config, folder, job) + _elsewhere(recorded, world) if world.first else []
    for line in lines:
        say(line)
    result = replay(config, job, world, recorded, span)
    verdict = f"steps {result.start + 1}–{span.until} are the recorded ones, bit for bit"
    if result.differs or result.weights_differ:
        verdict = f"not as recorded, from {_first(result)} on"
    elif not result.compared:
        verdict = "nothing was recorded of these steps that they could be compared with"
    new = [bad for bad in result.bad if (bad.shard, bad.key) not in recorded.replaced]
    told = [
        f"sample {bad.sample} ({bad.shard} {bad.key}) is replaced here, was not before: {bad.reason}" for bad in new
    ]
    for line in (*told, verdict) if world.first else ():
        say(line)
    if page is not None:
        _write_page(page, config, job, world, span, result, [*lines, *told, verdict])
    different = bool(result.differs or result.weights_differ)
    compared = result.compared > 0
    barrier()
    destroy_process_group()
    return DIFFERENT if different else EQUAL if compared else NOT_COMPARED


def _unjudged(config: Config, job: str) -> Config:
    """Without what only evaluations read, which need not be at hand."""
    labelled = config.data.labelled_images if job == "finetune" else ""
    data = replace(config.data, heldout_images="", heldout_tokens="", labelled_images=labelled, labelled_test="")
    return replace(config, data=data, log=replace(config.log, evaluation_share=0.0))


def _first(result: Replayed) -> str:
    """What differs first: the numbers of a step, or the weights behind one."""
    if result.differs and not 0 < result.weights_differ < result.differs:
        return f"step {result.differs}"
    return f"the weights after step {result.weights_differ}"


def _changed(config: Config, folder: Path, job: Job) -> list[str]:
    """Settings that the run's numbers depend on and that are other ones here."""
    before = load_config(str(folder / "config.yaml"), [])
    found = [f"{name} is {new}, the run had {old}" for name, old, new in differences(before, config, job.sections)]
    return [f"other settings than the run's: {'; '.join(found)}"] if found else []


def _elsewhere(recorded: Recorded, world: World) -> list[str]:
    """What is not as environment.json has it."""
    here, there = environment(world.size, device_name(world.device)), recorded.environment
    pairs = [(name, here.get(name), there.get(name)) for name in _NAMED]
    versions = there.get("versions")
    if isinstance(versions, dict):
        pairs += [
            (name, here["versions"].get(name), versions.get(name)) for name in sorted({*here["versions"], *versions})
        ]
    apart = [f"{name} {mine or 'none'} here, {theirs}" for name, mine, theirs in pairs if theirs not in (None, mine)]
    return [f"not as in the run's last start: {'; '.join(apart)}"] if apart else []


def _write_page(
    page: Path, config: Config, job: Job, world: World, span: Span, result: Replayed, lines: list[str]
) -> None:
    """Collective. The page shows the first step that is not finite, else the first that differs, else the last."""
    wanted = [number for number in result.not_finite if number > span.after]
    step = (wanted or [result.differs or span.until])[0]
    losses = all_gather_objects(result.losses.get(step, []), world)
    if not world.first:
        return
    micro_batches = []
    for rank, of_rank in enumerate(losses):
        numbers = rank_batches(
            first_sample=(step - 1) * job.setup.global_batch,
            global_batch=job.setup.global_batch,
            micro_batch=job.setup.micro_batch,
            rank=rank,
            world=world.size,
            steps=1,
            paired=job.source.paired,
        )
        micro_batches += [MicroBatch(rank, number, numbers[number], loss) for number, loss in enumerate(of_rank)]
    micro_batches.sort(key=lambda micro: (micro.loss == micro.loss and abs(micro.loss) != float("inf"), -micro.loss))
    write_text(page, samples_page(f"step {step} of {job.run.resolve().name}", lines, config, job.source, micro_batches))
    say(f"samples of step {step}: {page}")
