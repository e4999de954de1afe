"""Token shards: the visual tokens of K recorded views of each image of an image shard, row for row.

`NAME.safetensors` per image shard `NAME.tar`: tokens u16 [views, samples, patches] · boxes, flips, jitters, orders (the
records, shards.format.views.Views with leading [views, samples]; levels, too) · keys u64 [samples] · bad u8 [samples]
(1: the image could not be read, its rows are zeros and the stream substitutes it) · checks u64 [views, samples], the
checksum of each row. Sets of earlier versions lack levels or checks. View-major, so that more views can follow.
"""

import functools
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.format.columns import first_difference
from beitforge.shards.format.manifest import ImageManifest, TokenManifest, TokenShard, read_token_manifest
from beitforge.shards.format.views import FIELDS, Views
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.files import open_files
from beitforge.shards.storage.reading import OpenFile, Turns, forget
from beitforge.shards.storage.remote import Kept, Remote, is_url
from beitforge.shards.storage.retry import anew, reread, retry
from beitforge.shards.storage.tensors import MOST_HEADER, TensorFile, write_tensors

Value = TypeVar("Value")

LEVELS = "levels"
_NO_LEVELS = np.zeros(0, np.uint8)
_CURE = "run `tokenize` again with this image set, or point data.tokens at the folder made from it"
_OTHER = "run `tokenize` with this image set into a new folder, or point data.tokens at the folder made from it"
CHECKS = "checks"
_ROW_BYTES = 64  # of a view of an image, and of an image, beside its tokens: more than there are
_DTYPES = {
    "tokens": np.uint16,
    "boxes": np.uint32,
    "flips": np.uint8,
    "jitters": np.float32,
    "orders": np.uint8,
    "keys": np.uint64,
    "bad": np.uint8,
}


class OpenTokenShard:
    """One token file, open: rows are read when they are asked for. An attribute of a tensor's name is all of it, read
    anew each time; `views` are the records."""

    def __init__(self, file: TensorFile):
        """Raises Damaged where the file is no token file."""
        self.file, self.path, self.metadata = file, file.path, file.metadata
        self._tensors = tensors = file.tensors
        for name, dtype in _DTYPES.items():
            if name not in tensors or tensors[name].dtype != dtype:
                raise Damaged(f"{self.path} has no tensor {name} of type {np.dtype(dtype)}: {_CURE}")
        if LEVELS in tensors and tensors[LEVELS].dtype != np.uint8:
            raise Damaged(f"{self.path}: {LEVELS} is of type {tensors[LEVELS].dtype}: {_CURE}")
        self.shape = tensors["tokens"].shape
        if len(self.shape) != 3:
            raise Damaged(f"{self.path}: tokens has shape {self.shape}, not views, samples, patches: {_CURE}")
        num_views, samples = self.shape[:2]
        shapes = {"boxes": (num_views, samples, 4), "jitters": (num_views, samples, 3), "keys": (samples,)}
        shapes |= {"flips": (num_views, samples), "orders": (num_views, samples), "bad": (samples,)}
        shapes |= {CHECKS: (num_views, samples)} if CHECKS in tensors else {}
        shapes |= {LEVELS: (num_views, samples, 3)} if LEVELS in tensors else {}
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise Damaged(
                    f"{self.path}: {name} has shape {tensors[name].shape}, its tokens ask for {shape}: {_CURE}"
                )
        if CHECKS in tensors and tensors[CHECKS].dtype != np.uint64:
            raise Damaged(f"{self.path}: {CHECKS} is of type {tensors[CHECKS].dtype}: {_CURE}")
        self._fields = [name for name in FIELDS if name in tensors]
        parts = [tensors[name] for name in ("tokens", *self._fields)]
        self._places = [(tensor.start, tensor.rows[2], tensor.dtype) for tensor in parts]
        self._bad, self._checks = tensors["bad"].start, tensors[CHECKS].start if self.has_checks else None

    def __getattr__(self, name: str) -> np.ndarray:
        if name in ("tokens", "keys", "bad"):
            return self._tensors[name].whole()
        raise AttributeError(name)

    @property
    def views(self) -> Views:
        found = {name: self._tensors[name].whole() for name in self._fields}
        return Views(**{LEVELS: np.zeros((*self.shape[:2], 0), np.uint8), **found})

    @property
    def has_checks(self) -> bool:
        """Whether rows have checksums: not in files of earlier versions."""
        return CHECKS in self._tensors

    @functools.cached_property
    def checks_digest(self) -> str:
        """xxh3-128 of the rows' checksums; empty where there are none."""
        return xxhash.xxh3_128_hexdigest(self._tensors[CHECKS].whole().tobytes()) if self.has_checks else ""

    def row(self, view: int, row: int) -> "TokenRow | None":
        """One image's tokens u16 [patches] and record, None where `tokenize` could not read it; read again where they
        are not what was written. Raises Damaged when they stay so; EOFError and OSError when the file cannot be
        read."""
        parts, mark = self._checked(view, row)
        if mark != b"\0":
            return None
        arrays = [np.frombuffer(part, dtype) for part, (_, _, dtype) in zip(parts, self._places, strict=True)]
        tokens, boxes, flips, jitters, orders, *levels = arrays
        return TokenRow(tokens, boxes, flips[0], jitters, orders[0], levels[0] if levels else _NO_LEVELS)

    def _checked(self, view: int, row: int) -> tuple[list[bytes], bytes]:
        """The bytes of a row's tokens and record, and of its mark."""

        num_views, samples = self.shape[:2]
        if not (0 <= view < num_views and 0 <= row < samples):
            raise IndexError(f"view {view} of {num_views}, row {row} of {samples}")
        bytes_of, place = self.file.bytes.read, view * samples + row

        def read() -> tuple[list[bytes], bytes]:
            parts = [bytes_of(size, start + place * size) for start, size, _ in self._places]
            mark = bytes_of(1, self._bad + row)
            if self._checks is not None:
                written = int.from_bytes(bytes_of(8, self._checks + place * 8), "little")
                if xxhash.xxh3_64_intdigest(b"".join([*parts, mark])) != written:
                    self.file.bytes.file.forget()
                    raise Damaged(
                        f"view {view} of row {row} of {self.path} is damaged (its checksum differs): restore the "
                        "file, or remove it and the manifest and run `tokenize` again"
                    )
            return parts, mark

        return reread(read)


