"""`evaluate RUN|WEIGHTS SET`: how many images of a labelled set a classifier names right.

Each image counts once and is seen as fine-tuning's test sees it; counts are whole numbers, the same on any number of
ranks. An image that cannot be read is named and left out: a substitute would count for another.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beitforge.pipeline.checkpoints.choice import newest_whole
from beitforge.pipeline.cluster.environment import rank_of
from beitforge.pipeline.cluster.error_reporting import as_host_error
from beitforge.pipeline.config.loading import load_dict, to_dict
from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.console import align_columns, say
from beitforge.pipeline.data.batches import block_batches, own_images
from beitforge.pipeline.data.labelled import as_tested, labels_of
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.distributed.collectives import World, all_gather_objects, all_gather_rows
from beitforge.pipeline.distributed.process_group import destroy_process_group
from beitforge.pipeline.distributed.startup import open_and_join, run_on_all_ranks
from beitforge.pipeline.errors import ConfigError, SharedError
from beitforge.pipeline.evaluation.accuracy import Accuracy, accuracy_of, fitting_classes, tallied, verdicts
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.runs.folder import write_whole
from beitforge.pipeline.training.objectives import encoder_input
from beitforge.pipeline.weights.classifier import NO_CLASSIFIER, LoadedClassifier, load_classifier
from beitforge.pipeline.weights.encoder import WEIGHTS, fine_tuned, run_config
from beitforge.shards.progress import Progress, Silent
from beitforge.shards.storage.reading import file_digest
from beitforge.shards.storage.staging import refuse_other_file
from beitforge.shards.stream.loader import BadSample
from beitforge.shards.wording import counted

_MADE_BY = "beitforge evaluate"
_TOLD = 5  # classes and confusions that are printed; the file has all


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """overrides: section.key=value. by_number: whether labels are the classifier's numbers, whatever the names. ema:
    whether the moving average of the weights is asked for. json: the file that all counts go to."""

    overrides: tuple[str, ...] = ()
    by_number: bool = False
    ema: bool = False
    json: Path | None = None


@dataclass(frozen=True)
class _Task:
    """A classifier and what it is shown. classes: the classifier's number of each label; named: found by name. average:
    whether its weights are a run's moving average."""

    loaded: LoadedClassifier
    config: Config
    source: DataSource
    classes: dict[int, int]
    named: bool
    average: bool


