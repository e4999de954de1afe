"""Token shards: the visual tokens of K recorded views of each image of an image shard, row for row.

`NAME.safetensors` per image shard `NAME.tar`: tokens u16 [views, samples, patches] · boxes, flips, jitters, orders (the
records, shards.format.views.Views with leading [views, samples]) · keys u64 [samples] · bad u8 [samples] (1: the
image could not be read, its rows are zeros and the stream substitutes it) · checks u64 [views, samples], the checksum
of each row, which sets of earlier versions lack. View-major, so that more views can follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from beitforge.shards.errors import ShardError
from beitforge.shards.format.manifest import ImageManifest, TokenManifest, TokenShard, read_token_manifest
from beitforge.shards.format.views import FIELDS, Views
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.files import file_digest, open_files, open_tensors, write_tensors
from beitforge.shards.storage.remote import Kept, Remote, is_url
from beitforge.shards.storage.retry import retry

_CURE = "run `tokenize` again with this image set, or point data.tokens at the folder made from it"
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
    """One mapped token file. `checks` is None in files of earlier versions."""

    path: Path
    tokens: np.ndarray
    views: Views
    keys: np.ndarray
    bad: np.ndarray
    checks: np.ndarray | None
    metadata: dict[str, str]

    @property
    def checks_digest(self) -> str:
        """xxh3-128 of the rows' checksums; empty where there are none."""
        return "" if self.checks is None else xxhash.xxh3_128_hexdigest(self.checks.tobytes())

    def row(self, view: int, row: int) -> "TokenRow":
        """One image's tokens u16 [patches] and record. Raises ShardError when they are not what was written."""
        found = TokenRow(self.tokens[view, row], *(getattr(self.views, name)[view, row] for name in FIELDS))
        if self.checks is not None and found.check(self.bad[row]) != int(self.checks[view, row]):
            raise ShardError(
                f"{self.path}: view {view} of row {row} is damaged (its checksum differs): restore the file, or remove "
                "it and the manifest and run `tokenize` again"
            )
        return found


class TokenRow(NamedTuple):
    """One view of one image: tokens u16 [patches], and its record (shards.format.views.Views)."""

    tokens: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    jitters: np.ndarray
    orders: np.ndarray

    def check(self, bad: np.ndarray) -> int:
        """xxh3-64 of all of it, and of whether the image could be read."""
        return xxhash.xxh3_64_intdigest(b"".join([*(part.tobytes() for part in self), bad.tobytes()]))


def token_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def write_token_shard(
    path: Path, tokens: np.ndarray, views: Views, keys: np.ndarray, bad: np.ndarray, metadata: dict[str, str]
) -> None:
    """Write one token file by rename. tokens u16 [views, samples, patches]; keys u64 [samples]; bad u8 [samples]."""
    given = {"tokens": tokens, "keys": keys, "bad": bad, **{name: getattr(views, name) for name in FIELDS}}
    tensors = {name: given[name].astype(dtype) for name, dtype in _DTYPES.items()}
    checks = np.zeros(tokens.shape[:2], np.uint64)
    for view, row in np.ndindex(*checks.shape):
        found = TokenRow(tensors["tokens"][view, row], *(tensors[name][view, row] for name in FIELDS))
        checks[view, row] = found.check(tensors["bad"][row])
    write_tensors(path, {**tensors, "checks": checks}, metadata)


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
    shapes |= {"checks": (num_views, samples)} if "checks" in tensors else {}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ShardError(f"{path}: {name} has shape {tensors[name].shape}, its tokens ask for {shape}: {_CURE}")
    views = Views(*(tensors[name] for name in FIELDS))
    checks = tensors.get("checks")
    return OpenTokenShard(path, tensors["tokens"], views, tensors["keys"], tensors["bad"], checks, metadata)


def check_pairing(images: ImageManifest, tokens: TokenManifest, folder: Path | str) -> None:
    """Refuse token sets of other images: names, counts and image digests must agree shard by shard."""
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
            raise ShardError(f"{folder}: {token.name} was made from other images (image digest differs): {_CURE}")