class TokenRow(NamedTuple):
    """One view of one image: tokens u16 [patches], and its record (shards.format.views.Views)."""

    tokens: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    jitters: np.ndarray
    orders: np.ndarray
    levels: np.ndarray


def token_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def least_bytes(num_views: int, samples: int, patches: int) -> int:
    """What the tensors of a token file of any version have at least; its header comes on top."""
    rows, sides, factors = num_views * samples, 4, 3
    boxes, jitters = sides * _size("boxes"), factors * _size("jitters")
    a_view = patches * _size("tokens") + boxes + jitters + _size("flips") + _size("orders")
    return rows * a_view + samples * (_size("keys") + _size("bad"))


def _size(name: str) -> int:
    return np.dtype(_DTYPES[name]).itemsize


class Digests(NamedTuple):
    """xxh3-128 of a token file as it was written, and of its rows' checksums."""

    file: str
    checks: str


def write_token_shard(
    path: Path, tokens: np.ndarray, views: Views, keys: np.ndarray, bad: np.ndarray, metadata: dict[str, str]
) -> Digests:
    """Write one token file by rename. tokens u16 [views, samples, patches]; keys u64 [samples]; bad u8 [samples]."""
    given = {"tokens": tokens, "keys": keys, "bad": bad, **{name: getattr(views, name) for name in FIELDS}}
    tensors = {name: given[name].astype(dtype) for name, dtype in {**_DTYPES, LEVELS: np.uint8}.items()}
    checks = np.zeros(tokens.shape[:2], np.uint64)
    for view in range(len(checks)):
        checks[view] = _checks(tensors["bad"], *(tensors[name][view] for name in ("tokens", *FIELDS)))
    digest = write_tensors(path, {**tensors, CHECKS: checks}, metadata)
    return Digests(digest, xxhash.xxh3_128_hexdigest(checks.tobytes()))


