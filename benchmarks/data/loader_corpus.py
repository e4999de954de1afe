"""Images like ImageNet's for the loader benchmarks, made once below runs/: files, image shards, token shards."""

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from beitforge.pipeline.data.demo_images import find_photographs
from beitforge.pipeline.data.pretraining import policy_record
from beitforge.shards import counter_rng
from beitforge.shards.decode import codec
from beitforge.shards.format.manifest import TokenManifest, write_manifest
from beitforge.shards.format.tokens import token_path, token_shard_entry, write_token_shard
from beitforge.shards.format.views import FIELDS, ViewPolicy, Views, draw_views
from beitforge.shards.pack.encode import EncodeOptions
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from beitforge.shards.storage.files import write_text
from beitforge.shards.stream.image_set import ImageSet

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "bench"
PATCHES, GRID, NUM_VIEWS, VOCABULARY = 196, [14, 14], 4, 8192
_PER_SHARD, _FIELD, _SEED = 100, 2048, 7
_VERSION = "3"  # raised when the same count no longer gives the same images
_NOISE = 20.0  # standard deviation of the 1/f noise in levels, which brings the mean to ImageNet's bytes an image


@dataclass(frozen=True)
class Corpus:
    """The same images as files below `originals`, as image shards, and as token shards of `NUM_VIEWS` views."""

    originals: Path
    shards: Path
    tokens: Path

    def files(self) -> list[Path]:
        return sorted(self.originals.rglob("*.jpg"))

    def urls(self) -> list[str]:
        """The tars, as webdataset takes them."""
        return [str(path) for path in sorted(self.shards.glob("*.tar"))]

    def describe(self) -> str:
        """One sentence for BENCHMARKS.md."""
        files = self.files()
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000
        index = [ImageSet(self.shards).index(shard) for shard in range(len(self.urls()))]
        area = np.concatenate([one.width.astype(float) * one.height for one in index]).mean() / 1000
        return (
            f"{len(files)} JPEGs of {kilobytes:.0f} kB and {area:.0f} thousand pixels in the mean (ImageNet-1k's have "
            "110 kB), blended from photographs with 1/f noise, 85 % of them 4:2:0; all in the page cache."
        )


def corpus(count: int) -> Corpus:
    """The corpus of `count` images, made when it is not there."""
    return _made(FOLDER / f"corpus-{count}", lambda folder: write_images(folder, count), _PER_SHARD)


def with_fast_regions(plain: Corpus) -> Corpus:
    """The same images packed with `--fast-regions`, in the same order, with the same tokens; made when they are not
    there. Raises ShardError where jpegtran is not installed."""
    found = Corpus(plain.originals, plain.shards.with_name("shards-regions"), plain.tokens.with_name("tokens-regions"))
    finished = found.shards.with_name("regions-version")
    if not finished.exists() or finished.read_text(encoding="utf-8") != _VERSION:
        for folder in (found.shards, found.tokens):
            shutil.rmtree(folder, ignore_errors=True)
        per_shard = ImageSet(plain.shards).manifest.shards[0].samples
        options = PackOptions(samples_per_shard=per_shard, labels="none", encoding=EncodeOptions(fast_regions=True))
        pack(found.originals, found.shards, options, "0", 1)
        write_tokens(found.shards, found.tokens)
        write_text(finished, _VERSION)
    return found


def tiny_corpus(count: int, per_shard: int) -> Corpus:
    """`count` images of 32 x 32, for what does not depend on the work an image makes."""
    return _made(FOLDER / f"tiny-{count}-{per_shard}", lambda folder: write_tiny_images(folder, count), per_shard)


def _made(folder: Path, write: Callable[[Path], None], per_shard: int) -> Corpus:
    """The corpus in `folder`: what an earlier run finished, or `write`'s images, packed, with tokens."""
    found = Corpus(folder / "originals", folder / "shards", folder / "tokens")
    finished = folder / "version"
    if not finished.exists() or finished.read_text(encoding="utf-8") != _VERSION:
        shutil.rmtree(folder, ignore_errors=True)
        write(found.originals)
        pack(found.originals, found.shards, PackOptions(samples_per_shard=per_shard, labels="none"), "0", 1)
        write_tokens(found.shards, found.tokens)
        write_text(finished, _VERSION)
    return found


