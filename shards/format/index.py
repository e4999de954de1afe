"""The index beside each tar: what makes it random access, exactly counted, and safe against damage.

`NAME.tar` has `NAME.index.safetensors`, a row per sample in tar order. Columns (n rows):

    key_hash u64 · key_text u8 [total] with key_end u64 (utf-8, row i ends at key_end[i])
    image_offset, image_size u64 · label_offset, label_size u64 · json_offset, json_size u64 (size 0: no such member)
    image_xxh3 u64 of the image bytes · width, height u32 in pixels · mean_grey f32 (whole image as RGB, ITU-R 601
    luma, 0-255) · label i64 · flags u32 (FLAG_*)

The metadata says how the tar was made, and under `digest` has the xxh3-128 of its other entries and all columns: where
no manifest lists an index, nothing else tells a damaged one from a whole one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.files import open_tensors, write_tensors

SUFFIX = ".index.safetensors"
DIGEST = "digest"

FLAG_JPEG, FLAG_PNG, FLAG_WEBP = 1, 2, 4
FLAG_PROGRESSIVE, FLAG_NOT_RGB, FLAG_ROTATED, FLAG_ANIMATED = 8, 16, 32, 64  # ROTATED: an EXIF turn not yet applied
FLAG_LABELLED, FLAG_BAD = 128, 256  # BAD: the bytes are as packed but do not decode

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


@dataclass(frozen=True)
class Index:
    """The columns of one shard, mapped. Row i is sample i of the tar."""

    path: Path
    columns: dict[str, np.ndarray]
    metadata: dict[str, str]

    def __len__(self) -> int:
        return len(self.columns["key_hash"])

    def __getattr__(self, name: str) -> np.ndarray:
        if name in COLUMNS:
            return self.columns[name]
        raise AttributeError(name)

    @property
    def whole(self) -> bool:
        """Whether it is as it was written, by its own digest; those of earlier versions carry none, and are not."""
        others = {name: value for name, value in self.metadata.items() if name != DIGEST}
        return self.metadata.get(DIGEST) == _digest(self.columns, others)

    def key(self, row: int) -> str:
        """The sample's key, for people; code compares key_hash."""
        ends = self.columns["key_end"]
        start = int(ends[row - 1]) if row else 0
        return bytes(self.columns["key_text"][start : int(ends[row])]).decode("utf-8", "surrogateescape")


def index_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{SUFFIX}"


def write_index(path: Path, rows: list[IndexRow], metadata: dict[str, str]) -> None:
    """Write the index of one shard by rename. `metadata` says how the tar was made."""
    columns = {
        name: np.array([getattr(row, name) for row in rows], dtype=dtype).reshape(len(rows))
        for name, dtype in COLUMNS.items()
    }
    texts = [row.key.encode("utf-8", "surrogateescape") for row in rows]
    columns["key_text"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    columns["key_end"] = np.cumsum([len(text) for text in texts], dtype=np.uint64).reshape(len(rows))
    write_tensors(path, columns, {**metadata, DIGEST: _digest(columns, metadata)})


def _digest(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    state = xxhash.xxh3_128(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(columns):
        state.update(name.encode())
        state.update(columns[name].tobytes())
    return state.hexdigest()


def open_index(path: Path) -> Index:
    """Map an index. Raises ShardError when it is missing, damaged, or of another layout."""
    columns, metadata = open_tensors(path)
    for name, dtype in {**COLUMNS, "key_end": np.uint64, "key_text": np.uint8}.items():
        if name not in columns or columns[name].dtype != dtype:
            raise ShardError(f"{path} has no column {name} of type {np.dtype(dtype)}: make it again with `index`")
        if name != "key_text" and len(columns[name]) != len(columns["key_hash"]):
            raise ShardError(f"{path} has columns of unequal length ({name}): make it again with `index`")
    return Index(path, columns, metadata)
