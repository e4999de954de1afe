"""The index beside each tar: what makes it random access, exactly counted, and safe against damage.

`NAME.tar` has `NAME.index.safetensors`, a row per sample in tar order. Columns (n rows):

    key_hash u64 · key_text u8 [total] with key_end u64 (utf-8, row i ends at key_end[i])
    image_offset, image_size u64 · label_offset, label_size u64 · json_offset, json_size u64 (size 0: no such member)
    image_xxh3 u64 of the image bytes · width, height u32 in pixels · mean_grey f32 (whole image as RGB, ITU-R 601
    luma, 0-255) · label i64 · flags u32 (FLAG_*)
    tones u16 [n, 32], the image's tone table (shards.format.levels), which indexes of earlier versions lack

The metadata says how the tar was made, and under `digest` has the xxh3-128 of its other entries and all columns: where
no manifest lists an index, nothing else tells a damaged one from a whole one. The file ends with the checksums of its
blocks (shards.storage.tensors.BLOCK_SUMS), whose digest the manifest lists: an index is then never read through.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from beitforge.shards.errors import Damaged
from beitforge.shards.format.levels import KNOTS, NO_TONES, Greys, without_tones
from beitforge.shards.storage.reading import OpenFile, forget
from beitforge.shards.storage.retry import reread, retry
from beitforge.shards.storage.tensors import BLOCK_SUMS, MOST_HEADER, TensorFile, with_checks, write_tensors

SUFFIX = ".index.safetensors"
DIGEST = "digest"
TONES = "tones"
MOST_IMAGE = 1 << 31  # bytes
_MOST_KEY = 4096  # bytes of a key, on average

FLAG_JPEG, FLAG_PNG, FLAG_WEBP = 1, 2, 4
FLAG_PROGRESSIVE, FLAG_NOT_RGB, FLAG_ROTATED, FLAG_ANIMATED = 8, 16, 32, 64  # ROTATED: an EXIF turn not yet applied
FLAG_LABELLED, FLAG_BAD = 128, 256  # BAD: the bytes are as packed but do not decode
FLAG_REGIONS = 512  # a JPEG of which a crop is decoded alone (shards.decode.regions)

COLUMNS = {
    "key_hash": np.uint64,
    "image_offset": np.uint64,
    "image_size": np.uint64,
    "label_offset": np.uint64,
    "label_size": np.uint64,
    "json_offset": np.uint64,
    "json_size": np.uint64,
    "image_xxh3": np.uint64,
    "width": np.uint32,
    "height": np.uint32,
    "mean_grey": np.float32,
    "label": np.int64,
    "flags": np.uint32,
}


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """One sample, as the scanner of a tar sees it."""

    key: str
    key_hash: int
    image_offset: int
    image_size: int
    label_offset: int = 0
    label_size: int = 0
    json_offset: int = 0
    json_size: int = 0
    image_xxh3: int
    width: int
    height: int
    mean_grey: float
    label: int = 0
    flags: int
    tones: tuple[int, ...] = NO_TONES


class Row(NamedTuple):
    """What reading a sample asks of its row."""

    key_hash: int
    image_offset: int
    image_size: int
    image_xxh3: int
    width: int
    height: int
    mean_grey: float
    label: int
    flags: int


_RECORD = np.dtype([(name, COLUMNS[name]) for name in Row._fields])


class Index:
    """The index of one shard, open: a row is read when it is asked for, and has to be part of what `digest`, the
    xxh3-128 of the whole file, was made of; or, where the checksums in the file itself are `vouched` for, what these
    are of: then the file was not read through, and has no `digest`. Row i is sample i of the tar.

    `columns` are read row by row; an attribute of a column's name is the whole column, read anew each time.
    """

    def __init__(self, file: TensorFile, checks_digest: str = ""):
        """checks_digest: of the file's own checksums, from a manifest. Raises Damaged where the file is no index."""
        self.path, self.columns, self.metadata = file.path, file.tensors, file.metadata
        self._file, self._bytes, self._read = file, file.bytes, file.bytes.read
        self._tar_bytes = 2**63
        self.vouched = bool(checks_digest) and file.vouched(checks_digest)
        self.digest = "" if self.vouched else file.digest
        cure = "make it again with `index`"
        for name, dtype in {**COLUMNS, "key_end": np.uint64, "key_text": np.uint8}.items():
            column = self.columns.get(name)
            if column is None or column.dtype != dtype or len(column.shape) != 1:
                raise Damaged(f"{self.path} has no column {name} of type {np.dtype(dtype)}: {cure}")
            if name != "key_text" and len(column) != len(self):
                raise Damaged(f"{self.path} has columns of unequal length ({name}): {cure}")
        tones = self.columns.get(TONES)
        if tones is not None and (tones.dtype != np.uint16 or tones.shape != (len(self), KNOTS)):
            raise Damaged(f"{self.path} has tone tables of type {tones.dtype} and shape {tones.shape}: {cure}")
        if not self.vouched:
            self._check_contents()

    def _check_contents(self) -> None:
        """What is asked of the rows that are read, of all."""
        ends = self.columns["key_end"].whole()
        if np.any(ends[1:] < ends[:-1]) or int(ends[-1] if len(ends) else 0) != len(self.columns["key_text"]):
            raise self._no_keys()
        self._check_greys(self.columns["mean_grey"].whole())

    @property
    def checks_hold(self) -> bool:
        """Whether the checksums in the file are those of the file, where it has some."""
        return self._file.checks_hold

    @property
    def checks_digest(self) -> str:
        """What the manifest lists of the checksums in the file; empty in those of earlier versions, without any."""
        return self._file.checks_digest

    def __len__(self) -> int:
        return len(self.columns["key_hash"])

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in COLUMNS:
            raise AttributeError(name)
        found = self.columns[name].whole()
        if name == "mean_grey":
            self._check_greys(found)
        return found

    def _check_greys(self, greys: np.ndarray) -> None:
        if not np.all((greys >= 0) & (greys <= 255)):
            raise Damaged(f"{self.path} has a mean grey that no image has: make it again with `index`")

    def _no_keys(self) -> Damaged:
        return Damaged(f"{self.path}: where its keys end cannot be: make it again with `index`")

    @property
    def greys(self) -> Greys:
        """Of every image."""
        means = self.mean_grey
        return Greys(means, self.columns[TONES].whole()) if self.has_tones else without_tones(means)

    @property
    def has_tones(self) -> bool:
        """Whether images have tone tables: not in indexes of earlier versions."""
        return TONES in self.columns

    @property
    def whole(self) -> bool:
        """Whether it is as it was written, by its own digest and checksums; one of an earlier version without a digest
        is not."""
        others = {name: value for name, value in self.metadata.items() if name != DIGEST}
        columns = {name: column.whole() for name, column in self.columns.items() if name != BLOCK_SUMS}
        return self.metadata.get(DIGEST) == _digest(columns, others) and self._file.checks_hold

    def row(self, row: int) -> Row:
        """What the columns say of a row. Raises IndexError, and as `rows` does."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return Row(*self.rows(row, row + 1)[0].item())

    def rows(self, first: int, last: int) -> np.ndarray:
        """What the columns say of the rows from `first` on to before `last`, or to the end: a record of Row's fields
        each. Raises as shards.storage.tensors.Checked.read does."""
        found = np.empty(max(0, min(last, len(self)) - first), _RECORD)
        for name in Row._fields:
            column = self.columns[name]
            size = column.dtype.itemsize
            found[name] = np.frombuffer(self._read(len(found) * size, column.start + first * size), column.dtype)
        if self.vouched:
            self._check_greys(found["mean_grey"])
            self._check_places(found["image_offset"], found["image_size"], first)
        return found

    def key(self, row: int) -> str:
        """The sample's key, for people; code compares key_hash."""
        ends, text = self.columns["key_end"].start, self.columns["key_text"].start
        first, last = max(0, row - 1), row  # of the ends that say where it is
        found = np.frombuffer(self._bytes.certain(8 * (last - first + 1), ends + 8 * first), np.uint64).tolist()
        start = found[0] if row else 0
        if not start <= found[-1] <= len(self.columns["key_text"]):
            raise self._no_keys()
        key = self._bytes.certain(found[-1] - start, text + start)
        return key.decode("utf-8", "surrogateescape")

    def check_places(self, tar_bytes: int) -> None:
        """Raises Damaged unless the images lie one behind the other within a tar of `tar_bytes`: all of them, now, or
        where the index is vouched for those that are read, when they are."""
        self._tar_bytes = tar_bytes
        if not self.vouched:
            self._check_places(self.image_offset, self.image_size, 0)

    def _check_places(self, offsets: np.ndarray, sizes: np.ndarray, first: int) -> None:
        """Of the rows from `first` on."""
        tar_bytes = self._tar_bytes
        beyond = np.flatnonzero((sizes > min(tar_bytes, MOST_IMAGE)) | (offsets > tar_bytes))
        if not len(beyond):
            ends = offsets + sizes
            beyond = np.flatnonzero((ends > tar_bytes) | (ends > np.append(offsets[1:], np.uint64(tar_bytes))))
        if len(beyond):
            raise Damaged(
                f"{self.path}: the image of row {first + beyond[0]}, {sizes[beyond[0]]} bytes from "
                f"{offsets[beyond[0]]} on, cannot lie in a tar of {tar_bytes} bytes: make the index again with `index`"
            )


