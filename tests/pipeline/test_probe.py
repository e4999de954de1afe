"""Probes: right where classes are apart, at chance on noise, and blind to the test labels when they choose."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.probe import accuracy, fit_linear, judge, knn_accuracy, standardised

CLASSES, D = 4, 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operators on shared cores: threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(count: int, apart: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features [n, D] of gaussian classes whose centres are `apart` standard deviations from the origin, and labels."""
    centres = F.normalize(torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(0)), dim=1) * apart
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return centres[labels] + torch.randn(count, D, generator=generator), labels


def test_separable_classes_are_told_apart():
    (train, train_labels), (test, test_labels) = blobs(300, 12.0, 1), blobs(200, 12.0, 2)
    verdict = judge({"only": train}, train_labels, {"only": test}, test_labels)
    assert verdict.linear > 0.99
    assert verdict.knn > 0.99
    assert verdict.features == "only"


def test_noise_is_chance():
    """500 test pictures of 4 classes: 25 % give or take 3 standard deviations of 1.9 %."""
    (train, train_labels), (test, test_labels) = blobs(400, 0.0, 1), blobs(500, 0.0, 2)
    verdict = judge({"only": train}, train_labels, {"only": test}, test_labels)
    assert verdict.linear == pytest.approx(0.25, abs=0.06)
    assert verdict.knn == pytest.approx(0.25, abs=0.06)


def sets(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Three feature sets of the same pictures: noise, classes well apart, classes somewhat apart."""
    good, labels = blobs(count, 6.0, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    poor = good + 6 * torch.randn(good.shape, generator=generator)
    return {"noise": torch.randn(count, D, generator=generator), "good": good, "poor": poor}, labels


def test_the_better_features_are_chosen():
    (train, train_labels), (test, test_labels) = sets(300, 1), sets(200, 2)
    verdict = judge(train, train_labels, test, test_labels)
    assert verdict.features == "good"
    assert verdict.linear > 0.95


def test_the_test_set_takes_no_part_in_the_choice():
    """Permuting the test labels, or putting other pictures there, changes accuracies and never what was chosen."""
    (train, train_labels), (test, test_labels) = sets(300, 1), sets(200, 2)
    verdict = judge(train, train_labels, test, test_labels)
    shuffled = test_labels[torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    other = judge(train, train_labels, test, shuffled)
    reversed_features = {name: -features for name, features in test.items()}
    third = judge(train, train_labels, reversed_features, test_labels)
    assert {(v.features, v.weight_decay) for v in (verdict, other, third)} == {(verdict.features, verdict.weight_decay)}
    assert other.linear < 0.5 < verdict.linear


def test_the_test_set_takes_no_part_in_the_scaling():
    """One test picture alone is judged as it is among others."""
    (train, train_labels), (test, test_labels) = sets(300, 1), sets(200, 2)
    together = judge(train, train_labels, test, test_labels)
    parts = [
        judge(train, train_labels, {name: f[i : i + 50] for name, f in test.items()}, test_labels[i : i + 50])
        for i in range(0, 200, 50)
    ]
    assert together.linear == pytest.approx(sum(part.linear for part in parts) / 4)
    assert together.knn == pytest.approx(sum(part.knn for part in parts) / 4)


def test_judging_twice_gives_the_same():
    (train, train_labels), (test, test_labels) = sets(200, 1), sets(100, 2)
    assert judge(train, train_labels, test, test_labels) == judge(train, train_labels, test, test_labels)


def test_a_class_seen_in_the_test_set_only():
    """Counts as wrong, and breaks nothing."""
    (train, train_labels), (test, test_labels) = blobs(300, 12.0, 1), blobs(200, 12.0, 2)
    few = train_labels != 3
    verdict = judge({"only": train[few]}, train_labels[few], {"only": test}, test_labels)
    expected = float((test_labels != 3).float().mean())
    assert verdict.linear == pytest.approx(expected, abs=0.02)
    assert verdict.knn == pytest.approx(expected, abs=0.02)


def test_linear_probe_is_at_the_optimum():
    """Regularised logistic regression is convex: at its optimum the gradient vanishes."""
    features, labels = blobs(200, 2.0, 1)
    weights = fit_linear(features, labels, CLASSES, 1e-2).requires_grad_()
    loss = F.cross_entropy(features @ weights[:-1] + weights[-1], labels) + 0.005 * weights[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-3
    heavier = fit_linear(features, labels, CLASSES, 10.0)
    assert heavier[:-1].norm() < 0.1 * weights[:-1].norm()


def test_knn_by_hand():
    """Cosine similarity, votes weighted by exp(similarity / 0.07) (arXiv 1805.01978 §3.4), one test picture a time."""
    (train, train_labels), (test, test_labels) = blobs(60, 2.0, 1), blobs(80, 2.0, 2)
    right = 0
    for picture, label in zip(test, test_labels, strict=True):
        similarity = torch.stack([F.cosine_similarity(picture, other, dim=0) for other in train])
        votes = torch.zeros(CLASSES)
        for neighbour in similarity.argsort(descending=True)[:20].tolist():
            votes[train_labels[neighbour]] += torch.exp(similarity[neighbour] / 0.07)
        right += int(votes.argmax() == label)
    assert 0.3 < right / 80 < 0.98
    assert knn_accuracy(train, train_labels, test, test_labels, CLASSES) == right / 80


def test_knn_of_fewer_pictures_than_neighbours():
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn_accuracy(train, labels, torch.eye(3), labels, 3) == 1.0


def test_standardised_is_measured_on_the_reference():
    reference = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    scaled = standardised(reference, torch.tensor([[4.0, 5.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[1.0, 0.0]]))
    assert torch.isfinite(standardised(reference, reference)).all()


def test_accuracy():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)
