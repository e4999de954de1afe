"""Judging features by labels: k-NN and a linear probe. Tensors in, accuracies out. Must not know shards."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Verdict:
    """Accuracies in [0, 1] on the test set; the feature set and weight decay chosen on a part of the training set."""

    knn: float
    linear: float
    features: str
    weight_decay: float


def judge(train: dict[str, Tensor], train_labels: Tensor, test: dict[str, Tensor], test_labels: Tensor) -> Verdict:
    """Probe every feature set, float32 [n, D] by name, and report the one best on a held-out fifth of `train`.

    The test set takes no part in the choice. labels: i64 [n].
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    held = torch.arange(len(train_labels)) % 5 == 0
    best = (-1.0, "", 0.0)
    for name, features in train.items():
        scaled = standardised(features[~held], features)
        for decay in _DECAYS:
            weights = fit_linear(scaled[~held], train_labels[~held], classes, decay)
            score = accuracy(scaled[held] @ weights[:-1] + weights[-1], train_labels[held])
            best = max(best, (score, name, decay))
    _, name, decay = best
    fit, tested = standardised(train[name], train[name]), standardised(train[name], test[name])
    weights = fit_linear(fit, train_labels, classes, decay)
    linear = accuracy(tested @ weights[:-1] + weights[-1], test_labels)
    return Verdict(knn_accuracy(fit, train_labels, tested, test_labels, classes), linear, name, decay)


def standardised(reference: Tensor, features: Tensor) -> Tensor:
    """Zero mean and unit variance per dimension, as measured on `reference`."""
    return (features - reference.mean(dim=0)) / (reference.std(dim=0) + 1e-6)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def fit_linear(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> Tensor:
    """Multinomial logistic regression by L-BFGS on everything at once. Returns [D + 1, classes], the bias last."""
    weights = torch.zeros(features.shape[1] + 1, classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weights[:-1] + weights[-1], labels)
        loss = loss + 0.5 * weight_decay * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, neighbours: int = 20
) -> float:
    """k-NN by cosine similarity, votes weighted by exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978 §3.4)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    right = 0
    for part, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        similarity, nearest = (part @ train.T).topk(min(neighbours, len(train)), dim=1)
        votes = F.one_hot(train_labels[nearest], classes) * (similarity / 0.07).exp()[..., None]
        right += int((votes.sum(dim=1).argmax(dim=1) == labels).sum())
    return right / len(test_labels)
