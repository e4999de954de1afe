"""The view a stream gives, jittered as training does it, is BEiT's official view, on real photographs."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitforge.pipeline.data.demo_images import find_photographs
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.pixels import jitter
from beitforge.shards.format.views import ViewPolicy
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Batch, Stream
from beitforge.shards.stream.view_sources import DrawnViews, Selection
from benchmarks.data.views import Draw, official_cut, official_jitter
from tests.conftest import ROOT

NAMES = ("astronaut", "camera", "chelsea", "china", "coffee", "flower", "ihc", "motorcycle_left")
VIEWS = 5  # of each
ENCODER, TOKENIZER = (224, Image.Resampling.BICUBIC), (112, Image.Resampling.LANCZOS)
PLAIN = ViewPolicy(brightness=0.0, contrast=0.0, saturation=0.0)


class InRounds:
    """All images of the only shard, again and again, each round an epoch."""

    def __init__(self, count: int):
        self.count, self.samples = count, count

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return samples // self.count, np.zeros_like(samples), samples % self.count


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """The photographs as one shard, their bytes as they are."""
    folder = tmp_path_factory.mktemp("photographs")
    try:
        paths = [path for path in find_photographs() if path.stem in NAMES]
    except ConfigError as error:
        pytest.skip(str(error))
    (folder / "images" / "all").mkdir(parents=True)
    for path in paths:
        shutil.copy(path, folder / "images" / "all")
    command = [sys.executable, "-m", "beitforge", "pack", str(folder / "images"), str(folder / "shards")]
    subprocess.run([*command, "--workers", "1"], check=True, cwd=ROOT, capture_output=True)
    return ImageSet(folder / "shards")


def built(images: ImageSet, policy: ViewPolicy) -> tuple[Batch, list[Draw]]:
    """VIEWS of each photograph by the stream, and the records they were cut by."""
    index = images.index(0)
    places, source = InRounds(len(index)), DrawnViews(policy)
    stream = Stream(images=images, places=places, source=source, size=(224, 224), tokenizer_size=(112, 112))
    samples = np.arange(VIEWS * len(index))
    epochs, shards, rows = places.locate(samples)
    keys, *sizes, means = (getattr(index, name)[rows] for name in ("key_hash", "width", "height", "mean_grey"))
    greys = functools.partial(images.greys, shards, rows, means)
    views, _ = source.views(Selection(epochs, shards, rows, keys, (sizes[0], sizes[1]), means, greys))
    paths = {path.stem: path for path in find_photographs()}
    draws = []
    for i, row in enumerate(rows.tolist()):
        name = Path(index.key(row)).stem
        with Image.open(paths[name]) as image:
            pixels = np.array(image.convert("RGB"))
        box, flip = views.boxes[i].tolist(), bool(views.flips[i])
        levels = views.levels[i]
        draws.append(Draw(name, pixels, box, flip, views.jitters[i], int(views.orders[i]), levels, levels))
    return stream.batch(samples), draws


def pooled(found_BCHW: torch.Tensor, expected: list[np.ndarray]) -> float:
    """PSNR in dB from the mean squared error over all images; found in [0, 1], expected u8 [H, W, 3] each."""
    stacked = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2).double()
    return float(10 * torch.log10(255**2 / (found_BCHW.double() * 255 - stacked).square().mean().clamp(min=1e-9)))


@pytest.fixture(scope="module")
def jittered(images) -> tuple[Batch, list[Draw], list[np.ndarray]]:
    """Views under the default policy, their records, and the whole images under the official jitter."""
    batch, draws = built(images, ViewPolicy())
    return batch, draws, [official_jitter(draw) for draw in draws]


@pytest.mark.parametrize(("view", "field"), [(ENCODER, "pixels"), (TOKENIZER, "tokenizer_pixels")])
def test_the_view_is_the_official_one(jittered, view, field):
    """Jittered after the cut, against Pillow's jitter of the whole image before it: 45.9 dB, an error of 1.3 levels."""
    batch, draws, whole = jittered
    ours = jitter(getattr(batch, field), batch.jitters, batch.orders, batch.pivots)
    expected = [official_cut(pixels, draw, *view) for pixels, draw in zip(whole, draws, strict=True)]
    reached = pooled(ours, expected)
    assert reached >= 45.9


def test_the_cut_is_the_official_one(images):
    """Without jitter: the tokenizer's is Pillow's bit for bit, torch's bicubic rounds a level apart here and there."""
    batch, draws = built(images, PLAIN)
    assert pooled(batch.pixels / 255, [official_cut(draw.pixels, draw, *ENCODER) for draw in draws]) >= 60
    expected = np.stack([official_cut(draw.pixels, draw, *TOKENIZER) for draw in draws])
    assert np.array_equal(batch.tokenizer_pixels.permute(0, 2, 3, 1).numpy(), expected)
