"""Which settings make a run the same run, and which may differ between hosts. Must not know torch."""

import dataclasses
import hashlib
import json
import typing

from beitforge.pipeline.config.fields import Rule, find_rules
from beitforge.pipeline.config.loading import to_dict
from beitforge.pipeline.config.settings import Config


def is_per_host(section: str, name: str) -> bool:
    """Whether every host of a run may have its own value of a setting: where things lie, and how they are loaded."""
    return section != "deepspeed" and _rules(section)[name].per_host


def identity(config: Config, sections: tuple[str, ...]) -> dict[str, dict]:
    """The settings that a run cannot change and still be the same run: of each of `sections` all that count, or of
    `section.key` that one. A word that stands for a number counts as that number: runs of versions that knew no such
    word are of the same identity."""
    tree = to_dict(_in_numbers(config))
    found: dict[str, dict] = {}
    for entry in sections:
        section, _, only = entry.partition(".")
        names = {only} if only else _kept(section, tree[section])
        found[section] = found.get(section, {}) | {n: value for n, value in tree[section].items() if n in names}
    return found


def _in_numbers(config: Config) -> Config:
    optimizer, tune = config.optimizer, config.finetune
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(optimizer, weight_decay_end=optimizer.last_weight_decay),
        finetune=dataclasses.replace(tune, weight_decay_end=tune.last_weight_decay, test_crop=tune.test_share),
    )


def identity_digest(config: Config, sections: tuple[str, ...]) -> str:
    """The identity in 16 hex digits."""
    return hashlib.sha256(json.dumps(identity(config, sections), sort_keys=True).encode()).hexdigest()[:16]


def _kept(section: str, values: dict) -> set[str]:
    """The names in a section that are part of the identity. Of `deepspeed` all are."""
    return {name for name in values if section == "deepspeed" or _rules(section)[name].identity}


def _rules(section: str) -> dict[str, Rule]:
    return find_rules(typing.get_type_hints(Config)[section])
