"""Classifiers: a fine-tuned BEiT with its norm and head whole, out of a run or as a folder of its own, and as what
another fine-tuning starts from. Must not know shards or stages.

The config of a classifier, of a run's as of a folder's, has the encoder it was made from as `model`, and the size of
the classifier's images as finetune.input_size; classifier_config makes the classifier's own shape of these.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Classifier
from beitforge.pipeline.model.resize import for_finetuning
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.weights.encoder import (
    CLASSIFIER,
    Trained,
    class_names,
    fine_tuned,
    refuse_other_shapes,
    refuse_others,
    run_config,
    trained_weights,
    write_folder,
)

Shapes = dict[str, tuple[int, ...]]
_HEAD = "head.weight"


def save_classifier(
    folder: Path, weights: dict[str, Tensor], config: Config, names: tuple[str, ...], state: State, source: str = ""
) -> None:
    """Write a classifier's folder, each file by rename. names: of the classes in the order of their labels, () where
    nobody said; source: what it was imported from, if it was. Raises ConfigError where these do not belong together."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    stream_classifier(folder, Trained(shapes, lambda: iter(weights.items()), state), config, names, source)


def stream_classifier(folder: Path, weights: Trained, config: Config, names: tuple[str, ...], source: str = "") -> None:
    """As save_classifier, with no more than one tensor in memory."""
    classes = refuse_no_classifier(config, weights.shapes, folder)
    if names and len(names) != classes:
        raise ConfigError(f"{len(names)} names were given for {classes} classes; give one for each, or none")
    said = {"kind": CLASSIFIER, "num_classes": classes, "classes": list(names)}
    write_folder(folder, said, weights, config, source)


def classifier_config(config: Config, shapes: Shapes) -> Config:
    """The config whose `model` is the shape of the classifier that has weights of these shapes: finetune.input_size,
    and positions as the weights have them."""
    own, shared = "blocks.0.attention.own_bias.table" in shapes, "shared_bias.table" in shapes
    positions = "relative" if own else "relative_shared" if shared else "absolute"
    model = dataclasses.replace(config.model, input_size=config.finetune.input_size, positions=positions)
    return dataclasses.replace(config, model=model)


def num_classes(shapes: Shapes) -> int:
    """How many classes a classifier's head tells apart; 0 without one."""
    return shapes[_HEAD][0] if _HEAD in shapes else 0


def refuse_no_classifier(config: Config, shapes: Shapes, source: Path) -> int:
    """The number of classes, 0 without a head. Raises ConfigError when weights of these shapes, read from `source`, are
    not a classifier's of this config."""
    classes = num_classes(shapes)
    with torch.device("meta"):
        wanted = Classifier(classifier_config(config, shapes).model, classes).state_dict()
    if {name: tuple(tensor.shape) for name, tensor in wanted.items()} != shapes:
        raise ConfigError(f"the weights in {source} are no classifier's of its config; is it a fine-tuning's?")
    return classes


def build_classifier(config: Config, weights: dict[str, Tensor], source: Path) -> Classifier:
    """A classifier for use: with these weights, and kernels for whatever device it is on.

    Raises ConfigError when the weights, read from `source`, are not a classifier's of this config.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    classes = refuse_no_classifier(config, shapes, source)
    model = dataclasses.replace(classifier_config(config, shapes).model, kernels="auto")
    classifier = Classifier(model, classes, config.finetune.pooling)
    classifier.load_state_dict(weights)
    return classifier.eval()


def load_classifier(
    folder: Path, checkpoint: tuple[Path, State] | None = None
) -> tuple[Classifier, Config, tuple[str, ...]]:
    """The classifier of a fine-tuning run's newest checkpoint, or an exported or imported one, its config (`model` is
    its own shape) and the names of its classes, () where nobody said.

    checkpoint: as `trained_weights` takes it. Raises ConfigError when the folder holds none.
    """
    config = run_config(folder)
    if not fine_tuned(folder):
        raise ConfigError(f"{folder} holds an encoder of a pretraining, which has no classes: `finetune` trains them")
    found = trained_weights(folder, checkpoint)
    classifier = build_classifier(config, found.all(), folder)
    names, classes = class_names(folder), num_classes(found.shapes)
    if names and len(names) != classes:
        raise ConfigError(f"{folder} is damaged ({len(names)} names for {classes} classes); make it again")
    return classifier, classifier_config(config, found.shapes), names


def initialise_classifier_from(
    folder: Path, classifier: Classifier, model: Model, checkpoint: tuple[Path, State] | None = None
) -> str:
    """Load an encoder, of a run folder, exported or imported, into a classifier for images of its own size; returns
    a line that says what was taken. The head stays as it was drawn.

    model: the config's. checkpoint: as `trained_weights` takes it. Raises ConfigError when the two are of different
    shape, or there are no weights.
    """
    config, found = run_config(folder), trained_weights(folder, checkpoint)
    refuse_other_shapes(f"finetune.init {folder}", config.model, model)
    refuse_others(config, found.shapes, folder)
    size = classifier.model.input_size
    weights, _ = for_finetuning(found.all(), config.model, size, classifier.pooling)
    head = {name: tensor for name, tensor in classifier.state_dict().items() if name.startswith("head.")}
    classifier.load_state_dict(weights | head)
    resized = f", its {config.model.input_size} px windows laid on {size}" if size != config.model.input_size else ""
    return f"starting from step {found.state.step} of {folder}{resized}"
