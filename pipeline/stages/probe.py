"""`probe RUN SHARDS [TEST]`: k-NN and linear probe of a run, compared with the untrained encoder and raw pixels."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import say
from beitforge.pipeline.data.batches import evaluation_batches, own_images
from beitforge.pipeline.data.known_bad import known_lines, refuse_over_budget
from beitforge.pipeline.data.labelled import refuse_other_classes, require_labels, share_of, subsample
from beitforge.pipeline.data.pretraining import DataSource, evaluation
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.evaluation.probe import EPOCHS, ProbeResult, feature_depth, probe, sweeps
from beitforge.pipeline.model.beit import Beit, Classifier, Encoder, initialise
from beitforge.pipeline.model.pixels import normalise
from beitforge.pipeline.runs.folder import write_whole
from beitforge.pipeline.weights.classifier import build_classifier
from beitforge.pipeline.weights.encoder import build_encoder, fine_tuned, run_config, trained_weights
from beitforge.shards.progress import Progress
from beitforge.shards.stream.loader import BadSample

_RAW_SIDES = (8, 16, 32)  # pixels a side of the raw-pixel features; the probe chooses

Features = tuple[dict[str, dict[str, Tensor]], Tensor]  # f32 [n, D] by model and layer, and labels i64 [n]


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """samples: the most of each set, spread over it. label_share: of each class's images, chosen by `seed`.
    epochs: of the linear probes."""

    samples: int = 20_000
    label_share: float = 1.0
    seed: int = 0
    epochs: int = EPOCHS

    def refuse(self, tested_apart: bool) -> None:
        """Raise ConfigError for what cannot be done."""
        if not 0 < self.label_share <= 1:
            raise ConfigError(f"--label-share is {self.label_share}; it lies in (0, 1]")
        if self.samples < 2:
            raise ConfigError(f"--samples is {self.samples}; it must be at least 2")
        if self.epochs < 1:
            raise ConfigError(f"--epochs is {self.epochs}; it must be at least 1")
        if self.label_share < 1 and not tested_apart:
            raise ConfigError(
                "--label-share fits on a share of SHARDS, and a fifth of so few images tests nothing: give TEST, too "
                "(`pack --split` makes it)"
            )

    @property
    def file(self) -> str:
        """Where the results go: those with all labels are the run's, and are what reports show."""
        return "probe.json" if self.label_share == 1 else f"probe-{self.label_share:g}-{self.seed}.json"


def run(run_folder: Path, shards: str, test: str | None, asked: ProbeOptions) -> int:
    """Print the table and write it into the run folder; returns the exit code."""
    asked.refuse(test is not None)
    config = run_config(run_folder)
    source = trained_weights(run_folder)
    weights, state = source.all(), source.state
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {who: encoder.to(device) for who, encoder in _encoders(config, weights, run_folder).items()}
    config = dataclasses.replace(config, model=models["trained"].model)  # a classifier's may be of another size
    (train, train_labels), (tests, test_labels) = _sets(config, models, shards, test, asked, device)
    verdicts = {}
    with Progress("linear probes", len(train) * sweeps(train_labels), "sweep") as progress:
        for who in train:
            verdicts[who] = probe(
                {name: features.to(device) for name, features in train[who].items()},
                train_labels.to(device),
                {name: features.to(device) for name, features in tests[who].items()},
                test_labels.to(device),
                default=_default(who, config),
                epochs=asked.epochs,
                tell=lambda: progress.advance(1),
            )
    share = float(test_labels.bincount().max()) / len(test_labels)
    content: dict[str, object] = {"step": state.step, "majority_class": share}
    content |= {"label_share": asked.label_share, "seed": asked.seed, "epochs": asked.epochs}
    content |= {"train_samples": len(train_labels), "test_samples": len(test_labels)}
    content |= {"classes": len(train_labels.unique()), "tested_apart": test is not None}
    content |= {"results": {who: dataclasses.asdict(verdict) for who, verdict in verdicts.items()}}
    write_whole(run_folder / asked.file, json.dumps(content, indent=1) + "\n")
    say(f"probe at step {state.step}: {len(train_labels)} images to fit, {len(test_labels)} to test")
    _say_table(verdicts)
    say(f"in {run_folder / asked.file}")
    return 0


