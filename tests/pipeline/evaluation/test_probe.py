"""Probes: right where classes are apart, at chance on noise, and blind to the test labels when they choose."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.pipeline.evaluation.probe import (
    RATES,
    ProbeResult,
    knn_accuracy,
    probe,
    scores,
    standardised,
    sweep,
    sweeps,
)

CLASSES, D = 4, 12


pytestmark = pytest.mark.usefixtures("one_thread")


def judged(train: dict[str, Tensor], train_labels: Tensor, test: dict[str, Tensor], test_labels: Tensor) -> ProbeResult:
    """With twenty epochs, which is enough for a few hundred images."""
    return probe(train, train_labels, test, test_labels, default=next(iter(train)), epochs=20)


def blobs(count: int, apart: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features [n, D] of gaussian classes whose centres are `apart` standard deviations from the origin, and labels."""
    centres = F.normalize(torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(0)), dim=1) * apart
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return centres[labels] + torch.randn(count, D, generator=generator), labels


def test_separable_classes_are_told_apart():
    (train, train_labels), (test, test_labels) = blobs(300, 12.0, 1), blobs(200, 12.0, 2)
    verdict = judged({"only": train}, train_labels, {"only": test}, test_labels)
    assert verdict.linear > 0.99
    assert verdict.knn > 0.99
    assert verdict.features == "only"


def test_noise_is_chance():
    """500 test images of 4 classes: 25 % give or take 3 standard deviations of 1.9 %."""
    (train, train_labels), (test, test_labels) = blobs(400, 0.0, 1), blobs(500, 0.0, 2)
    verdict = judged({"only": train}, train_labels, {"only": test}, test_labels)
    assert verdict.linear == pytest.approx(0.25, abs=0.06)
    assert verdict.knn == pytest.approx(0.25, abs=0.06)


