"""Verdicts against a plain sort, whole numbers whatever the parts, and classes that fit by name, by number or not."""

import numpy as np
import pytest
import torch

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.evaluation.accuracy import accuracy_of, fitting_classes, tallied, verdicts


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 40])
@pytest.mark.parametrize("levels", [2, 1000])
def test_verdicts_are_those_of_a_sort(classes, levels):
    """Of equal logits, of which there are many at two levels, the smaller class comes first."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, levels, (200, classes), generator=generator).float()
    labels = torch.randint(0, classes, (200,), generator=generator)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    wanted = [
        [label, ranks[0], label in ranks[:5]] for label, ranks in zip(labels.tolist(), order.tolist(), strict=True)
    ]
    assert verdicts(logits, labels).tolist() == wanted


def test_any_parts_add_up_to_the_same():
    generator = np.random.default_rng(0)
    seen = torch.from_numpy(generator.integers(0, [7, 7, 2], size=(500, 3)))
    whole = accuracy_of(tallied(seen), 7)
    for parts in (2, 3, 7):
        assert accuracy_of(torch.cat([tallied(seen[part::parts]) for part in range(parts)]), 7) == whole
    labels, predicted, within = seen.numpy().T
    assert whole.images == [int((labels == n).sum()) for n in range(7)]
    assert whole.first == [int(((labels == n) & (predicted == n)).sum()) for n in range(7)]
    assert whole.five == [int(within[labels == n].sum()) for n in range(7)]
    for label, taken, count in whole.confusions:
        assert label != taken and count == int(((labels == label) & (predicted == taken)).sum()) > 0
    assert sum(count for *_, count in whole.confusions) == int((labels != predicted).sum())
    counts = [count for *_, count in whole.confusions]
    assert counts == sorted(counts, reverse=True)


ABC = ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("labels", "names", "classes", "called", "by_number", "found"),
    [
        ({0, 1, 2}, ABC, 3, ABC, False, ({0: 0, 1: 1, 2: 2}, True)),
        ({0, 1}, ("cat", "ant"), 3, ABC, False, ({0: 2, 1: 0}, True)),
        ({1}, ("dog", "ant"), 3, ABC, False, ({1: 0}, True)),  # no image is of a dog
        ({0, 1}, ABC, 3, (), False, ({0: 0, 1: 1}, False)),
        ({0, 2}, (), 3, ABC, False, ({0: 0, 2: 2}, False)),
        ({0, 1}, ("x", "y"), 3, ABC, True, ({0: 0, 1: 1}, False)),
        ({0, 1, 2}, ("n1", "n2", "n3"), 3, ("crane", "crane", "owl"), True, ({0: 0, 1: 1, 2: 2}, False)),
        ({0, 1}, ("crane", "crane"), 2, ("crane", "crane"), False, ({0: 0, 1: 1}, True)),
    ],
)
def test_classes_that_fit(labels, names, classes, called, by_number, found):
    assert fitting_classes(labels, names, classes, called, by_number, "SET") == found


@pytest.mark.parametrize(
    ("labels", "names", "classes", "called", "by_number", "words"),
    [
        ({0, 1}, ("ant", "dog"), 3, ABC, False, r"SET has 1 classes that the classifier does not know .*'dog'.*--by-n"),
        ({0, 3}, (), 3, ABC, False, "SET has 4 classes, the classifier 3: give a set of its classes$"),
        ({0, 3}, ("a", "b", "c", "d"), 3, ABC, True, "SET has 4 classes, the classifier 3"),
        ({0, 1}, ("a", "b"), 3, (), False, "SET has 2 classes, the classifier 3: .*--by-number"),
        ({0}, ("crane", "ant"), 3, ("crane", "crane", "ant"), False, "calls 2 classes 'crane': .*--by-number"),
        ({0, 5}, ("ant", "bee"), 3, ABC, False, "labels up to 5 and names of 2 classes: .*--by-number"),
    ],
)
def test_classes_that_do_not_fit_are_refused(labels, names, classes, called, by_number, words):
    with pytest.raises(ConfigError, match=words):
        fitting_classes(labels, names, classes, called, by_number, "SET")