def _encoders(config: Config, weights: dict[str, Tensor], source: Path) -> dict[str, Encoder]:
    """The encoder or classifier of these weights, and one of its shape as drawn."""
    if not fine_tuned(source):
        trained = build_encoder(config, weights, source)
        return {"trained": trained, "untrained": Beit(trained.model, config.tokenizer.vocabulary, config.data.seed)}
    classifier = build_classifier(config, weights, source)
    untrained = Classifier(classifier.model, 0)
    initialise(untrained, config.data.seed)
    return {"trained": classifier, "untrained": untrained.eval()}


def _say_table(verdicts: dict[str, ProbeResult]) -> None:
    chosen = all(verdict.chosen for verdict in verdicts.values())
    how = "chosen on folds of the fitting set" if chosen else "as given: too few images of a class to choose by"
    say(f"{'':12}{'k-NN':>8}{'linear':>8}   features and learning rate {how}")
    for who, verdict in verdicts.items():
        say(f"{who:12}{verdict.knn:8.1%}{verdict.linear:8.1%}   {verdict.features}, {verdict.rate:g}")
    say("linear probe of the trained encoder by layer:")
    say(" ".join(f"{accuracy:.1%}" for accuracy in verdicts["trained"].layers.values()))


def _default(who: str, config: Config) -> str:
    """The features of too few images to choose by."""
    sides = [side for side in _RAW_SIDES if side <= min(config.model.input_size)]
    return f"{sides[-1]}×{sides[-1]}" if who == "raw pixels" else f"layer {feature_depth(config.model.layers)}"


def _sets(
    config: Config, models: dict[str, Encoder], shards: str, test: str | None, asked: ProbeOptions, device: torch.device
) -> tuple[Features, Features]:
    """What to fit on and what to test on: sets of their own, or four fifths and a fifth of one."""
    fitting = _labelled(config, shards)
    testing = _labelled(config, test) if test else None
    if testing is not None:
        refuse_other_classes(fitting.stream.images, testing.stream.images, shards, str(test))
    if asked.label_share < 1:
        fitting = share_of(config, fitting, asked.label_share, asked.seed)
    train, train_labels = _features(config, models, subsample(fitting, asked.samples), device)
    if testing is None:
        part = torch.arange(len(train_labels)) % 5 == 4
        test_labels, train_labels = train_labels[part], train_labels[~part]
        tests = {who: {n: f[part] for n, f in sets.items()} for who, sets in train.items()}
        train = {who: {n: f[~part] for n, f in sets.items()} for who, sets in train.items()}
    else:
        tests, test_labels = _features(config, models, subsample(testing, asked.samples), device)
    if len(train_labels.unique()) < 2 or not len(test_labels):
        raise ConfigError(f"{shards} has fewer than two classes, or too few images; a probe needs labels to tell apart")
    return (train, train_labels), (tests, test_labels)


@torch.no_grad()
def _features(config: Config, models: dict[str, Encoder], source: DataSource, device: torch.device) -> Features:
    """The mean over patches after each block, and pixels; of the images that can be read alone. Raises ConfigError
    where more cannot than were known to be bad and the budget allows."""
    count = source.samples
    gathered: dict[str, dict[str, list[Tensor]]] = {who: {} for who in (*models, "raw pixels")}
    labels, bad = [], list[BadSample]()
    for line in known_lines(source):
        say(line)
    with Progress(f"features {Path(str(source.stream.images.folder)).name}", count, "image") as progress:
        for batch in evaluation_batches(config, source, samples=count, micro=128, rank=0, world=1):
            bad += batch.bad
            own_B = own_images(batch)
            progress.advance(len(batch.samples))
            if not own_B.any():
                continue
            labels.append(batch.labels[own_B])
            pixels = batch.pixels[own_B].to(device).float() / 255
            for who, model in models.items():
                states = model.hidden(normalise(pixels, config.model.mean, config.model.std), None, every=True)
                for layer, state in enumerate(states[1:], start=1):
                    gathered[who].setdefault(f"layer {layer}", []).append(state[:, 1:].mean(dim=1).cpu())
            for side in (side for side in _RAW_SIDES if side <= min(config.model.input_size)):
                small = F.interpolate(pixels, (side, side), mode="area").flatten(1).cpu()
                gathered["raw pixels"].setdefault(f"{side}×{side}", []).append(small)
    for line in refuse_over_budget(bad, source, config.data.bad_sample_budget):
        say(line)
    return {who: {n: torch.cat(parts) for n, parts in sets.items()} for who, sets in gathered.items()}, torch.cat(
        labels
    )


def _labelled(config: Config, where: str) -> DataSource:
    """Central views of a set's images."""
    source = evaluation(config, where)
    require_labels(source.stream.images, "the set", "a probe")
    return source
