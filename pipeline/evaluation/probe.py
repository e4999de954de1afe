"""Judging features by labels: k-NN, and linear probes of every layer at once. Tensors in, accuracies out. Must not know
shards."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # peak learning rates that are tried
EPOCHS, BATCH, DECAY = 100, 256, 1e-4
_FOLDS, _SMALL = 5, 1000  # images of a set that is judged on every fold
_LEAST = 5  # images of a class, in the mean; with fewer nothing is chosen
_DEFAULT_RATE = 3e-3


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies in [0, 1] on the test set, with the features and the learning rate that were chosen on the training
    set; `layers`: the linear probe's on the test set for every feature set at its own best rate. chosen: false where
    classes had too few images to choose by."""

    knn: float
    linear: float
    features: str
    rate: float
    layers: dict[str, float]
    chosen: bool


def probe(
    train: dict[str, Tensor],
    train_labels: Tensor,
    test: dict[str, Tensor],
    test_labels: Tensor,
    *,
    default: str,
    epochs: int = EPOCHS,
    seed: int = 0,
    tell: Callable[[], object] = lambda: None,
) -> ProbeResult:
    """Probe every feature set, float32 [n, D] by name, at every rate; report the pair that does best on folds of
    `train` that it was not fitted on. The test set takes no part in the choice. labels: i64 [n].

    default: the feature set reported where classes have so few images that a choice would be noise. k-NN uses the
    features that were chosen for the linear probe. tell: called after each of the `sweeps`.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    train_std = {name: standardised(features, features) for name, features in train.items()}
    test_std = {name: standardised(train[name], features) for name, features in test.items()}
    fits = sweep(train_std, train_labels, classes, epochs=epochs, seed=seed)
    tell()
    tested = {name: scores(fit, test_std[name], test_labels) for name, fit in fits.items()}
    folds = _folds(train_labels)
    if folds:
        judged = _on_folds(train_std, train_labels, classes, folds, epochs, seed, tell)
        turn = {name: int(scores_R.argmax()) for name, scores_R in judged.items()}
        used = max(judged, key=lambda name: float(judged[name].max()))
    else:
        turn = dict.fromkeys(train, RATES.index(_DEFAULT_RATE))
        used = default
    layers = {name: float(tested[name][turn[name]]) for name in train}
    knn = knn_accuracy(train_std[used], train_labels, test_std[used], test_labels, classes)
    return ProbeResult(knn, layers[used], used, RATES[turn[used]], layers, folds > 0)


def sweeps(train_labels: Tensor) -> int:
    """How many sweeps a probe on this many images takes."""
    return 1 + _folds(train_labels)


def _folds(labels: Tensor) -> int:
    """On how many parts is chosen: on each of a small set's, on one of a large set's, on none where a choice would be
    noise."""
    if len(labels) < _LEAST * len(labels.unique()):
        return 0
    return _FOLDS if len(labels) <= _SMALL else 1


def _on_folds(
    train: dict[str, Tensor],
    labels: Tensor,
    classes: int,
    folds: int,
    epochs: int,
    seed: int,
    tell: Callable[[], object],
) -> dict[str, Tensor]:
    """Accuracy of every feature set at every rate, float64 [R] by name, on images that the probe was not fitted on,
    summed over the folds."""
    places = torch.arange(len(labels))  # on the host, where a mask waits for nothing
    found = {name: torch.zeros(len(RATES), dtype=torch.float64, device=labels.device) for name in train}
    for held in range(folds):
        kept, apart = (places[which].to(labels.device) for which in (places % _FOLDS != held, places % _FOLDS == held))
        part = {name: features[kept] for name, features in train.items()}
        for name, fit in sweep(part, labels[kept], classes, epochs=epochs, seed=seed).items():
            found[name] += scores(fit, train[name][apart], labels[apart])
        tell()
    return found


def sweep(
    features: dict[str, Tensor], labels: Tensor, classes: int, *, epochs: int = EPOCHS, seed: int = 0
) -> dict[str, Tensor]:
    """Linear classifiers [R, D + 1, classes] of every feature set (standardised, float32 [n, D]) for all RATES at once,
    the bias last.

    As in the authors' linear evaluation (unilm, beit/run_linear_eval.py): AdamW, a cosine over `epochs`, the same
    batches for all. Their features are of fresh crops, these are computed once, of central views.
    """
    found: dict[str, Tensor] = {}
    for width in sorted({columns.shape[1] for columns in features.values()}):
        names = [name for name, columns in features.items() if columns.shape[1] == width]
        fits_RFEV = _fit(torch.stack([features[name] for name in names]), labels, classes, epochs, seed)
        found |= {name: fits_RFEV[:, i] for i, name in enumerate(names)}
    return {name: found[name] for name in features}


def _fit(x_FND: Tensor, labels_N: Tensor, classes: int, epochs: int, seed: int) -> Tensor:
    """Classifiers [R, F, D + 1, classes] of F feature sets of one width."""
    sets, n, width = x_FND.shape
    weights = [torch.zeros(sets, width, classes, device=x_FND.device, requires_grad=True) for _ in RATES]
    biases = [torch.zeros(sets, 1, classes, device=x_FND.device, requires_grad=True) for _ in RATES]
    groups = [{"params": [w], "lr": rate, "weight_decay": DECAY} for w, rate in zip(weights, RATES, strict=True)]
    groups += [{"params": [b], "lr": rate, "weight_decay": 0.0} for b, rate in zip(biases, RATES, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-n // BATCH))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator).to(x_FND.device).split(BATCH):
            logits = torch.baddbmm(torch.cat(biases, dim=2), x_FND[:, rows], torch.cat(weights, dim=2))  # one product
            logits_FBRV = logits.unflatten(2, (len(RATES), classes))
            wanted_FBR = labels_N[rows][:, None].expand(sets, -1, len(RATES))
            losses = F.cross_entropy(logits_FBRV.flatten(0, 2), wanted_FBR.flatten(), reduction="sum")
            optimizer.zero_grad()
            (losses / len(rows)).backward()  # of each classifier its own mean
            optimizer.step()
            schedule.step()
    return torch.stack([torch.cat([w, b], dim=1) for w, b in zip(weights, biases, strict=True)]).detach()


def scores(fit: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of each of R classifiers [R, D + 1, classes], float64 [R]."""
    logits_RBV = features @ fit[:, :-1] + fit[:, -1:]
    return (logits_RBV.argmax(dim=-1) == labels).double().mean(dim=1)


def feature_depth(layers: int) -> int:
    """After how many blocks features are taken: two thirds, and before the last, which does not compute them all."""
    return min(layers - 1, round(layers * 2 / 3))


def standardised(reference: Tensor, features: Tensor) -> Tensor:
    """Zero mean and unit variance per dimension, as measured on `reference`."""
    return (features - reference.mean(dim=0)) / (reference.std(dim=0, correction=0) + 1e-6)


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
