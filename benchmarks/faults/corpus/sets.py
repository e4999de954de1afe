"""Small whole shard sets to be damaged, copied by hard links; nothing here knows of damage."""

import contextlib
import dataclasses
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from beitforge.shards.format.manifest import TokenManifest, write_manifest
from beitforge.shards.format.tokens import token_path, token_shard_entry, write_token_shard
from beitforge.shards.format.views import FIELDS, ViewPolicy, Views, draw_views
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from beitforge.shards.stream.image_set import ImageSet

SHARDS, PER_SHARD = 3, 12
GRID, VOCABULARY, NUM_VIEWS = (2, 2), 64, 3


@dataclass(frozen=True)
class Stored:
    """An image set and its token set, side by side in one folder."""

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def names(self) -> list[str]:
        """Its shards' names, from the tars there."""
        return sorted(path.stem for path in self.images.glob("*.tar"))


def smooth(seed: int, width: int, height: int) -> np.ndarray:
    """A smooth image with a little noise, uint8 [H, W, 3]; no two seeds alike."""
    rng = np.random.default_rng([7, seed])
    rows, columns = np.mgrid[0:height, 0:width]
    phase, slope = rng.uniform(0, 6, 3), rng.uniform(0.05, 0.25, (3, 2))
    waves = np.sin(rows[..., None] * slope[:, 0] + columns[..., None] * slope[:, 1] + phase)
    return (127.5 + 90 * waves + rng.normal(0, 3, waves.shape)).clip(0, 255).astype(np.uint8)


def saved(pixels: np.ndarray | Image.Image, format: str, **options: object) -> bytes:
    """An image in Pillow's `format`."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def encoded_image(seed: int) -> tuple[bytes, str]:
    """Bytes and extension of image `seed`: JPEG, PNG, WebP, and PNG without compression, those all of one size."""
    rng = np.random.default_rng([8, seed])
    pixels = smooth(seed, *rng.integers(24, 41, 2).tolist())
    turn = seed % 4
    if turn == 0:
        return saved(pixels, "JPEG", quality=90), "jpg"
    if turn == 1:
        return saved(pixels, "PNG"), "png"
    if turn == 2:
        return saved(pixels, "WEBP", quality=90), "webp"
    return saved(smooth(seed, 24, 24), "PNG", compress_level=0), "png"


def quiet() -> contextlib.AbstractContextManager:
    """Without the progress lines of thousands of small steps."""
    return contextlib.redirect_stderr(io.StringIO())


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files below `folder` by their relative paths; the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_set(folder: Path, seed: int) -> Stored:
    """SHARDS shards of PER_SHARD labelled images each, packed, and their tokens, drawn at random."""
    files = {}
    for number in range(SHARDS * PER_SHARD):
        data, extension = encoded_image(1000 * seed + number)
        files[f"class{number % 3}/{number:03d}.{extension}"] = data
    sources = write_files(folder / "sources", files)
    stored = Stored(folder)
    with quiet():
        pack(sources, stored.images, PackOptions(samples_per_shard=PER_SHARD), "0", 1)
    write_tokens(stored, stored.tokens, seed)
    return stored


def write_tokens(stored: Stored, folder: Path, seed: int) -> None:
    """A whole token set of `stored` in `folder`, as a tokenizer named by `seed` would leave it."""
    images, policy = ImageSet(stored.images), ViewPolicy(seed=seed)
    rng = np.random.default_rng([9, seed])
    entries = []
    for number, shard in enumerate(images.manifest.shards):
        index = images.index(number)
        drawn = [
            draw_views(policy, index.key_hash, k, index.width, index.height, index.greys) for k in range(NUM_VIEWS)
        ]
        views = Views(*(np.stack([getattr(view, name) for view in drawn]) for name in FIELDS))
        tokens = rng.integers(0, VOCABULARY, (NUM_VIEWS, len(index), GRID[0] * GRID[1]))
        bad = np.zeros(len(index), np.uint8)
        write_token_shard(token_path(folder, shard.name), tokens, views, index.key_hash, bad, {"seed": str(seed)})
        entries.append(token_shard_entry(folder, shard.name, shard.digest))
    tokenizer = {"fingerprint": f"{seed:064x}", "vocabulary": VOCABULARY, "grid": list(GRID), "input_size": [32, 32]}
    manifest = TokenManifest(
        shards=entries,
        tokenizer=tokenizer,
        policy=dataclasses.asdict(policy),
        num_views=NUM_VIEWS,
        provenance={},
    )
    write_manifest(folder, manifest)


def linked(stored: Stored, folder: Path) -> Stored:
    """A copy that shares every file with the original until `rewrite` gives it one of its own."""
    for source in (stored.images, stored.tokens):
        target = folder / source.name
        target.mkdir(parents=True)
        for path in source.iterdir():
            os.link(path, target / path.name)
    return Stored(folder)


def rewrite(path: Path, data: bytes) -> None:
    """Put `data` under a name without touching the file that other copies share."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