def check_rows(name: str, keys: np.ndarray, image_keys: np.ndarray) -> None:
    """Refuse a token file whose rows are not the image shard's rows. keys, image_keys: u64 [samples]."""
    if len(keys) != len(image_keys) or not np.array_equal(keys, image_keys):
        wrong = int(np.argmax(keys != image_keys)) if len(keys) == len(image_keys) else min(len(keys), len(image_keys))
        raise ShardError(f"{name}: the token rows are not the images' rows (first difference in row {wrong}): {_CURE}")


class TokenSet:
    """The token shards of one set, opened when first touched."""

    def __init__(self, where: Path | str, cache: Cache | None = None):
        """where: a folder or a URL. cache: of this node, for a URL."""
        self.folder: Path | Remote = Remote(str(where)) if is_url(where) else Path(where)
        self.manifest: TokenManifest = read_token_manifest(where)
        self._cache = cache
        self._open: dict[int, OpenTokenShard] = {}
        self._whole: set[int] = set()
        if isinstance(self.folder, Remote) and cache is None:
            raise ShardError(f"{where} is a URL, which is read through a cache on this machine only")

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": {}, "_whole": set()}

    def shard(self, number: int, image_keys: np.ndarray) -> OpenTokenShard:
        """Shard `number`, checked against the manifest and the image shard's keys (u64 [samples]) when first opened."""
        opened = self._open.get(number)
        if opened is None:
            name = f"{self.folder}/{self._name(number)}"
            opened = retry(lambda: self.opened(number, lambda path: self._checked(number, path, image_keys)), name)
            self._open[number] = opened
            if len(self._open) > open_files(each=4):
                del self._open[next(iter(self._open))]
        return opened

    def _name(self, number: int) -> str:
        return token_path(Path(), self.manifest.shards[number].name).name

    def opened(self, number: int, open_: Callable[[Path], OpenTokenShard]) -> OpenTokenShard:
        """What `open_` makes of the file of shard `number`; a remote one is fetched."""
        if not isinstance(self.folder, Remote):
            return open_(self.folder / self._name(number))
        assert self._cache is not None, "a remote set has a cache"
        kept = Kept(self.folder, self._cache, self.manifest.fingerprint[:16])
        return kept.open(self._name(number), self.manifest.shards[number].digest, open_)

    def _checked(self, number: int, path: Path, image_keys: np.ndarray) -> OpenTokenShard:
        entry, opened = self.manifest.shards[number], open_token_shard(path)
        rows, columns = self.manifest.tokenizer["grid"]
        shape = (self.manifest.num_views, entry.samples, rows * columns)
        if opened.tokens.shape != shape:
            raise ShardError(f"{path} holds tokens of shape {opened.tokens.shape}, its manifest says {shape}: {_CURE}")
        check_rows(str(path), opened.keys, image_keys)
        self._check_contents(number, path, opened)
        return opened

    def _check_contents(self, number: int, path: Path, opened: OpenTokenShard) -> None:
        """The manifest vouches for the rows' checksums, and they for each row that is read. Files of earlier versions
        are read through, once a process: a wrong token looks like any other."""
        entry = self.manifest.shards[number]
        if entry.checks_digest:
            whole = opened.checks_digest == entry.checks_digest
        else:
            whole = number in self._whole or file_digest(path) == entry.digest
        if not whole:
            raise ShardError(f"{path} is damaged, or not the file its manifest lists (digest differs): {_CURE}")
        self._whole.add(number)


def token_shard_entry(folder: Path, name: str, image_digest: str) -> TokenShard:
    """The manifest's line for a finished token file."""
    path = token_path(folder, name)
    opened = open_token_shard(path)
    return TokenShard(
        name=name,
        samples=len(opened.keys),
        digest=file_digest(path),
        image_digest=image_digest,
        checks_digest=opened.checks_digest,
    )


def token_counts(tokens: TokenSet, at_most_shards: int = 64) -> np.ndarray:
    """How often each visual token occurs, i64 [vocabulary], over all views of (evenly spaced) shards."""
    shards = len(tokens.manifest.shards)
    counts = np.zeros(tokens.manifest.tokenizer["vocabulary"], dtype=np.int64)
    for number in range(0, shards, -(-shards // at_most_shards)):
        found = tokens.opened(number, open_token_shard).tokens
        counts += np.bincount(found.reshape(-1), minlength=len(counts))
    return counts
