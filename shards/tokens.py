"""Token shards: the visual tokens of K recorded views of each picture of an image shard, row for row.

`NAME.safetensors` per image shard `NAME.tar`: tokens u16 [views, samples, patches] · boxes, flips, jitters, orders (the
records, shards.views.Views with leading [views, samples]) · keys u64 [samples] · bad u8 [samples] (1: the picture could
not be read, its rows are zeros and the stream substitutes it). View-major, so that an epoch touches one slice.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.errors import ShardError
from shards.files import file_digest, open_tensors, write_tensors
from shards.images import retried
from shards.manifest import ImageManifest, TokenManifest, TokenShard, read_token_manifest
from shards.views import FIELDS, Views

_CURE = "run `tokenize` again with this image set, or point data.tokens at the folder made from it"
_OPEN_SHARDS = 256
_DTYPES = {
    "tokens": np.uint16,
    "boxes": np.uint32,
    "flips": np.uint8,
    "jitters": np.float32,
    "orders": np.uint8,
    "keys": np.uint64,
    "bad": np.uint8,
}


@dataclass(frozen=True)
class OpenTokenShard:
    """One mapped token file."""

    tokens: np.ndarray
    views: Views
    keys: np.ndarray
    bad: np.ndarray
    metadata: dict[str, str]


def token_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def write_token_shard(
    path: Path, tokens: np.ndarray, views: Views, keys: np.ndarray, bad: np.ndarray, metadata: dict[str, str]
) -> None:
    """Write one token file by rename. tokens u16 [views, samples, patches]; keys u64 [samples]; bad u8 [samples]."""
    tensors = {"tokens": tokens, "keys": keys, "bad": bad, **{name: getattr(views, name) for name in FIELDS}}
    write_tensors(path, {name: tensors[name].astype(dtype) for name, dtype in _DTYPES.items()}, metadata)


def open_token_shard(path: Path) -> OpenTokenShard:
    """Map one token file. Raises ShardError when it is missing, damaged, or its tensors do not fit each other."""
    tensors, metadata = open_tensors(path)
    for name, dtype in _DTYPES.items():
        if name not in tensors or tensors[name].dtype != dtype:
            raise ShardError(f"{path} has no tensor {name} of type {np.dtype(dtype)}: {_CURE}")
    if tensors["tokens"].ndim != 3:
        raise ShardError(f"{path}: tokens has shape {tensors['tokens'].shape}, not views, samples, patches: {_CURE}")
    num_views, samples = tensors["tokens"].shape[:2]
    shapes = {"boxes": (num_views, samples, 4), "jitters": (num_views, samples, 3), "keys": (samples,)}
    shapes |= {"flips": (num_views, samples), "orders": (num_views, samples), "bad": (samples,)}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ShardError(f"{path}: {name} has shape {tensors[name].shape}, its tokens ask for {shape}: {_CURE}")
    views = Views(*(tensors[name] for name in FIELDS))
    return OpenTokenShard(tensors["tokens"], views, tensors["keys"], tensors["bad"], metadata)


def check_pairing(images: ImageManifest, tokens: TokenManifest, folder: Path) -> None:
    """Refuse token sets of other pictures: names, counts and image digests must agree shard by shard."""
    ours, theirs = [shard.name for shard in images.shards], [shard.name for shard in tokens.shards]
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs)) or ["the same names in another order"]
        raise ShardError(f"{folder} does not list the image set's shards ({len(odd)} differ, first {odd[0]}): {_CURE}")
    for image, token in zip(images.shards, tokens.shards, strict=True):
        if image.samples != token.samples:
            raise ShardError(
                f"{folder}: {token.name} has {token.samples} samples, its image shard {image.samples}: {_CURE}"
            )
        if image.digest != token.image_digest:
            raise ShardError(f"{folder}: {token.name} was made from other pictures (image digest differs): {_CURE}")


def check_rows(name: str, keys: np.ndarray, image_keys: np.ndarray) -> None:
    """Refuse a token file whose rows are not the image shard's rows. keys, image_keys: u64 [samples]."""
    if len(keys) != len(image_keys) or not np.array_equal(keys, image_keys):
        wrong = int(np.argmax(keys != image_keys)) if len(keys) == len(image_keys) else min(len(keys), len(image_keys))
        raise ShardError(
            f"{name}: the token rows are not the pictures' rows (first difference in row {wrong}): {_CURE}"
        )


class TokenSet:
    """The token shards of one folder, opened when first touched."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: TokenManifest = read_token_manifest(folder)
        self._open: dict[int, OpenTokenShard] = {}
        self._whole: set[int] = set()

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "manifest": self.manifest, "_open": {}, "_whole": set()}

    def shard(self, number: int, image_keys: np.ndarray) -> OpenTokenShard:
        """Shard `number`, checked against the manifest and the image shard's keys (u64 [samples]) when first opened."""
        opened = self._open.get(number)
        if opened is None:
            path = token_path(self.folder, self.manifest.shards[number].name)
            opened = retried(lambda: self._open_checked(number, path, image_keys), str(path))
            self._open[number] = opened
            if len(self._open) > _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
        return opened

    def _open_checked(self, number: int, path: Path, image_keys: np.ndarray) -> OpenTokenShard:
        entry = self.manifest.shards[number]
        opened = open_token_shard(path)
        rows, columns = self.manifest.tokenizer["grid"]
        shape = (self.manifest.num_views, entry.samples, rows * columns)
        if opened.tokens.shape != shape:
            raise ShardError(f"{path} holds tokens of shape {opened.tokens.shape}, its manifest says {shape}: {_CURE}")
        check_rows(str(path), opened.keys, image_keys)
        # Once a process: tokens and boxes have no checksum of their own, and a wrong one looks like any other.
        if number not in self._whole and file_digest(path) != entry.digest:
            raise ShardError(f"{path} is damaged, or not the file its manifest lists (digest differs): {_CURE}")
        self._whole.add(number)
        return opened


def token_shard_entry(folder: Path, name: str, image_digest: str) -> TokenShard:
    """The manifest's line for a finished token file."""
    path = token_path(folder, name)
    return TokenShard(
        name=name, samples=len(open_token_shard(path).keys), digest=file_digest(path), image_digest=image_digest
    )


def token_counts(tokens: TokenSet, at_most_shards: int = 64) -> np.ndarray:
    """How often each visual token occurs, i64 [vocabulary], over all views of (evenly spaced) shards."""
    entries = tokens.manifest.shards
    counts = np.zeros(tokens.manifest.tokenizer["vocabulary"], dtype=np.int64)
    for entry in entries[:: -(-len(entries) // at_most_shards)]:
        found = open_token_shard(token_path(tokens.folder, entry.name)).tokens
        counts += np.bincount(found.reshape(-1), minlength=len(counts))
    return counts
