"""What a script of one's own needs, as `beitforge.NAME`; docs/python.md has an example of each.

The functions put existing parts together, with plain values in place of a config file.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.evaluation.probe import feature_depth
from beitforge.pipeline.model.beit import Classifier, Encoder
from beitforge.pipeline.model.pixels import normalise
from beitforge.pipeline.tokenizers import storage
from beitforge.pipeline.tokenizers.storage import VisualTokenizer
from beitforge.pipeline.tokenizers.user_class import user_kind
from beitforge.pipeline.weights import classifier as from_folder
from beitforge.pipeline.weights.encoder import fine_tuned, run_config
from beitforge.pipeline.weights.from_run import encoder_of
from beitforge.shards.decode.codec import crop
from beitforge.shards.format.views import ViewPolicy, central_views
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import (
    TORCH,
    Batch,
    BatchSampler,
    SampleOrder,
    SequentialOrder,
    Stream,
    cut_into,
    load,
)
from beitforge.shards.stream.order import Order, OrderPolicy, rank_batches
from beitforge.shards.stream.view_sources import CentralViews, DrawnViews, RecordedViews, ViewSource

OneImage = Image.Image | np.ndarray
Images = OneImage | Sequence[OneImage] | Tensor

_ENDLESS = 2**40  # batches: more than any run takes, and their sample numbers fit 64 bits


def stream(
    images: ImageSet,
    tokens: RecordedViews | None = None,
    *,
    size: int | tuple[int, int],
    batch_size: int,
    shuffle: bool = True,
    rank: int = 0,
    world: int = 1,
    first_sample: int = 0,
    batches: int | None = None,
    order: OrderPolicy | None = None,
    views: ViewPolicy | None = None,
    resample: str = TORCH,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Iterate over a rank's batches of an image set: uint8 pixels [batch_size, 3, H, W] with labels and, given a token
    set, the visual tokens of the same views.

    With shuffle, the stream of pretraining: sample s of the order is the same for any world and batch size, epoch
    follows epoch, and it ends after `batches`, or never. Restart it anywhere: batch b of all ranks together takes the
    samples from first_sample + b · batch_size · world on. Without, each sample from first_sample on once over all
    ranks, in the order of the manifest; the last batch may be short.

    size: H, W in pixels. Views are those recorded with the tokens; else drawn from `views` anew in every epoch; else,
    without shuffle, the central part of each image. resample: "torch bicubic", "torch lanczos", or Pillow's "bicubic",
    "lanczos". workers: processes that build batches, each `prefetch` ahead; 0 builds them here. Raises ShardError for a
    shard that cannot be read.
    """
    if tokens is not None and views is not None:
        raise ValueError("tokens come with the views they were made from: give tokens or views, not both")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; it lies in 0 … world - 1, and world is {world}")
    if batch_size < 1 or first_sample < 0:
        raise ValueError(f"batch_size is {batch_size}, at least 1, and first_sample {first_sample}, at least 0")
    policy, (height, width) = order or OrderPolicy(), (size, size) if isinstance(size, int) else size
    counts = images.manifest.counts
    source: ViewSource = tokens or CentralViews(width / height)
    if tokens is None and (shuffle or views is not None):
        source = DrawnViews(views or ViewPolicy())
    places: SampleOrder = Order(counts, policy) if shuffle else SequentialOrder(counts)
    found = Stream(
        images=images, places=places, source=source, size=(height, width), resample=resample, seed=policy.seed
    )
    numbers: BatchSampler
    if shuffle:
        numbers = rank_batches(
            first_sample=first_sample,
            global_batch=batch_size * world,
            micro_batch=batch_size,
            rank=rank,
            world=world,
            steps=_ENDLESS if batches is None else batches,
        )
    else:
        numbers = _in_turn(range(first_sample + rank, places.samples, world), batch_size)[:batches]
    return load(found, numbers, workers=workers, prefetch=prefetch, pin=torch.cuda.is_available())


