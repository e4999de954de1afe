"""The project's data streams, put together from a config: pretraining, held-out, tokenizer training, evaluation.

Fine-tuning's are in pipeline.data.labelled. Where shards meet masking: the mask and the drop path of sample s are drawn
from (seed, s). Must not know model, deepspeed or any stage.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import ONLINE, Config, Mask, Model, View
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.masking import draw_masks, kept_branches
from beitforge.pipeline.tokenizers.storage import VisualTokenizer, load_tokenizer, require_filter, stated_fingerprint
from beitforge.shards import counter_rng
from beitforge.shards.format.manifest import read_token_manifest
from beitforge.shards.format.views import ARITHMETIC, READ_ARITHMETICS, ViewPolicy
from beitforge.shards.storage.remote import cache_for
from beitforge.shards.stream.batch_plan import Draw
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import SampleOrder, SequentialOrder, Stream
from beitforge.shards.stream.order import ARITHMETIC as ORDER_ARITHMETIC
from beitforge.shards.stream.order import Order, OrderPolicy
from beitforge.shards.stream.view_sources import CentralViews, DrawnViews, RecordedViews, ViewSource


def view_policy(view: View) -> ViewPolicy:
    """The shards' form of the config's view section."""
    names = [field.name for field in dataclasses.fields(ViewPolicy)]
    return ViewPolicy(**{name: getattr(view, name) for name in names})


def policy_record(policy: ViewPolicy) -> dict:
    """What token shards say of their views: the policy, and the arithmetic that turns records into pixels."""
    return {**dataclasses.asdict(policy), "arithmetic": ARITHMETIC}


def sample_draws(mask: Mask, model: Model, seed: int, samples: np.ndarray) -> dict[str, np.ndarray]:
    """What a pretraining sample draws: mask bool [B, N] and, with drop path, keep bool [B, L, 2]."""

    def uniform(which: np.ndarray, tries: range) -> np.ndarray:
        attempts, numbers = np.arange(tries.start, tries.stop)[:, None], np.arange(4)
        return counter_rng.uniform(counter_rng.MASK, seed, samples[which, None, None], 0, attempts, numbers)

    def fill(which: np.ndarray) -> np.ndarray:
        return counter_rng.uniform(counter_rng.MASK, seed, samples[which, None], 1, 0, np.arange(model.num_patches))

    def branch(number: np.ndarray) -> np.ndarray:
        return counter_rng.uniform(counter_rng.DROP_PATH, seed, samples[:, None, None], number)

    drawn = {"mask": draw_masks(mask, model.grid, len(samples), uniform, fill)}
    if model.drop_path > 0:
        drawn["keep"] = kept_branches(model.drop_path, model.layers, branch)
    return drawn


def image_set(config: Config, where: str) -> ImageSet:
    """The image set in a folder or behind a URL."""
    return ImageSet(where, cache_for(where, config.data.cache, config.data.cache_gb), config.loader.chunk)


def order_of(config: Config, images: ImageSet, multiple: int = 1) -> Order:
    """The order of samples (docs/formats.md), of the config's loader section. multiple: what an epoch's samples are a
    multiple of."""
    loader = config.loader
    policy = OrderPolicy(
        seed=config.data.seed, chunk=loader.chunk, window=loader.window, lanes=loader.lanes, multiple=multiple
    )
    return Order(images.manifest.counts, policy)


@dataclass(frozen=True)
class DataSource:
    """A stream with the names of what it reads, for checkpoints: fingerprints of the image and token sets. paired: its
    micro batches hold each sample's partner, too (shards.stream.order.RankBatches)."""

    stream: Stream
    images: str
    tokens: str
    paired: bool = False

    @property
    def samples(self) -> int:
        """Of one epoch."""
        return self.stream.places.samples


def fingerprints(sources: Mapping[str, DataSource | None]) -> dict[str, str]:
    """What the sources read, or 'none', by 'image set' and 'token set' behind each one's word; and in what order."""
    found = {"arithmetic of the order": str(ORDER_ARITHMETIC)}
    for word, source in sources.items():
        found[f"{word}image set"] = source.images if source else "none"
        found[f"{word}token set"] = source.tokens if source else "none"
    return found


