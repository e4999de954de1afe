"""The pictures of a report, as HTML: what the encoder of the newest checkpoint makes of sample pictures.

This is the part of a report that takes seconds; a page of a running run makes it once a checkpoint. Must not know any
stage.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline import page
from pipeline.checkpoint import State
from pipeline.config import ONLINE, Config, ConfigError
from pipeline.model import Beit
from pipeline.objective import online_tokens
from pipeline.page import Picture
from pipeline.pictures import Reconstruction, reconstructions, sample_names
from pipeline.precision import computing
from pipeline.record import Record, attempt
from pipeline.streams import Source, evaluation_batches, fitting_tokenizer, heldout, pretraining
from pipeline.tokenizer import VisualTokenizer, load_tokenizer
from pipeline.weights import trained_weights, with_weights
from shards import codec
from shards.loader import Batch
from shards.manifest import read_token_manifest

_TITLE = "What it sees and what it fills in"
_SHOWN = 8  # pictures of the grid
_LARGEST = 256  # pixels a side of an embedded picture
_SMALL = 96  # a picture of at most so many pixels a side is enlarged pixel by pixel


@dataclass(frozen=True)
class Shown:
    """The samples of the picture grid, and where they and their tokens come from."""

    source: Source
    batch: Batch
    name: str
    tokens: str


def pictures(record: Record, state: State | None) -> str:
    """The grid, as much of it as the folders still allow, and a line for whatever is missing."""
    config = replace(record.config, loader=replace(record.config.loader, workers=0))
    missing: list[str] = []
    shown = _samples(config, missing)
    if shown is None:
        return page.section("pictures", _TITLE, "", page.notes(missing))
    decoder = attempt("Decoded tokens are missing", missing, lambda: _decoder(config, shown.tokens))
    beit = attempt("Predictions are missing", missing, lambda: _encoder(config, record.run))
    rebuilt = reconstructions(config, shown.batch, decoder, beit)
    names = sample_names(shown.source, shown.batch)
    step = f", at step {state.step:,}" if beit is not None and state is not None else ""
    about = (
        f"The first {len(names)} pictures of the {shown.name}{step}: the view, what the encoder sees of it, and "
        "what the tokenizer decodes from the true tokens and from the predicted ones (true where patches are visible)."
    )
    rows = [_picture_row(name, sample) for name, sample in zip(names, rebuilt, strict=True)]
    return page.section("pictures", _TITLE, about, page.notes(missing), page.picture_grid(rows))


def _samples(config: Config, missing: list[str]) -> Shown | None:
    """The first pictures of the held-out set, else of the training set; None when neither is there."""

    def first(source: Source, name: str, tokens: str) -> Shown:
        count = min(_SHOWN, source.samples)
        batch = next(evaluation_batches(config, source, samples=count, micro=count, rank=0, world=1))
        if tokens == ONLINE:
            with computing(config.tokenizer.precision, torch.device("cpu")):
                batch = batch._replace(tokens=online_tokens(fitting_tokenizer(config)[0].tokenize, batch))
        return Shown(source, batch, name, tokens)

    data, shown = config.data, None
    if data.heldout_images:
        shown = attempt(
            "Held-out pictures are missing",
            missing,
            lambda: first(heldout(config), "held-out set", data.heldout_tokens),
        )
    return shown or attempt(
        "Pictures are missing", missing, lambda: first(pretraining(config), "training set", data.tokens)
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


def _encoder(config: Config, run_folder: Path) -> Beit:
    return with_weights(config, trained_weights(run_folder).all(), run_folder)


def _picture_row(name: str, rebuilt: Reconstruction) -> str:
    shown = [(rebuilt.image, "view"), (rebuilt.masked, "masked")]
    if rebuilt.decoded is not None:
        shown.append((rebuilt.decoded, "true tokens"))
    if rebuilt.predicted is not None:
        shown.append((rebuilt.predicted, "predicted"))
    cells = []
    for pixels, caption in shown:
        if len(pixels) > _LARGEST:
            pixels = codec.resize(pixels, (_LARGEST, _LARGEST), "lanczos")
        small = len(pixels) <= _SMALL
        form = "png" if small else "jpg"
        cells.append(Picture(codec.encode(pixels, form, 88), form, caption, small))
    about = f"{rebuilt.num_masked} patches masked"
    if rebuilt.right is not None:
        about = f"{rebuilt.right} of {rebuilt.num_masked} tokens right"
    return page.picture_row(name, about, cells)