def _in_turn(samples: range, batch_size: int) -> list[np.ndarray]:
    """Numbers of samples, cut into batches; the last may be short."""
    mine = np.array(samples, dtype=np.int64)
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Images to a batch of pixels as a model was trained on: the central part, resized, normalised.

    size: H, W in pixels. share: of the sides of the largest central part that has this shape. resample: as of `stream`.
    """

    size: Size
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resample: str = TORCH
    share: float = 0.875

    def __call__(self, images: Images) -> Tensor:
        """float32 [B, 3, H, W] from a PIL image, an array [h, w, 3] or [B, h, w, 3], or a sequence of the first two of
        any sizes, where floats lie in [0, 1] and are rounded to 8 bits.

        A tensor [B, 3, H, W], uint8 or floats in [0, 1], such as a stream's pixels, is only normalised, on its device.
        Raises ValueError for anything else.
        """
        if isinstance(images, Tensor):
            return normalise(self._fitting(images), self.mean, self.std)
        one = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4)
        many = cast(Iterable[OneImage], [images] if one else images)
        cut = [self._cut(image) for image in many]
        if not cut:
            raise ValueError("no image was given")
        return normalise(torch.stack(cut).float() / 255, self.mean, self.std)

    def _fitting(self, pixels_BCHW: Tensor) -> Tensor:
        if pixels_BCHW.shape[1:] != (3, *self.size):
            raise ValueError(
                f"the tensor has shape {list(pixels_BCHW.shape)}, not [B, 3, {self.size.height}, {self.size.width}]: "
                f"give images as arrays [h, w, 3], which are resized"
            )
        return pixels_BCHW.float() / 255 if pixels_BCHW.dtype == torch.uint8 else pixels_BCHW.float()

    def _cut(self, image: OneImage) -> Tensor:
        """The central part of one image, uint8 [3, H, W]."""
        array = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            what = f"an array of shape {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"an image is PIL's or an array [h, w, 3], not {what}")
        if np.issubdtype(array.dtype, np.floating):
            if not (array.min() >= 0 and array.max() <= 1):
                raise ValueError(f"floats lie in [0, 1], not in [{array.min():g}, {array.max():g}]")
            array = np.rint(array * 255).astype(np.uint8)
        if array.dtype != np.uint8:
            raise ValueError(f"an image's array is uint8, or of floats in [0, 1], not {array.dtype}")
        height, width = array.shape[:2]
        view = central_views(np.array([width]), np.array([height]), self.size.width / self.size.height, self.share)
        part = np.array(crop(array, view.boxes[0].tolist()))
        out = torch.empty((3, *self.size), dtype=torch.uint8)
        cut_into(out, part, False, [0, 255], self.resample)
        return out


def load_encoder(where: Path | str, *, device: torch.device | str = "cpu") -> tuple[Encoder, Preprocess]:
    """The encoder of an exported or imported folder, or of a run folder's newest checkpoint, with its preprocessing.

    Returns a torch module in float32 and evaluation mode: a Beit with its head over tokens, or a Classifier, which
    `load_classifier` gives with the names of its classes. Raises ConfigError when the folder holds none.
    """
    folder = Path(where)
    if fine_tuned(folder):
        loaded = load_classifier(folder, device=device)
        return loaded.module, loaded.preprocess
    encoder = encoder_of(run_config(folder), folder, "pretrain").to(device)
    model = encoder.model
    return encoder, Preprocess(size=model.input_size, mean=model.mean, std=model.std)


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier with the preprocessing of fine-tuning's test. names: of its classes, () where nobody said."""

    module: Classifier
    preprocess: Preprocess
    names: tuple[str, ...]
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Logits float32 [B, classes] of whatever Preprocess takes."""
        return self.module(self.preprocess(images).to(self.device))


def load_classifier(where: Path | str, *, device: torch.device | str = "cpu") -> ImageClassifier:
    """The classifier of an exported or imported folder, or of the newest checkpoint of a fine-tuning. Raises
    ConfigError when the folder holds none."""
    loaded, place = from_folder.load_classifier(Path(where)), torch.device(device)
    model = loaded.config.model
    share = loaded.config.finetune.test_share
    preprocess = Preprocess(size=model.input_size, mean=model.mean, std=model.std, share=share)
    return ImageClassifier(loaded.classifier.to(place), preprocess, loaded.names, place)


class Features(NamedTuple):
    """What an encoder makes of a batch: patches [B, N, D] in row order, and pooled [B, D], their mean."""

    pooled: Tensor
    patches: Tensor


@torch.no_grad()
def features(encoder: Encoder, pixels_BCHW: Tensor, *, layer: int | None = None) -> Features:
    """Features of preprocessed pixels after block `layer`, counted from 1; 0 is the embedding.

    layer: by default after two thirds of the blocks, where a pretrained encoder is usually best; `probe` compares them.
    """
    layers = encoder.model.layers
    layer = feature_depth(layers) if layer is None else layer
    if not 0 <= layer <= layers:
        raise ValueError(f"layer is {layer}; this encoder has layers 0 to {layers}")
    patches_BND = encoder.hidden(pixels_BCHW, None, every=True)[layer][:, 1:]
    return Features(patches_BND.mean(dim=1), patches_BND)


@dataclass(frozen=True)
class ImageTokenizer:
    """A tokenizer with its preprocessing. identity: its kind, fingerprint, vocabulary, grid, input_size and filter."""

    module: VisualTokenizer
    preprocess: Preprocess
    identity: dict
    device: torch.device

    @property
    def vocabulary(self) -> int:
        """The number of different tokens."""
        return self.identity["vocabulary"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens an image becomes."""
        rows, columns = self.identity["grid"]
        return rows, columns

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Visual tokens i64 [B, N], in row order, of whatever Preprocess takes."""
        return self.module.tokenize(self.preprocess(images).to(self.device))

    @torch.no_grad()
    def decode(self, tokens_BN: Tensor) -> Tensor:
        """Pixels float32 [B, 3, H, W] in [0, 1] from visual tokens. Raises ValueError when this kind does not decode to
        pixels."""
        if not self.module.decodes:
            raise ValueError(f"a tokenizer of kind {self.identity['kind']} does not decode to pixels")
        return self.module.decode(tokens_BN.to(self.device), self.grid)


def load_tokenizer(where: Path | str, *, device: torch.device | str = "cpu") -> ImageTokenizer:
    """The tokenizer in a folder, of whatever kind. Raises ConfigError when the folder holds none."""
    module, identity = storage.load_tokenizer(Path(where))
    place = torch.device(device)
    preprocess = Preprocess(size=Size(*identity["input_size"]), resample=identity["filter"])
    return ImageTokenizer(module.to(place), preprocess, identity, place)


def save_tokenizer(
    where: Path | str,
    module: nn.Module,
    *,
    shape: dict,
    size: int | tuple[int, int],
    resample: str = "lanczos",
) -> str:
    """Write a tokenizer of a class of one's own to a folder, for `tokenize` and `pretrain`; returns its fingerprint.

    The module does what VisualTokenizer (pipeline.tokenizers.storage) says. shape: the arguments its class is
    built from, with `vocabulary` among them; size: of the views it is given, in pixels, cut with the filter `resample`.
    The folder names the class as module:Class, so wherever it is loaded Python must find that module. Raises
    ConfigError when it could not be loaded again.
    """
    kind = user_kind(module, shape)
    views = Size(size, size) if isinstance(size, int) else Size(*size)
    return storage.save_tokenizer(Path(where), module.state_dict(), kind, shape, views, resample)
