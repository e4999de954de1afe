"""A page of the samples of one training step: their views, masked where the run masks, losses, and where they lie.

Must not know any stage.
"""

from dataclasses import dataclass

import numpy as np
import torch

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.evaluation.reconstructions import greyed, to_bytes
from beitforge.pipeline.model.pixels import jitter
from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.components import Figure
from beitforge.shards.decode import codec

_SHOWN = 96  # samples at most
_LARGEST, _SMALL = 256, 96  # pixels a side: of an embedded image, and of one that is enlarged pixel by pixel


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computed a loss of: the samples' numbers i64 [B]."""

    rank: int
    number: int
    samples: np.ndarray
    loss: float


def samples_page(
    title: str, lines: list[str], config: Config, source: DataSource, micro_batches: list[MicroBatch]
) -> str:
    """A self-contained page: `lines` first, then the samples of the micro batches in their order, as many as have
    room."""
    rows, left = [], _SHOWN
    for micro in micro_batches:
        if left > 0:
            rows += _rows(config, source, micro, left)
            left = _SHOWN - len(rows)
    total = sum(len(micro.samples) for micro in micro_batches)
    about = f"{len(rows)} of {total} samples, micro batches with a loss that is not finite or large first."
    sections = [
        components.header("replay · beitforge", title, "", False),
        components.section("found", "", "", components.notes(lines)),
        components.section("samples", "Samples", about, components.image_grid(rows)),
    ]
    return components.page(f"{title} · beitforge", [section for section in sections if section.html])


def _rows(config: Config, source: DataSource, micro: MicroBatch, most: int) -> list[str]:
    batch = source.stream.batch(micro.samples[:most].copy())
    views = jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots)
    mask_BN = batch.draws.get("mask")
    masked = greyed(views, mask_BN, config.model.patch_size) if mask_BN is not None else None
    epochs, shards, rows = source.stream.places.locate(batch.samples.numpy())
    bad, images, made = {sample.sample: sample for sample in batch.bad}, source.stream.images, []
    for i, (number, shard, row) in enumerate(zip(batch.samples.tolist(), shards.tolist(), rows.tolist(), strict=True)):
        name = f"{images.manifest.shards[shard].name} {images.index(shard).key(row)}"
        about = (
            f"sample {number}, epoch {epochs[i]}; rank {micro.rank}, micro batch {micro.number}: loss {micro.loss:g}"
        )
        view = views[i].float()
        about += f"; pixels {view.min():.3f} to {view.max():.3f}, mean {view.mean():.3f}"
        about += f"; masked {int(mask_BN[i].sum())} of {mask_BN.shape[1]} patches" if mask_BN is not None else ""
        about += f"; tokens {_listed(batch.tokens[i])}" if batch.tokens.shape[1] else ""
        about += f"; replaced by {bad[number].substitute}: {bad[number].reason}" if number in bad else ""
        figures = [_figure(views[i], "view")] + ([_figure(masked[i], "masked")] if masked is not None else [])
        made.append(components.image_row(name, about, figures))
    return made


def _listed(tokens_N: torch.Tensor) -> str:
    different = tokens_N.unique()
    return f"{len(different)} different, {int(different.min())} to {int(different.max())}"


def _figure(view_CHW: torch.Tensor, caption: str) -> Figure:
    pixels = to_bytes(view_CHW.clamp(0, 1))
    height, width = pixels.shape[:2]
    if max(height, width) > _LARGEST:
        scale = _LARGEST / max(height, width)
        pixels = codec.resize(pixels, (round(height * scale), round(width * scale)), "lanczos")
    return Figure(codec.encode(pixels, "png", 95), "png", caption, max(height, width) <= _SMALL)