def pretraining(config: Config) -> DataSource:
    """Image shards with their token shards, in the order of docs/formats.md. Raises ShardError or ConfigError."""
    images = image_set(config, config.data.images)
    draw = functools.partial(sample_draws, config.mask, config.model, config.data.seed)
    places = order_of(config, images, config.train.epoch_multiple)
    return _pairs(config, images, config.data.tokens, places, draw, view_policy(config.view))


def heldout(config: Config) -> DataSource:
    """The held-out pairs in manifest order, each always with the same view and mask; where tokens are online, a view
    that no training draws, so that images trained on can be held out too."""
    images = image_set(config, config.data.heldout_images)
    draw = functools.partial(_heldout_draws, config.mask, config.model, config.data.seed)
    places = SequentialOrder(images.manifest.counts)
    return _pairs(config, images, config.data.heldout_tokens, places, draw, _untrained_views(config))


def seen_views(config: Config) -> DataSource:
    """The pairs of training in its order, under held-out masks and without drop path: of the first epoch's samples the
    views that the first epoch trains on."""
    images = image_set(config, config.data.images)  # of its own: training's keeps note of where training reads
    draw = functools.partial(_heldout_draws, config.mask, config.model, config.data.seed)
    places = order_of(config, images, config.train.epoch_multiple)
    return _pairs(config, images, config.data.tokens, places, draw, view_policy(config.view))


def new_views(config: Config) -> DataSource:
    """The images of seen_views under the same masks, each in a view that no training draws, tokens online."""
    images = image_set(config, config.data.images)
    draw = functools.partial(_heldout_draws, config.mask, config.model, config.data.seed)
    places = order_of(config, images, config.train.epoch_multiple)
    return _pairs(config, images, ONLINE, places, draw, _untrained_views(config))


def _untrained_views(config: Config) -> ViewPolicy:
    return dataclasses.replace(view_policy(config.view), seed=~config.view.seed)


def _pairs(
    config: Config, images: ImageSet, tokens: str, places: SampleOrder, draw: Draw, online: ViewPolicy
) -> DataSource:
    """Images with their recorded tokens or, where `tokens` is online, with the view a tokenizer makes them of."""
    source: ViewSource
    if tokens == ONLINE:
        _, identity = fitting_tokenizer(config)
        source, named = DrawnViews(online), _online_name(config, identity, images)
        (height, width), resample = identity["input_size"], identity["filter"]
    else:
        source = recorded_views(config, images, tokens)
        named, (height, width), resample = source.tokens.manifest.fingerprint, (0, 0), "lanczos"
    stream = Stream(
        images=images,
        places=places,
        source=source,
        size=config.model.input_size,
        tokenizer_size=(height, width),
        tokenizer_resample=resample,
        decoder=config.loader.decoder,
        seed=config.data.seed,
        draw=draw,
    )
    return DataSource(stream, images.manifest.fingerprint, named)


def _online_name(config: Config, identity: dict, images: ImageSet) -> str:
    """Everything that online tokens depend on beside the view section, which is part of a run's identity."""
    arithmetic = _arithmetic(images)
    return f"online from {identity['fingerprint']} in {config.tokenizer.precision}, views of arithmetic {arithmetic}"


def _arithmetic(images: ImageSet) -> int:
    """Of the views that are drawn of a set: that of earlier versions, where its indexes have no tone tables."""
    return ARITHMETIC if images.index(0).has_tones else READ_ARITHMETICS[0]


def fitting_tokenizer(config: Config) -> tuple[VisualTokenizer, dict]:
    """The tokenizer in data.tokenizer and its identity, refused unless grid and vocabulary are the config's."""
    folder = config.data.tokenizer
    tokenizer, identity = load_tokenizer(Path(folder))
    cure = "train or import one that fits this config, or set the tokenizer section to what it is"
    if identity["grid"] != list(config.model.grid):
        raise ConfigError(
            f"{folder} gives a grid of {identity['grid']} tokens, the encoder {list(config.model.grid)} patches: {cure}"
        )
    if identity["vocabulary"] != config.tokenizer.vocabulary:
        raise ConfigError(
            f"{folder} has a vocabulary of {identity['vocabulary']}, tokenizer.vocabulary says "
            f"{config.tokenizer.vocabulary}: {cure}"
        )
    return tokenizer, identity


