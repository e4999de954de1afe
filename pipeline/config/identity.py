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


def shared(section: str, name: str, value: object) -> str | None:
    """What the hosts of a run must have alike of a setting's value; None where each may have its own."""
    if not is_per_host(section, name):
        return str(value)
    apart = _rules(section)[name].apart
    return (str(value) if value in apart else f"none of {', '.join(apart)}") if apart else None


def identity(config: Config, sections: tuple[str, ...]) -> dict[str, dict]:
    """The settings that a run cannot change and still be the same run: of each of `sections` all that count, or of
    `section.key` that one. A word that stands for a number counts as that number, and a setting that is each host's own
    counts where its value changes results: runs of versions that knew no such word are of the same identity."""
    tree = to_dict(_in_numbers(config))
    found: dict[str, dict] = {}
    for entry in sections:
        section, _, only = entry.partition(".")
        names = {only} if only else _kept(section, tree[section])
        found[section] = found.get(section, {}) | {n: value for n, value in tree[section].items() if n in names}
    return found


def differences(before: Config, after: Config, sections: tuple[str, ...]) -> list[tuple[str, object, object]]:
    """What two configs of one identity would have alike and do not: each setting's dotted name, and both values."""
    trees, kept = (to_dict(_in_numbers(before)), to_dict(_in_numbers(after))), identity(after, sections)
    found = []
    for section, there in identity(before, sections).items():
        for name in {**there, **kept[section]}:
            old, new = (tree[section].get(name) for tree in trees)
            if old != new:
                found.append((f"{section}.{name}", old, new))
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
    if section == "deepspeed":
        return set(values)
    rules = _rules(section)
    return {name for name, value in values.items() if rules[name].identity or value in rules[name].apart}


def _rules(section: str) -> dict[str, Rule]:
    return find_rules(typing.get_type_hints(Config)[section])
