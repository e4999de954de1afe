"""Streams of labelled images, put together from a config: fine-tuning, its test, k-NN, and a share of the labels.

Must not know model, deepspeed or any stage.
"""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.augment import RandAugment, supervised_draws
from beitforge.pipeline.data.pretraining import DataSource, evaluation, image_set, order_of
from beitforge.pipeline.errors import ConfigError
from beitforge.shards.format.index import FLAG_LABELLED
from beitforge.shards.format.views import ViewPolicy
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.label_subset import Subset, chosen_rows
from beitforge.shards.stream.loader import SampleOrder, Stream
from beitforge.shards.stream.view_sources import DrawnViews


def supervised(config: Config) -> DataSource:
    """data.labelled_images, or the chosen share of each class, under fresh views every epoch, augmented; in pairs where
    images are mixed.

    Raises ConfigError for images without labels, and for what timm does not do.
    """
    tune, seed = config.finetune, config.data.seed
    images = image_set(config, config.data.labelled_images)
    require_labels(images, "data.labelled_images", "fine-tuning")
    policy = ViewPolicy(
        seed=seed,
        area_min=tune.area_min,
        area_max=tune.area_max,
        flip=tune.flip,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
    )
    augment = None
    if tune.randaugment:
        augment = RandAugment(tune.randaugment, tune.input_size, config.model.mean, seed)
    stream = Stream(
        images=images,
        places=_labelled_order(config, images),
        source=DrawnViews(policy),
        size=tune.input_size,
        decoder=config.loader.processor_decoder,
        seed=seed,
        draw=functools.partial(supervised_draws, tune, config.model.layers, seed),
        augment=augment,
    )
    return DataSource(stream, images.manifest.fingerprint, "", paired=tune.mixes)


def _labelled_order(config: Config, images: ImageSet) -> SampleOrder:
    places = order_of(config, images, config.finetune.epoch_multiple)
    share = config.finetune.label_share
    return places if share == 1.0 else Subset(chosen_rows(images, share, config.data.seed), places.policy)


def share_of(config: Config, source: DataSource, share: float, seed: int) -> DataSource:
    """A share of the labelled images of a source, as label_share has it, each once an epoch."""
    images = source.stream.images
    places = Subset(chosen_rows(images, share, seed), order_of(config, images).policy)
    return dataclasses.replace(source, stream=dataclasses.replace(source.stream, places=places))


def supervised_test(config: Config) -> DataSource | None:
    """data.labelled_test for fine-tuning, or None. Raises ConfigError when its labels are not those trained on."""
    if not config.data.labelled_test:
        return None
    source = as_tested(config, config.data.labelled_test, "data.labelled_test", "fine-tuning")
    refuse_other_classes(image_set(config, config.data.labelled_images), source.stream.images)
    return source


def as_tested(config: Config, where: str, what: str, who: str) -> DataSource:
    """The images of a labelled set in manifest order, each as fine-tuning's test sees it. what, who: as of
    require_labels, which is asked."""
    source = evaluation(config, where, config.finetune.input_size, config.finetune.test_share)
    require_labels(source.stream.images, what, who)
    return source


def refuse_other_classes(
    images: ImageSet, test: ImageSet, trained_on: str = "data.labelled_images", tested_on: str = "data.labelled_test"
) -> None:
    """Raise ConfigError when a label of the test set is another class's than in the set trained on."""
    names = zip(test.manifest.classes, images.manifest.classes, strict=False)
    for label, (theirs, ours) in enumerate(names):
        if theirs != ours:
            raise ConfigError(
                f"{tested_on} has class {theirs!r} as label {label}, {trained_on} {ours!r}: pack both from folders of "
                f"the same classes, or as one with --split"
            )


def require_labels(images: ImageSet, what: str, who: str) -> None:
    """Raise ConfigError unless every image has a label from 0 on; `what` names the set, `who` needs them."""
    for shard, entry in enumerate(images.manifest.shards):
        index = images.index(shard)
        if not (index.flags & FLAG_LABELLED).all() or index.label.min(initial=0) < 0:
            raise ConfigError(
                f"{what} ({images.folder}): {entry.name} has images without a label (.cls with a number from 0 on); "
                f"{who} needs labelled shards: pack a folder per class"
            )


def num_classes(images: ImageSet) -> int:
    """The largest label, and one more for 0."""
    return max(labels_of(images), default=0) + 1


def labels_of(images: ImageSet) -> set[int]:
    """The labels that images of a set have."""
    shards = range(len(images.manifest.shards))
    return {label for shard in shards for label in np.unique(images.index(shard).label).tolist()}


@dataclass
class _Spread:
    """`samples` of the images of a set, evenly spaced: a set may be sorted by class."""

    places: SampleOrder
    samples: int

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.places.locate(samples * self.places.samples // self.samples)


def labelled(config: Config, where: str, at_most: int) -> DataSource:
    """`at_most` images of a labelled set, from all over it, in manifest order; central views of the encoder's size.

    Raises ConfigError when the set has no labels, or all the same.
    """
    source = evaluation(config, where)
    images = source.stream.images
    if not images.manifest.classes:  # adopted, not packed from folders: the indexes say
        require_labels(images, "the labelled set", "k-NN")
    if (len(images.manifest.classes) or num_classes(images)) < 2:
        raise ConfigError(
            f"{where} has fewer than two classes; pack a folder with one folder a class, or leave data.labelled_images "
            f"and data.labelled_test empty"
        )
    return subsample(source, at_most)


def subsample(source: DataSource, at_most: int) -> DataSource:
    """`at_most` of the images of a source, from all over it."""
    places = source.stream.places
    spread = _Spread(places, min(at_most, places.samples))
    return dataclasses.replace(source, stream=dataclasses.replace(source.stream, places=spread))