def _heldout_draws(mask: Mask, model: Model, seed: int, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Masks apart from those of training, and no drop path."""
    return {"mask": sample_draws(mask, model, ~seed, samples)["mask"]}


def recorded_views(config: Config, images: ImageSet, folder: str) -> RecordedViews:
    """The pairs of `images` with the tokens in `folder`, refused unless they are what this config asks for."""
    source = RecordedViews(images, folder, cache_for(folder, config.data.cache, config.data.cache_gb))
    manifest = source.tokens.manifest
    grid = list(config.model.grid)
    cure = "run `tokenize` with this config, or point data.tokens at the set made with it"
    if manifest.tokenizer["grid"] != grid:
        raise ConfigError(f"{folder} has a token grid of {manifest.tokenizer['grid']}, the encoder {grid}: {cure}")
    if manifest.tokenizer["vocabulary"] != config.tokenizer.vocabulary:
        raise ConfigError(
            f"{folder} has a vocabulary of {manifest.tokenizer['vocabulary']}, tokenizer.vocabulary says "
            f"{config.tokenizer.vocabulary}: {cure}"
        )
    stated = {f"view.{name}": value for name, value in manifest.policy.items()}
    if stated.get("view.arithmetic") in READ_ARITHMETICS:
        stated["view.arithmetic"] = ARITHMETIC
    wanted = {f"view.{name}": value for name, value in policy_record(view_policy(config.view)).items()}
    stated["tokenizer.precision"] = manifest.tokenizer.get("precision")
    for name, value in {**wanted, "tokenizer.precision": config.tokenizer.precision}.items():
        if stated.get(name) != value:
            raise ConfigError(f"{folder} was made with {name} {stated.get(name)}, here it is {value}: {cure}")
    if manifest.num_views != config.view.num_views:
        raise ConfigError(
            f"{folder} has {manifest.num_views} views an image, view.num_views says {config.view.num_views}: {cure}"
        )
    return source


def refuse_other_tokenizers(config: Config) -> None:
    """Raise ConfigError when token shards were made by another tokenizer than the one in data.tokenizer, if one is."""
    stated = stated_fingerprint(Path(config.data.tokenizer))
    folders = (config.data.tokens, config.data.heldout_tokens)
    for folder in (folder for folder in folders if folder not in ("", ONLINE)):
        cache = cache_for(folder, config.data.cache, config.data.cache_gb) if stated is not None else None
        if stated is not None and stated != read_token_manifest(folder, cache).tokenizer["fingerprint"]:
            raise ConfigError(
                f"{folder} was made by another tokenizer than the one in {config.data.tokenizer}: run `tokenize` with "
                f"this config, or point data.tokenizer at the tokenizer the set was made with"
            )


def tokenizer_training(config: Config) -> DataSource:
    """Images under fresh views every epoch, at the tokenizer's size and filter."""
    require_filter(config.tokenizer.filter, "tokenizer.filter")
    images = image_set(config, config.data.images)
    stream = Stream(
        images=images,
        places=order_of(config, images),
        source=DrawnViews(view_policy(config.view)),
        size=config.tokenizer.input_size,
        resample=config.tokenizer.filter,
        decoder=config.loader.exact_decoder,
        seed=config.data.seed,
    )
    drawn = "" if _arithmetic(images) == READ_ARITHMETICS[0] else f"views of arithmetic {ARITHMETIC}"
    return DataSource(stream, images.manifest.fingerprint, drawn)


def evaluation(config: Config, where: str, size: Size | None = None, share: float = 0.875) -> DataSource:
    """Images in manifest order, central views of the encoder's size, or of `size`; share: of the largest's sides."""
    images, size = image_set(config, where), size or config.model.input_size
    places = SequentialOrder(images.manifest.counts)
    source = CentralViews(size.width / size.height, share)
    stream = Stream(images=images, places=places, source=source, size=size, decoder=config.loader.processor_decoder)
    return DataSource(stream, images.manifest.fingerprint, "")