def run(folder: Path, where: str, asked: EvaluateOptions) -> int:
    """Print the accuracy of the classifier in a folder on a set; returns the exit code."""
    with as_host_error():  # the processes have not met: what a host lacks, it says itself
        config = evaluation_config(folder, asked.overrides)
    world, (source, _) = open_and_join(config, lambda: _opened(config, folder, where, asked.json), _facts)
    chosen = newest_whole(folder, world, say if world.first else lambda _: None)
    task = run_on_all_ranks(lambda: _task(folder, chosen, where, source, config, asked), world)
    found, unreadable = _counted(task, world)
    if world.first:
        content = _content(folder, where, task, found, unreadable)
        _tell(content)
        if asked.json is not None:
            write_whole(asked.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            say(f"in {asked.json}")
    destroy_process_group()
    return 0


def evaluation_config(folder: Path, overrides: Sequence[str]) -> Config:
    """The config of the classifier in a folder, with overrides. Raises ConfigError where there is none, and for
    overrides that make it another one."""
    before = run_config(folder)
    if not fine_tuned(folder):
        raise ConfigError(f"{folder} {NO_CLASSIFIER}")
    config = load_dict(to_dict(before), list(overrides), str(folder))
    model = [("model", field.name) for field in dataclasses.fields(Model)]
    for section, name in (*model, ("finetune", "input_size"), ("finetune", "pooling")):
        was, now = (getattr(getattr(each, section), name) for each in (before, config))
        if was != now and name != "kernels":
            raise ConfigError(f"{section}.{name} is {was} of this classifier, not {now}: leave it out")
    return config


def _opened(config: Config, folder: Path, where: str, out: Path | None) -> tuple[DataSource, str]:
    """The set, and a digest of the classifier where it is one file. Raises ConfigError or ShardError, on the rank that
    would write it also for a file `out` that cannot be written."""
    if out is not None and rank_of(os.environ) == 0:
        refuse_other_file(out, _MADE_BY.encode())
        if not out.parent.is_dir():
            raise ConfigError(f"--json is {out}, and there is no such folder: make it, or name another file")
    weights = folder / WEIGHTS
    digest = file_digest(weights) if weights.exists() else str(folder)
    return as_tested(config, where, "the set", "`evaluate`"), digest


def _facts(opened: tuple[DataSource, str]) -> dict[str, str]:
    """What has to be the same on every host."""
    source, digest = opened
    return {"labelled set": source.images, "classifier": digest}


def _task(
    folder: Path,
    chosen: tuple[Path, State] | None,
    where: str,
    source: DataSource,
    config: Config,
    asked: EvaluateOptions,
) -> _Task:
    loaded, images = load_classifier(folder, chosen, asked.ema), source.stream.images
    if not loaded.classes:
        raise ConfigError(f"{folder} is a classifier without a head: `finetune` from it trains one")
    classes, named = fitting_classes(
        labels_of(images), images.manifest.classes, loaded.classes, loaded.names, asked.by_number, where
    )
    return _Task(loaded, config, source, classes, named, asked.ema)


@torch.no_grad()
def _counted(task: _Task, world: World) -> tuple[Accuracy, list[BadSample]]:
    """What all ranks find together, on the first rank; and the images that could not be read."""
    config, source, classifier = task.config, task.source, task.loaded.classifier.to(world.device)
    block, samples = config.finetune.micro_batch, source.samples
    table_L = torch.zeros(max(task.classes) + 1, dtype=torch.int64)
    table_L[list(task.classes)] = torch.tensor(list(task.classes.values()))
    tallies, bad, odd = [torch.zeros(0, 3, dtype=torch.int64)], list[BadSample](), 0
    label = f"evaluate {Path(str(source.stream.images.folder)).name}"
    with Progress(label, samples, "image") if world.first else Silent() as progress:
        for batch in block_batches(config, source, samples=samples, block=block, rank=world.rank, world=world.size):
            bad += batch.bad
            own_B = own_images(batch)
            logits_BV = classifier(encoder_input(config, batch.to(world.device)))
            odd += int((~logits_BV.isfinite().all(dim=1)).sum())
            tallies.append(verdicts(logits_BV, table_L[batch.labels].to(world.device)).cpu()[own_B])
            progress.advance(min(len(batch.samples) * world.size, samples - progress.done))
    everyone = all_gather_rows(tallied(torch.cat(tallies)).to(world.device), world)
    bad, odd = [one for each in all_gather_objects(bad, world) for one in each], sum(all_gather_objects(odd, world))
    if odd:
        raise SharedError(f"the logits of {odd} of {samples} images are not finite: the weights are damaged")
    found = accuracy_of(everyone, task.loaded.classes)
    if not sum(found.images):
        raise SharedError(f"none of the {samples} images of {source.stream.images.folder} could be read: run `verify`")
    return found, sorted(bad, key=lambda one: one.sample)


def _content(folder: Path, where: str, task: _Task, found: Accuracy, unreadable: list[BadSample]) -> dict[str, Any]:
    """All counts, for people and for --json."""
    tune, total = task.config.finetune, sum(found.images)
    names = task.loaded.names or task.source.stream.images.manifest.classes
    called = [names[number] if number < len(names) else str(number) for number in range(task.loaded.classes)]
    counts = zip(called, found.images, found.first, found.five, strict=True)
    return {
        "made_by": _MADE_BY,
        "weights": str(folder),
        "step": task.loaded.state.step,
        "moving_average": task.average,
        "set": where,
        "images": total,
        "unreadable": [{"shard": one.shard, "key": one.key, "reason": one.reason} for one in unreadable],
        "input_size": str(tune.input_size),
        "test_crop": tune.test_share,
        "classes_by": "name" if task.named else "number",
        "top1": {"right": sum(found.first), "share": sum(found.first) / total},
        "top5": {"right": sum(found.five), "share": sum(found.five) / total},
        "classes": [
            {"number": number, "name": name, "images": images, "top1": first, "top5": five}
            for number, (name, images, first, five) in enumerate(counts)
            if images
        ],
        "confusions": [
            {"class": called[label], "taken_for": called[predicted], "images": count}
            for label, predicted, count in found.confusions
        ],
    }


def _tell(content: dict[str, Any]) -> None:
    """The counts in short: the whole, the worst classes and the commonest confusions."""
    classes, total = content["classes"], content["images"]
    weights = f"{'the moving average at ' if content['moving_average'] else ''}step {content['step']}"
    say(
        f"{counted(total, 'image')} of {len(classes)} classes, matched by {content['classes_by']}, by {weights} of "
        f"{content['weights']}: the central {content['test_crop']:g} at {content['input_size']} px"
    )
    if content["unreadable"]:
        first = content["unreadable"][0]
        say(
            f"{counted(len(content['unreadable']), 'image')} could not be read and counts nowhere, such as "
            f"{first['key']} of {first['shard']} ({first['reason']})"
        )
    for name in ("top1", "top5"):
        say(f"{name[:3]}-{name[3:]}  {content[name]['share']:.3%}  ({content[name]['right']} of {total})")
    worst = sorted(classes, key=lambda each: (each["top1"] / each["images"], -each["images"]))[:_TOLD]
    if content["confusions"]:
        rows = [[_named(each["name"]), f"{each['top1']} of {each['images']}"] for each in worst]
        say("\n".join(["fewest right:", *(f"  {line}" for line in align_columns(rows))]))
        rows = [
            [_named(each["class"]), "taken for", _named(each["taken_for"]), str(each["images"])]
            for each in content["confusions"][:_TOLD]
        ]
        say("\n".join(["most often:", *(f"  {line}" for line in align_columns(rows))]))


def _named(name: str) -> str:
    return name if name.isprintable() and len(name) < 60 else shown(name)
