"""`plan CONFIG --gpus …`: what a training will take, before a GPU is asked for. Arithmetic; must not need torch."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from beitforge.pipeline.config.fields import LARGEST
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.plan.assumptions import load_assumptions
from beitforge.pipeline.plan.costs import training_flops
from beitforge.pipeline.plan.estimate import Estimate, Machine, estimate, size_of
from beitforge.pipeline.plan.hardware import CHIPS, NETWORKS, STORAGES, Chip, Network, Storage
from beitforge.pipeline.plan.search import cheapest
from beitforge.pipeline.plan.tables import render
from beitforge.pipeline.plan.tokenization import tokenizations
from beitforge.shards.errors import ShardError
from beitforge.shards.format.manifest import known_bad, read_image_manifest

_COUNT = re.compile("[0-9]{1,9}")
_IMAGENET = 1_281_167
Known = TypeVar("Known", Chip, Network, Storage)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The command line."""

    gpus: str
    stages: str
    gpu: str
    network: str
    storage: str
    days: float
    images: int
    measured: list[str]
    assume: list[str]
    json: bool


def run(words: list[str], asked: PlanOptions) -> int:
    """Print the plan; returns the exit code. Raises ConfigError with one line."""
    if not words:
        raise ConfigError("plan needs a CONFIG, a YAML file such as configs/beit_base.yaml")
    config = load_config(words[0], words[1:])
    counts = _counts(asked.gpus, "--gpus", 1, 65_536)
    stages = _counts(asked.stages, "--stages", 0, 3)
    if not 0 <= asked.days <= LARGEST:
        raise ConfigError(f"--days is {asked.days:g}; it must be more than 0 and at most {LARGEST:g}")
    if not 0 <= asked.images <= LARGEST:
        raise ConfigError(f"--images is {shown(asked.images)}; it must lie between 1 and {LARGEST:g}")
    flops = training_flops(config.model, config.tokenizer.vocabulary, config.mask.num_patches)
    machine = Machine(
        _known(asked.gpu, CHIPS, "--gpu"),
        _known(asked.network, NETWORKS, "--network"),
        _known(asked.storage, STORAGES, "--storage"),
        load_assumptions(asked.measured, asked.assume, flops),
    )
    if config.train.precision == "fp8":
        if not machine.chip.flops8:
            raise ConfigError(
                f"train.precision fp8 is not for {machine.chip.name}; use bf16, or --gpu h100, h200 or b200"
            )
        stages = [stage for stage in stages if stage < 3] or [config.train.zero_stage]
    images, origin = _images(config, asked.images)
    if not config.train.epoch_samples(images):
        raise ConfigError(
            f"train.drop_last leaves nothing of an epoch of {images} images ({origin}): train.global_batch is "
            f"{config.train.global_batch}; set it to false, or a smaller global_batch"
        )
    rows, refused = _rows(config, machine, counts, stages, images)
    best = cheapest(config, machine, counts, images=images, days=asked.days) if asked.days else None
    if asked.json:
        print(json.dumps(_tree(config, machine, images, rows, refused, best), indent=1))
    else:
        print(render(config, machine, images, origin, rows, refused, best, asked.days))
    return 0


def _counts(text: str, option: str, least: int, most: int) -> list[int]:
    """`8,64,512` as numbers, each once."""
    counts = []
    for word in text.split(","):
        if not _COUNT.fullmatch(word.strip()) or not least <= int(word) <= most:
            said = f"{shown(word.strip())} is no number from {least} to {most}"
            raise ConfigError(f"{option} {shown(text)}: {said}; write 8,64")
        counts.append(int(word))
    return list(dict.fromkeys(counts))


def _known(name: str, known: tuple[Known, ...], option: str) -> Known:
    for each in known:
        if each.name == name:
            return each
    raise ConfigError(f"{option} {name!r} is not known; it takes {', '.join(each.name for each in known)}")


def _images(config: Config, given: int) -> tuple[int, str]:
    """Images of an epoch, and where that comes from."""
    if given:
        return given, "given"
    folder = Path(config.data.images)
    if (folder / "manifest.json").exists():
        try:
            manifest = read_image_manifest(folder)
            bad = known_bad(manifest)
            known = f", of which {bad} do not decode and are replaced" if bad else ""
            return manifest.samples, f"{folder}/manifest.json{known}"
        except ShardError as error:
            raise ConfigError(f"{error}; or give --images") from error
    return _IMAGENET, f"ImageNet-1k's, since {folder} holds no manifest; give --images"


def _rows(
    config: Config, machine: Machine, counts: list[int], stages: list[int], images: int
) -> tuple[list[Estimate], list[str]]:
    """A forecast for each count and stage, and a line for each count that cannot be."""
    rows: list[Estimate] = []
    refused = []
    for gpus in counts:
        try:
            rows += [estimate(config, machine, gpus, stage, images=images) for stage in stages]
        except ConfigError as error:
            refused.append(str(error))
    if not rows:
        raise ConfigError(refused[0])
    return rows, refused


def _tree(
    config: Config,
    machine: Machine,
    images: int,
    rows: list[Estimate],
    refused: list[str],
    best: tuple[Estimate | None, Estimate | None] | None,
) -> dict:
    """Everything for programs."""
    parts = [dataclasses.asdict(machine.chip), dataclasses.asdict(machine.network), dataclasses.asdict(machine.storage)]
    found: dict = {
        "parameters": size_of(config),
        "images": images,
        "machine": dict(zip(("chip", "network", "storage"), parts, strict=True)),
        "assumptions": [
            dict(zip(("name", "value", "unit", "origin"), line, strict=True)) for line in machine.assumed.lines()
        ],
        "rows": [_row(row) for row in rows],
        "refused": refused,
        "tokenization": [dataclasses.asdict(each) for each in tokenizations(config, machine, images)],
    }
    if best is not None:
        found["cheapest"], found["fastest"] = (None if row is None else _row(row) for row in best)
    return found


def _row(row: Estimate) -> dict:
    """A forecast with what follows from it; JSON knows no infinity."""
    tree = dataclasses.asdict(row)
    tree["memory"] |= {"total": row.memory.total(row.checkpointing), "fits": row.memory.fits(row.checkpointing)}
    tree["step"] |= {"exposed": row.step.exposed, "hidden": row.step.hidden}
    tree["life"] |= {"goodput": row.life.goodput}
    tree["mtbf"] = row.mtbf if math.isfinite(row.mtbf) else None
    tree["life"] = {name: value if math.isfinite(value) else None for name, value in tree["life"].items()}
    return tree