def sets(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Three feature sets of the same images: noise, classes well apart, classes somewhat apart."""
    good, labels = blobs(count, 6.0, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    poor = good + 6 * torch.randn(good.shape, generator=generator)
    return {"noise": torch.randn(count, D, generator=generator), "good": good, "poor": poor}, labels


def test_the_better_features_are_chosen():
    (train, train_labels), (test, test_labels) = sets(300, 1), sets(200, 2)
    verdict = judged(train, train_labels, test, test_labels)
    assert verdict.features == "good"
    assert verdict.linear > 0.95


def test_the_test_set_takes_no_part_in_the_choice():
    """Permuting the test labels, or putting other images there, changes accuracies and never what was chosen."""
    (train, train_labels), (test, test_labels) = sets(300, 1), sets(200, 2)
    verdict = judged(train, train_labels, test, test_labels)
    shuffled = test_labels[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    other = judged(train, train_labels, test, shuffled)
    reversed_features = {name: -features for name, features in test.items()}
    third = judged(train, train_labels, reversed_features, test_labels)
    assert {(v.features, v.rate) for v in (verdict, other, third)} == {(verdict.features, verdict.rate)}
    assert other.linear < 0.5 < verdict.linear


def test_the_test_set_takes_no_part_in_the_scaling():
    """One test image alone is judged as it is among others."""
    (train, train_labels), (test, test_labels) = sets(300, 1), sets(200, 2)
    together = judged(train, train_labels, test, test_labels)
    parts = [
        judged(train, train_labels, {name: f[i : i + 50] for name, f in test.items()}, test_labels[i : i + 50])
        for i in range(0, 200, 50)
    ]
    assert together.linear == pytest.approx(sum(part.linear for part in parts) / 4)
    assert together.knn == pytest.approx(sum(part.knn for part in parts) / 4)


@pytest.mark.parametrize(("each", "expected"), [(4, 1), (5, 6), (300, 2)])
def test_every_sweep_is_told(each, expected):
    """As many as were announced: one, and one for every part that is chosen on."""
    labels = torch.arange(CLASSES).repeat(each)
    train = {"only": torch.randn(len(labels), D, generator=torch.Generator().manual_seed(1))}
    told: list[int] = []
    probe(train, labels, train, labels, default="only", epochs=1, tell=lambda: told.append(1))
    assert len(told) == sweeps(labels) == expected


def test_judging_twice_gives_the_same():
    (train, train_labels), (test, test_labels) = sets(200, 1), sets(100, 2)
    assert judged(train, train_labels, test, test_labels) == judged(train, train_labels, test, test_labels)


def test_a_class_seen_in_the_test_set_only():
    """Counts as wrong, and breaks nothing."""
    (train, train_labels), (test, test_labels) = blobs(300, 12.0, 1), blobs(200, 12.0, 2)
    few = train_labels != 3
    verdict = judged({"only": train[few]}, train_labels[few], {"only": test}, test_labels)
    expected = float((test_labels != 3).float().mean())
    assert verdict.linear == pytest.approx(expected, abs=0.02)
    assert verdict.knn == pytest.approx(expected, abs=0.02)


def test_few_images_are_no_ground_for_a_choice():
    """Below five of a class the default features are reported, whatever folds of one or two images would say."""
    (train, train_labels), (test, test_labels) = sets(300, 1), sets(200, 2)
    few = torch.cat([(train_labels == c).nonzero()[:2, 0] for c in range(CLASSES)])
    part = {name: features[few] for name, features in train.items()}
    verdict = probe(part, train_labels[few], test, test_labels, default="poor", epochs=20)
    assert verdict.features == "poor" and verdict.linear == verdict.layers["poor"] and not verdict.chosen
    assert verdict.layers["good"] > verdict.layers["noise"]


def test_every_probe_of_a_sweep_is_the_one_fitted_alone():
    """By torch's own modules and optimizer, one feature set and one rate at a time, on the same batches."""
    epochs, batch = 3, 256
    features, labels = blobs(600, 2.0, 1)
    swept = sweep({"other": features * 0.5 + 1, "this": features}, labels, CLASSES, epochs=epochs, seed=7)["this"]
    for turn, rate in enumerate(RATES):
        linear = torch.nn.Linear(D, CLASSES)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        groups = [{"params": [linear.weight]}, {"params": [linear.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 3)
        generator = torch.Generator().manual_seed(7)
        for _ in range(epochs):
            for rows in torch.randperm(600, generator=generator).split(batch):
                optimizer.zero_grad()
                F.cross_entropy(linear(features[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(swept[turn, :-1], linear.weight.T, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(swept[turn, -1], linear.bias, atol=1e-4, rtol=1e-3)


def test_knn_by_hand():
    """Cosine similarity, votes weighted by exp(similarity / 0.07) (arXiv 1805.01978 §3.4), one test image a time."""
    (train, train_labels), (test, test_labels) = blobs(60, 2.0, 1), blobs(80, 2.0, 2)
    right = 0
    for image, label in zip(test, test_labels, strict=True):
        similarity = torch.stack([F.cosine_similarity(image, other, dim=0) for other in train])
        votes = torch.zeros(CLASSES)
        for neighbour in similarity.argsort(descending=True)[:20].tolist():
            votes[train_labels[neighbour]] += torch.exp(similarity[neighbour] / 0.07)
        right += int(votes.argmax() == label)
    assert 0.3 < right / 80 < 0.98
    assert knn_accuracy(train, train_labels, test, test_labels, CLASSES) == right / 80


def test_knn_of_fewer_images_than_neighbours():
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn_accuracy(train, labels, torch.eye(3), labels, 3) == 1.0


def test_standardised_is_measured_on_the_reference():
    reference = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    scaled = standardised(reference, torch.tensor([[4.0, 5.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[1.5**0.5, 0.0]]))
    assert torch.isfinite(standardised(reference, reference)).all()


def test_scores():
    fit = torch.zeros(2, 3, 2)  # two rates, two dimensions and a bias, two classes
    fit[0, 0, 1] = 1.0
    fit[1, 2, 0] = 1.0
    features, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 5.0]]), torch.tensor([1, 0, 0])
    assert scores(fit, features, labels).tolist() == pytest.approx([2 / 3, 2 / 3])