def count_regions(flags: np.ndarray) -> int:
    """How many images of these flags are decoded crop by crop."""
    return int(np.count_nonzero(flags & FLAG_REGIONS))


def most_bytes(samples: int) -> int:
    """More than an index of that number of samples ever has; their keys are paths."""
    return MOST_HEADER + samples * (len(COLUMNS) * 8 + 2 * KNOTS + 8 + _MOST_KEY)


def index_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{SUFFIX}"


def write_index(path: Path, rows: list[IndexRow], metadata: dict[str, str]) -> None:
    """Write the index of one shard by rename. `metadata` says how the tar was made."""
    columns: dict[str, np.ndarray] = {
        name: np.array([getattr(row, name) for row in rows], dtype=dtype).reshape(len(rows))
        for name, dtype in COLUMNS.items()
    }
    texts = [row.key.encode("utf-8", "surrogateescape") for row in rows]
    columns["key_text"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    columns[TONES] = np.array([row.tones for row in rows], dtype=np.uint16).reshape(len(rows), KNOTS)
    columns["key_end"] = np.cumsum([len(text) for text in texts], dtype=np.uint64).reshape(len(rows))
    metadata = {**metadata, DIGEST: _digest(columns, metadata)}
    write_tensors(path, with_checks(columns, metadata), metadata, BLOCK_SUMS)


def _digest(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    state = xxhash.xxh3_128(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(columns):
        state.update(name.encode())
        state.update(columns[name].tobytes())
    return state.hexdigest()


def open_index(source: Path | OpenFile) -> Index:
    """Open an index, reading it through once. Raises ShardError when it is missing, damaged, or of another layout, or
    its disk fails."""
    if isinstance(source, OpenFile):
        return Index(TensorFile(source))
    return retry(lambda: reread(lambda: Index(TensorFile(source)), lambda: forget(source)), str(source))


def read_columns(paths: list[Path], names: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    """By name the columns of many indexes, which need not be open all at once. Raises as open_index does."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths:
        index = open_index(path)
        for name in names:
            found[name].append(getattr(index, name))
    return found