def _checks(bad: np.ndarray, *parts: np.ndarray) -> list[int]:
    """TokenRow.check of every row of one view, whose tokens and record are `parts` [samples, …]."""
    rows = [np.ascontiguousarray(part).view(np.uint8).reshape(len(bad), -1) for part in (*parts, bad)]
    return [xxhash.xxh3_64_intdigest(row) for row in np.concatenate(rows, axis=1)]


def open_token_shard(source: Path | OpenFile) -> OpenTokenShard:
    """Open one token file. Raises ShardError when it is missing, damaged, its tensors do not fit each other, or its
    disk fails."""
    if isinstance(source, OpenFile):
        return OpenTokenShard(TensorFile(source))
    return retry(lambda: reread(lambda: OpenTokenShard(TensorFile(source)), lambda: forget(source)), str(source))


def check_pairing(images: ImageManifest, tokens: TokenManifest, folder: Path | str) -> None:
    """Refuse token sets of other images: names, counts and image digests must agree shard by shard."""
    count = len(images.shards)
    if len(tokens.shards) != count or first_difference(images.shards, "name", tokens.shards, "name") is not None:
        ours, theirs = images.column("name"), tokens.column("name")
        odd = [name.decode() for name in np.setxor1d(ours, theirs).tolist()] or ["the same names in another order"]
        raise ShardError(f"{folder} does not list the image set's shards ({len(odd)} differ, first {odd[0]}): {_OTHER}")
    wrong = np.flatnonzero(images.counts != tokens.counts)
    if len(wrong):
        number = int(wrong[0])
        raise ShardError(
            f"{folder}: {tokens.shards[number].name} has {tokens.shards[number].samples} samples, its image shard "
            f"{images.shards[number].samples}: {_OTHER}"
        )
    other = first_difference(images.shards, "digest", tokens.shards, "image_digest")
    if other is not None:
        raise ShardError(
            f"{folder}: {tokens.shards[other].name} was made from other images (image digest differs): {_OTHER}"
        )


def check_rows(name: str, keys: np.ndarray, image_keys: np.ndarray) -> None:
    """Refuse a token file whose rows are not the image shard's rows. keys, image_keys: u64 [samples]."""
    if len(keys) != len(image_keys) or not np.array_equal(keys, image_keys):
        wrong = int(np.argmax(keys != image_keys)) if len(keys) == len(image_keys) else min(len(keys), len(image_keys))
        raise Damaged(f"{name}: the token rows are not the images' rows (first difference in row {wrong}): {_OTHER}")