def write_images(folder: Path, count: int) -> None:
    """`count` JPEGs below `folder`, the same ones every time."""
    photos = [Image.fromarray(codec.decode(path.read_bytes())) for path in find_photographs()]
    noise = pink_noise(_FIELD)
    folder.mkdir(parents=True)
    for number in range(count):
        u = iter(counter_rng.uniform(_SEED, number, np.arange(32)).tolist())
        size = _size(u)
        pixels = np.asarray(_part(photos, size, u), np.float32)
        share = 0.3 * next(u)
        pixels = (1 - share) * pixels + share * np.asarray(_part(photos, size, u), np.float32)
        top, left = int(next(u) * (_FIELD - size[1])), int(next(u) * (_FIELD - size[0]))
        pixels += _NOISE * (0.5 + next(u)) * noise[top : top + size[1], left : left + size[0], None]
        quality, subsampling = 86 + int(9 * next(u)), 2 if next(u) < 0.85 else 0
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=quality, subsampling=subsampling
        )
        (folder / f"{number:06d}.jpg").write_bytes(file.getvalue())


def write_tiny_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = (256 * counter_rng.uniform(_SEED, number, np.arange(8 * 8 * 3))).astype(np.uint8).reshape(8, 8, 3)
        (folder / f"{number:06d}.jpg").write_bytes(codec.encode(codec.resize(pixels, (32, 32), "bicubic"), "jpg", 90))


def _size(u: Iterator[float]) -> tuple[int, int]:
    """Width and height: 70 % as most of ImageNet's, 28 % of other sides, 2 % large."""
    kind, turned, one, other = (next(u) for _ in range(4))
    if kind < 0.7:
        return (500, 375) if turned < 0.75 else (375, 500)
    low, high = (300, 640) if kind < 0.98 else (1000, 1600)
    return int(low + one * (high - low)), int(low + other * (high - low))


def _part(photos: list[Image.Image], size: tuple[int, int], u: Iterator[float]) -> Image.Image:
    """A random part of a random photograph, perhaps mirrored, brought to `size`."""
    photo, scale, left, top, flip = photos[int(next(u) * len(photos))], *(next(u) for _ in range(4))
    side = min(photo.width / size[0], photo.height / size[1]) * (0.6 + 0.4 * scale)
    width, height = side * size[0], side * size[1]
    x, y = left * (photo.width - width), top * (photo.height - height)
    part = photo.resize(size, Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else part


def pink_noise(side: int) -> np.ndarray:
    """f32 [side, side] of unit variance whose amplitude falls as 1/frequency, as that of photographs does."""
    white = counter_rng.uniform(_SEED, np.arange(side * side)).reshape(side, side) - 0.5
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(side, side))
    return (field / field.std()).astype(np.float32)


def write_tokens(shards: Path, folder: Path, num_views: int = NUM_VIEWS) -> None:
    """A token set of `num_views` views as `tokenize` writes it, but of arbitrary tokens."""
    images, policy, entries = ImageSet(shards), ViewPolicy(), []
    for number, shard in enumerate(images.manifest.shards):
        index = images.index(number)
        drawn = [
            draw_views(policy, index.key_hash, k, index.width, index.height, index.greys) for k in range(num_views)
        ]
        views = Views(*(np.stack([getattr(view, name) for view in drawn]) for name in FIELDS))
        places = np.arange(num_views * len(index) * PATCHES).reshape(num_views, len(index), PATCHES)
        tokens = (counter_rng.uniform(_SEED, number, places) * VOCABULARY).astype(np.uint16)
        bad = np.zeros(len(index), np.uint8)
        write_token_shard(token_path(folder, shard.name), tokens, views, index.key_hash, bad, {})
        entries.append(token_shard_entry(folder, shard.name, shard.digest))
    tokenizer = {"fingerprint": "arbitrary", "vocabulary": VOCABULARY, "grid": GRID, "input_size": [112, 112]}
    made = TokenManifest(
        shards=entries, tokenizer=tokenizer, policy=policy_record(policy), num_views=num_views, provenance={}
    )
    write_manifest(folder, made)
