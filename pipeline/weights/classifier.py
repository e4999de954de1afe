"""Classifiers: a fine-tuned BEiT with its norm and head whole, out of a run or as a folder of its own, and as what
another fine-tuning starts from. Must not know shards or stages.

The config of a classifier, of a run's as of a folder's, has the encoder it was made from as `model`, and the size of
the classifier's images as finetune.input_size; classifier_config makes the classifier's own shape of these.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Classifier
from beitforge.pipeline.model.resize import finetuned_model, for_finetuning
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.runs.record import CLASSIFIER
from beitforge.pipeline.weights.encoder import (
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
NO_CLASSIFIER = "holds an encoder of a pretraining, which has no classes: `finetune` trains them"
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


@dataclass(frozen=True)
class LoadedClassifier:
    """For use on the CPU, in float32. config: its `model` is the classifier's own shape. names: of its classes, ()
    where nobody said."""

    classifier: Classifier
    config: Config
    names: tuple[str, ...]
    classes: int
    state: State


def load_classifier(
    folder: Path, checkpoint: tuple[Path, State] | None = None, average: bool = False
) -> LoadedClassifier:
    """The classifier of a fine-tuning run's newest checkpoint, or an exported or imported one.

    checkpoint, average: as `trained_weights` takes them. Raises ConfigError when the folder holds none.
    """
    config = run_config(folder)
    if not fine_tuned(folder):
        raise ConfigError(f"{folder} {NO_CLASSIFIER}")
    found = trained_weights(folder, checkpoint, average)
    classifier = build_classifier(config, found.all(), folder)
    own, classes = classifier_config(config, found.shapes), num_classes(found.shapes)
    return LoadedClassifier(classifier, own, _names(folder, classes), classes, found.state)


def initialise_classifier_from(
    folder: Path,
    classifier: Classifier,
    model: Model,
    names: tuple[str, ...] = (),
    checkpoint: tuple[Path, State] | None = None,
) -> str:
    """Load an encoder or a classifier, of a run folder, exported or imported, into a classifier for images of its own
    size; returns a line that says what was taken.

    Of an encoder the head stays as it was drawn. Of a classifier the norm is taken, and the head where it is over as
    many classes, of the same names where both sides have them, which need not be in the same order. model: the
    config's. names: of the classes to train. checkpoint: as `trained_weights` takes it. Raises ConfigError when the two
    are of different shape, or there are no weights.
    """
    config, found = run_config(folder), trained_weights(folder, checkpoint)
    what, size = f"finetune.init {folder}", classifier.model.input_size
    if fine_tuned(folder):
        line, theirs = _take_classifier(folder, config, found, classifier, names, what)
    else:
        refuse_other_shapes(what, config.model, model)
        refuse_others(config, found.shapes, folder)
        _load(classifier, for_finetuning(found.all(), config.model, size, classifier.pooling)[0])
        line, theirs = "", config.model
    resized = f", its {theirs.input_size} px windows laid on {size}" if size != theirs.input_size else ""
    return f"starting from step {found.state.step} of {folder}{resized}{line}"


def _take_classifier(
    folder: Path, config: Config, found: Trained, classifier: Classifier, names: tuple[str, ...], what: str
) -> tuple[str, Model]:
    """Load another classifier's weights; returns what was taken beside the encoder, and the other's shape."""
    theirs, size = classifier_config(config, found.shapes).model, classifier.model.input_size
    refuse_other_shapes(what, finetuned_model(theirs, size), classifier.model)
    if config.finetune.pooling != classifier.pooling:
        raise ConfigError(
            f"{what} has finetune.pooling {config.finetune.pooling}, this config says {classifier.pooling}; make them "
            f"equal"
        )
    classes = refuse_no_classifier(config, found.shapes, folder)
    weights, wanted = found.all(), len(classifier.get_parameter(_HEAD))
    order, why = _rows(_names(folder, classes), classes, _first(names, wanted), wanted)
    kept = for_finetuning(weights, theirs, size)[0] | {n: w for n, w in weights.items() if n.startswith("norm.")}
    if why:
        _load(classifier, kept)
        return f", with its norm and a new head over {wanted} classes: {why}", theirs
    _load(classifier, kept | {n: w[order] for n, w in weights.items() if n.startswith("head.")})
    return f", with its norm and its head over {classes} classes", theirs


def _rows(theirs: tuple[str, ...], classes: int, names: tuple[str, ...], wanted: int) -> tuple[list[int], str]:
    """Which row of a head over `classes` each of the wanted classes has, or in words why that head does not fit."""
    if not classes:
        return [], "it has none"
    if classes != wanted:
        return [], f"it has {classes}"
    if not (theirs and names) or theirs == names:
        return list(range(classes)), ""
    if len(set(theirs)) < classes or set(theirs) != set(names):
        label = next((label for label, name in enumerate(names) if name not in theirs), 0)
        return [], f"class {label} is {shown(names[label])}, which it does not have under this name"
    return [theirs.index(name) for name in names], ""


def _load(classifier: Classifier, weights: dict[str, Tensor]) -> None:
    """Load weights; a head that is not among them stays as it was drawn."""
    head = {name: tensor for name, tensor in classifier.state_dict().items() if name.startswith("head.")}
    classifier.load_state_dict(head | weights)


def _names(folder: Path, classes: int) -> tuple[str, ...]:
    """What the classes are called; of a run the set names them, whose last ones may have no image to learn from."""
    return _first(class_names(folder), classes)


def _first(names: tuple[str, ...], classes: int) -> tuple[str, ...]:
    return names[:classes] if len(names) >= classes else ()
