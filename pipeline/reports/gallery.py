"""The images of a report, as HTML: reconstructions, attention maps and nearest neighbours.

These sections take seconds to make; a live page makes them once a checkpoint. What cannot be made is named in a note
with the reason. Must not know any stage.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.pipeline.data.batches import evaluation_batches
from beitforge.pipeline.data.pretraining import DataSource, evaluation, fitting_tokenizer, heldout, pretraining
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.evaluation.attention_maps import attention_maps
from beitforge.pipeline.evaluation.neighbours import FeatureBank, agreement, by_features, by_pixels, collect_features
from beitforge.pipeline.evaluation.reconstructions import Reconstruction, reconstructions, sample_names
from beitforge.pipeline.model.beit import Beit, Encoder
from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.components import Figure, Section
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.runs.record import RunRecord, attempt
from beitforge.pipeline.tokenizers.precision import autocast_as
from beitforge.pipeline.tokenizers.storage import VisualTokenizer, load_tokenizer
from beitforge.pipeline.training.objectives import online_tokens
from beitforge.pipeline.weights.from_run import encoder_of
from beitforge.shards.decode import codec
from beitforge.shards.format.index import FLAG_LABELLED
from beitforge.shards.format.manifest import read_token_manifest
from beitforge.shards.stream.loader import Batch

_TITLE = "What it sees and what it fills in"
_SHOWN = 8  # images of the grid
_ATTENTION_SHOWN, _ATTENTION_AMONG = 4, 32  # images whose attention is shown, chosen from this many
_QUERIES, _NEAREST = 6, 5  # images whose neighbours are shown, and how many
_COMPARED, _SECONDS = 1000, 6.0  # neighbours are searched among at most this many images, within this many seconds
_LARGEST = 256  # pixels a side of an embedded image
_SMALL = 96  # an image of at most this many pixels a side is enlarged pixel by pixel


def render_gallery(record: RunRecord, state: State | None) -> list[Section]:
    """The sections `images`, `attention` and `neighbours`, without empty ones.

    On a CPU within some ten seconds of computing: eight images through tokenizer and encoder, four through its
    attention, and for the neighbours what six seconds allow.
    """
    config = replace(record.config, loader=replace(record.config.loader, workers=0))
    step = f", at step {state.step:,}" if state is not None else ""
    if record.job == "tokenizer":
        return [section for section in [_tokenizer_images(Path(config.data.tokenizer))] if section.html]
    missing: list[str] = []
    encoder = attempt("Predictions are missing", missing, lambda: encoder_of(config, record.run, record.job, state))
    config = replace(config, model=replace(encoder.model, kernels=config.model.kernels)) if encoder else config
    sections = []
    if record.job == "pretrain":
        beit = encoder if isinstance(encoder, Beit) else None
        sections.append(_reconstructed(config, beit, step if beit else "", missing))
    elif missing:
        sections.append(components.section("images", "Images", "", components.notes(missing)))
    if encoder is not None:
        sections += _encoder_sections(config, encoder, record, step)
    return [section for section in sections if section.html]


@dataclass(frozen=True)
class GridSamples:
    """The samples of the image grid, and where they and their tokens come from."""

    source: DataSource
    batch: Batch
    name: str
    tokens: str


def _reconstructed(config: Config, beit: Beit | None, step: str, missing: list[str]) -> Section:
    """The grid of masked images and their reconstructions."""
    shown = _samples(config, missing)
    if shown is None:
        return components.section("images", _TITLE, "", components.notes(missing))
    decoder = attempt("Decoded tokens are missing", missing, lambda: _decoder(config, shown.tokens))
    rebuilt = reconstructions(config, shown.batch, decoder, beit)
    names = sample_names(shown.source, shown.batch)
    about = f"The first {len(names)} images of the {shown.name}{step}: the view, and what the encoder sees of it"
    about += "; what the tokenizer decodes from the true tokens" if decoder is not None else ""
    if decoder is not None and beit is not None:
        about += (
            ", and from the predicted ones (true where patches are visible); and how far these two are apart, patches "
            "whose token is right outlined in green"
        )
    rows = [_image_row(name, sample) for name, sample in zip(names, rebuilt, strict=True)]
    return components.section("images", _TITLE, f"{about}.", components.notes(missing), components.image_grid(rows))


def _samples(config: Config, missing: list[str]) -> GridSamples | None:
    """The first images of the held-out set, else of the training set; None when neither is there."""

    def first(source: DataSource, name: str, tokens: str) -> GridSamples:
        count = min(_SHOWN, source.samples)
        batch = next(evaluation_batches(config, source, samples=count, micro=count, rank=0, world=1))
        if tokens == ONLINE:
            with autocast_as(config.tokenizer.precision, torch.device("cpu")):
                batch = batch._replace(tokens=online_tokens(fitting_tokenizer(config)[0].tokenize, batch))
        return GridSamples(source, batch, name, tokens)

    data, shown = config.data, None
    if data.heldout_images:
        shown = attempt(
            "Held-out images are missing",
            missing,
            lambda: first(heldout(config), "held-out set", data.heldout_tokens),
        )
    return shown or attempt(
        "Images are missing", missing, lambda: first(pretraining(config), "training set", data.tokens)
    )


def _decoder(config: Config, tokens: str) -> VisualTokenizer:
    """The tokenizer, if it is the one the tokens were made with and can decode them."""
    folder = Path(config.data.tokenizer)
    tokenizer, identity = load_tokenizer(folder)
    if tokens != ONLINE and identity["fingerprint"] != read_token_manifest(tokens).tokenizer.get("fingerprint"):
        raise ConfigError(f"{folder} is not the tokenizer that {tokens} was made with")
    if not tokenizer.decodes:
        raise ConfigError(f"the tokenizer in {folder} has no decoder to pixels")
    return tokenizer


def _image_row(name: str, rebuilt: Reconstruction) -> str:
    shown = [
        (rebuilt.image, "view"),
        (rebuilt.masked, "masked"),
        (rebuilt.decoded, "true"),
        (rebuilt.predicted, "predicted"),
        (rebuilt.error, "error"),
    ]
    about = f"{rebuilt.num_masked} patches masked"
    if rebuilt.right is not None:
        about = f"{rebuilt.right} of {rebuilt.num_masked} tokens right"
    return components.image_row(name, about, [_figure(pixels, text) for pixels, text in shown if pixels is not None])


def _figure(pixels: np.ndarray, caption: str, *, good: bool = False, largest: int = _LARGEST) -> Figure:
    height, width = pixels.shape[:2]
    if max(height, width) > largest:
        scale = largest / max(height, width)
        pixels = codec.resize(pixels, (round(height * scale), round(width * scale)), "lanczos")
    small = max(height, width) <= _SMALL
    form = "png" if small else "jpg"
    return Figure(codec.encode(pixels, form, 88), form, caption, small, good)


def _encoder_sections(config: Config, encoder: Encoder, record: RunRecord, step: str) -> list[Section]:
    """Attention maps and neighbours of centre crops, of images the encoder was not trained on where there are any."""
    data, missing = config.data, list[str]()
    if record.job == "finetune":
        sets = [(data.labelled_test, "test set"), (data.labelled_images, "training set")]
    else:
        sets = [(data.heldout_images, "held-out set"), (data.images, "training set")]
    for folder, name in sets:
        source = attempt(f"The {name}", missing, lambda folder=folder: evaluation(config, folder)) if folder else None  # type: ignore[misc]
        if source is None:
            continue
        bank = attempt(
            f"The {name}",
            missing,
            lambda source=source: collect_features(encoder, source.stream, source.samples, _COMPARED, _SECONDS),  # type: ignore[misc]
        )
        if bank is not None:
            where = f"{name}{step}"
            return [_attention(config, encoder, source, where), _neighbours(source, bank, where)]
    return []


def _attention(config: Config, encoder: Encoder, source: DataSource, where: str) -> Section:
    """The attention maps of the images with most contrast."""
    count = min(_ATTENTION_AMONG, source.samples)
    batch = next(evaluation_batches(config, source, samples=count, micro=count, rank=0, world=1))
    pixels, names = batch.pixels.float() / 255, sample_names(source, batch)
    chosen = pixels.flatten(1).var(dim=1).topk(min(_ATTENTION_SHOWN, count)).indices.sort().values
    blocks = len(encoder.blocks)
    about = (
        f"Of the first {count} images of the {where}, those with most contrast, nothing masked. The heat is a "
        "position's attention over the patches, mean over heads, brightest where it is largest: of [S] in block "
        f"{(blocks - 1) // 2 + 1} and in the last of {blocks}, and there of two patches (outlined), the busiest and "
        "the plainest."
    )
    rows = []
    for i, maps in zip(chosen.tolist(), attention_maps(encoder, pixels[chosen]), strict=True):
        cells = [(maps.image, "image"), (maps.middle, "[S] middle"), (maps.last, "[S] last")]
        cells += list(zip(maps.patches, ("busiest", "plainest"), strict=True))
        rows.append(components.image_row(names[i], "", [_figure(shown, caption) for shown, caption in cells]))
    return components.section("attention", "Attention maps", about, components.image_grid(rows))


def _neighbours(source: DataSource, bank: FeatureBank, where: str) -> Section:
    """The nearest neighbours of the first images, by features and by pixels."""
    total = len(bank.numbers)
    if total < 2:
        return Section("neighbours", "")
    ways = {"features": by_features(bank, _NEAREST)[0], "pixels": by_pixels(bank, _NEAREST)[0]}
    names, labels = _names(source, bank), _labels(source, bank)
    about = (
        f"Among {total:,} images spread over the {where}: the nearest others by the features after "
        f"{bank.layer} blocks (mean over patches, standardised, cosine), and by raw pixels."
    )
    if labels is not None:
        shares = [f"{agreement(near, bank.labels):.1%}" for near in ways.values()]
        about += (
            f" Of the {ways['features'].shape[1]} nearest, {shares[0]} have the image's label by features, "
            f"{shares[1]} by pixels; they are ticked below."
        )

    def cell(i: int, query: int) -> Figure:
        same = labels is not None and i != query and bank.labels[i] == bank.labels[query]
        caption = labels[i] if labels is not None else names[i].rpartition("/")[2]
        return _figure(bank.images[i], f"✓ {caption}" if same else caption, good=bool(same), largest=_SMALL)

    rows = []
    for query in range(min(_QUERIES, total)):
        strips = [(f"by {way}", [cell(i, query) for i in near[query].tolist()]) for way, near in ways.items()]
        rows.append(components.neighbour_row(names[query], cell(query, query), strips))
    return components.section("neighbours", "Nearest neighbours", about, components.image_grid(rows))


def _names(source: DataSource, bank: FeatureBank) -> list[str]:
    images = source.stream.images
    _, shards, rows = source.stream.places.locate(bank.numbers)
    return [images.index(shard).key(row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]


def _labels(source: DataSource, bank: FeatureBank) -> list[str] | None:
    """The class of each image in words; None when they have none."""
    images = source.stream.images
    _, shards, rows = source.stream.places.locate(bank.numbers)
    places = zip(shards.tolist(), rows.tolist(), strict=True)
    if not all(images.row(shard, row).flags & FLAG_LABELLED for shard, row in places):
        return None
    classes = images.manifest.classes
    return [classes[label] if 0 <= label < len(classes) else str(label) for label in bank.labels.tolist()]


def _tokenizer_images(folder: Path) -> Section:
    """The reconstructions that tokenizer training left in the folder."""
    path = folder / "reconstructions.png"
    if not path.exists():
        return Section("images", "")
    about = "Images above, and below them what is decoded from their tokens."
    shown = Figure(path.read_bytes(), "png", "images and their reconstructions", True)
    return components.section(
        "images", "What its tokens keep", about, components.image_row("", "", [shown], whole=True)
    )
