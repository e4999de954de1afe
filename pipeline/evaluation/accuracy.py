"""How many images of each class a classifier names right, and what it takes the others for, in whole numbers, which add
up to the same on any number of ranks. Must not know shards, runs or any stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown

TOP = 5
_TOLD = 3  # names in a message
_BY_NUMBER = "if its labels are numbered as the classifier's, add --by-number"


def verdicts(logits_BV: Tensor, labels_B: Tensor) -> Tensor:
    """Of each image its label, the class with the largest logit, and whether its label is among the first five: i64
    [B, 3]. Of equal logits that of the smaller class comes first."""
    classes = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    own_B1 = logits_BV.gather(1, labels_B[:, None])
    before_BV = (logits_BV > own_B1) | ((logits_BV == own_B1) & (classes < labels_B[:, None]))
    largest_B1 = logits_BV.amax(dim=1, keepdim=True)
    predicted_B = torch.where(logits_BV == largest_B1, classes, len(classes)).amin(dim=1)
    return torch.stack([labels_B, predicted_B, (before_BV.sum(dim=1) < TOP).long()], dim=1)


def tallied(verdicts_N3: Tensor) -> Tensor:
    """Each different verdict once, with how many images had it: i64 [n, 4]."""
    different, counts = verdicts_N3.unique(dim=0, return_counts=True)
    return torch.cat([different, counts[:, None]], dim=1)


@dataclass(frozen=True)
class Accuracy:
    """images, first and five: of every class, how many images it has, how many are named right, and how many have their
    class among the first five. confusions: (class, what it was taken for) and how often, the commonest first."""

    images: list[int]
    first: list[int]
    five: list[int]
    confusions: list[tuple[int, int, int]]


def accuracy_of(tallies_n4: Tensor, classes: int) -> Accuracy:
    """What the tallies of all ranks, end to end, add up to."""
    images, first, five = [0] * classes, [0] * classes, [0] * classes
    taken: dict[tuple[int, int], int] = {}
    for label, predicted, within, count in tallies_n4.tolist():
        images[label] += count
        first[label] += count * (label == predicted)
        five[label] += count * within
        if label != predicted:
            taken[label, predicted] = taken.get((label, predicted), 0) + count
    confusions = sorted(((*pair, count) for pair, count in taken.items()), key=lambda each: (-each[2], *each[:2]))
    return Accuracy(images, first, five, confusions)


def fitting_classes(
    labels: Iterable[int], names: Sequence[str], classes: int, called: Sequence[str], by_number: bool, where: str
) -> tuple[dict[int, int], bool]:
    """Which class of a classifier each label of a set is, and whether that was found by name.

    labels: those that the set's images have; names: of the set's classes, () where it has none. classes: of the
    classifier, which are `called` so, () where nobody said. by_number: whatever the names. where: names the set in
    messages. Raises ConfigError where they do not fit.
    """
    wanted, named = sorted(labels), bool(names and called) and not by_number
    if not named or tuple(names) == tuple(called):
        others = len(names) if names and not by_number else wanted[-1] + 1
        if others > classes or (names and not by_number and others != classes):
            cure = "" if others > classes else f"; {_BY_NUMBER}"
            raise ConfigError(
                f"{where} has {others} classes, the classifier {classes}: give a set of its classes{cure}"
            )
        return {label: label for label in wanted}, named
    places: dict[str, list[int]] = {}
    for number, name in enumerate(called):
        places.setdefault(name, []).append(number)
    nameless = [label for label in wanted if label >= len(names)]
    if nameless:
        raise ConfigError(f"{where} has labels up to {nameless[-1]} and names of {len(names)} classes: {_BY_NUMBER}")
    absent = [names[label] for label in wanted if names[label] not in places]
    if absent:
        told = ", ".join(map(shown, absent[:_TOLD])) + (" …" if len(absent) > _TOLD else "")
        raise ConfigError(
            f"{where} has {len(absent)} classes that the classifier does not know by name ({told}; it knows "
            f"{shown(called[0])} …): give the set of its classes; {_BY_NUMBER}"
        )
    twice = next((names[label] for label in wanted if len(places[names[label]]) > 1), None)
    if twice is not None:
        raise ConfigError(f"the classifier calls {len(places[twice])} classes {shown(twice)}: {_BY_NUMBER}")
    return {label: places[names[label]][0] for label in wanted}, True