class TokenSet:
    """The token shards of one set, opened when first touched."""

    def __init__(self, where: Path | str, cache: Cache | None = None):
        """where: a folder or a URL. cache: of this node, for a URL."""
        self.folder: Path | Remote = Remote(str(where)) if is_url(where) else Path(where)
        self.manifest: TokenManifest = read_token_manifest(where, cache)
        self._cache = cache
        self._open: dict[int, OpenTokenShard] = {}
        self._turns = Turns()
        self._sums: dict[int, array] = {}  # of files that were read through
        self._doubted: set[int] = set()  # whose files could not be read, or not as they were written
        if isinstance(self.folder, Remote) and cache is None:
            raise ShardError(f"{where} is a URL, which is read through a cache on this machine only")

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": {}, "_sums": {}}

    def shard(self, number: int, image_keys: np.ndarray | Callable[[], np.ndarray]) -> OpenTokenShard:
        """Shard `number`, checked against the manifest and the image shard's keys (u64 [samples], or what gives them)
        when first opened. Raises ShardError."""
        return self._anew(number, lambda: self._shard(number, image_keys))

    def row(self, number: int, image_keys: Callable[[], np.ndarray], view: int, row: int) -> TokenRow | None:
        """A row of shard `number`; None where `tokenize` could not read its image. Raises ShardError."""
        return self._anew(number, lambda: self._shard(number, image_keys).row(view, row))

    def _anew(self, number: int, read: Callable[[], Value]) -> Value:
        def forget() -> None:
            self._open.pop(number, None)
            self._sums.pop(number, None)
            self._doubted.add(number)

        return anew(read, forget, lambda: f"{self.folder}/{self._name(number)}")

    def _shard(self, number: int, image_keys: np.ndarray | Callable[[], np.ndarray]) -> OpenTokenShard:
        opened = self._open.get(number)
        if opened is not None:
            return opened
        with self._turns.of(number):
            opened = self._open.get(number)
            if opened is None:
                keys = image_keys() if callable(image_keys) else image_keys
                opened = reread(lambda: self._opened(number, lambda source: self._checked(number, source, keys)))
                self._open[number] = opened
                if len(self._open) > open_files(each=4):
                    self._open.pop(next(iter(self._open)), None)
        return opened

    def _name(self, number: int) -> str:
        return token_path(Path(), self.manifest.shards[number].name).name

    def opened(self, number: int) -> OpenTokenShard:
        """The file of shard `number`, checked against the manifest alone; a remote one is fetched."""

        def fitting(source: Path | OpenFile) -> OpenTokenShard:
            opened = self._fitting(number, source)
            self._check_contents(number, opened)
            return opened

        return self._anew(number, lambda: self._opened(number, fitting))

    def _opened(self, number: int, open_: Callable[[Path | OpenFile], OpenTokenShard]) -> OpenTokenShard:
        if not isinstance(self.folder, Remote):
            return open_(self.folder / self._name(number))
        assert self._cache is not None, "a remote set has a cache"
        kept = Kept(self.folder, self._cache, self.manifest.fingerprint[:16])
        num_views, samples, patches = self._shape(number)
        most = MOST_HEADER + samples * (num_views * (2 * patches + _ROW_BYTES) + _ROW_BYTES)
        return kept.open(self._name(number), self.manifest.shards[number].digest, most, open_)

    def _shape(self, number: int) -> tuple[int, int, int]:
        rows, columns = self.manifest.tokenizer["grid"]
        return self.manifest.num_views, self.manifest.shards[number].samples, rows * columns

    def _fitting(self, number: int, source: Path | OpenFile) -> OpenTokenShard:
        opened, shape = OpenTokenShard(TensorFile(source)), self._shape(number)
        if opened.shape != shape:
            raise Damaged(f"{opened.path} holds tokens of shape {opened.shape}, its manifest says {shape}: {_CURE}")
        return opened

    def _checked(self, number: int, source: Path | OpenFile, image_keys: np.ndarray) -> OpenTokenShard:
        opened = self._fitting(number, source)
        check_rows(str(opened.path), opened.keys, image_keys)
        self._check_contents(number, opened)
        return opened

    def _check_contents(self, number: int, opened: OpenTokenShard) -> None:
        """The manifest vouches for the rows' checksums, and they for each row that is read. Files of earlier versions
        are read through, once a process, and every row has to be part of that: a wrong token looks like any other. So
        are those in a cache, which are fetched again, once they were doubted."""
        entry, contents = self.manifest.shards[number], opened.file.bytes
        doubted = number in self._doubted and isinstance(self.folder, Remote)
        if entry.checks_digest and not doubted:
            whole = opened.checks_digest == entry.checks_digest
        elif not doubted and number in self._sums and contents.fits(self._sums[number]):
            contents.sums, whole = self._sums[number], True
        else:
            whole = opened.file.digest == entry.digest
        if not whole:
            contents.file.forget()
            raise Damaged(f"{opened.path} is damaged, or not the file its manifest lists (digest differs): {_CURE}")
        if contents.sums is not None:
            self._sums[number] = contents.sums


def token_shard_entry(folder: Path, name: str, image_digest: str) -> TokenShard:
    """The manifest's line for a finished token file."""
    path = token_path(folder, name)
    opened = open_token_shard(path)
    return TokenShard(
        name=name,
        samples=len(opened.keys),
        digest=opened.file.digest,
        image_digest=image_digest,
        checks_digest=opened.checks_digest,
    )


def token_counts(tokens: TokenSet, at_most_shards: int = 64) -> np.ndarray:
    """How often each visual token occurs, i64 [vocabulary], over all views of (evenly spaced) shards."""
    shards = len(tokens.manifest.shards)
    counts = np.zeros(tokens.manifest.tokenizer["vocabulary"], dtype=np.int64)
    for number in range(0, shards, -(-shards // at_most_shards)):
        found = tokens.opened(number).tokens
        counts += np.bincount(found.reshape(-1), minlength=len(counts))
    return counts
