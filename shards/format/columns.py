"""manifest.columns: the shards of a manifest.json as columns, so that 100,000 of them need not be parsed to be known.

A safetensors file with a column per field: i64 [shards] of numbers, u8 [shards, width] of texts in UTF-8, filled up
with zeros. The metadata hold the manifest's other fields (`rest`, JSON) and its fingerprint. The last 16 bytes (`seal`)
are the xxh3-128 of manifest.json, which names on its first line that of all the bytes before them: each is the other's,
or is not believed. What is asked for is read by offset, out of the page cache that all processes of a machine share,
and is checked by the block checksums that a process takes when it opens the file.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from beitforge.shards.errors import Damaged
from beitforge.shards.storage.reading import OpenFile, parse_json
from beitforge.shards.storage.remote import Missing
from beitforge.shards.storage.retry import anew
from beitforge.shards.storage.tensors import Tensor, TensorFile, laid_out

NAME = "manifest.columns"
SEAL = "seal"  # the last tensor
SEAL_BYTES = 16
MOST_NAME = 200  # bytes of a shard's name, and of any text here
_MOST_REST = 1 << 23  # bytes: the header holds them
_MOST_COUNT = 2**53
MOST_BYTES = 1 << 28  # of a file of columns
_SLICE = 1 << 14  # shards whose columns are looked at together, which takes little memory
_KEPT = 1024  # entries that are made together, and those made one by one that are kept
_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Entry = TypeVar("Entry")


def is_plain(value: object) -> bool:
    """Whether a value is a text on one line that every terminal and file system takes."""
    return isinstance(value, str) and _ODD.search(value) is None


def is_file_name(name: str) -> bool:
    """Whether a shard may have this name: that of a file in the set's own folder, which can be printed."""
    return is_plain(name) and "/" not in name and name not in ("", ".", "..") and len(name.encode()) <= MOST_NAME


@dataclass(frozen=True)
class Held:
    """A column in memory."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def some(self, first: int, last: int) -> np.ndarray:
        return self.array[first:last]


Columns = dict[str, Tensor | Held]


class Shards(Sequence[Entry], Generic[Entry]):
    """The entries of a manifest out of its columns, made when they are asked for. Raises ShardError where these cannot
    be read any more, or were changed."""

    def __init__(self, kind: type[Entry], columns: Columns, told: dict[str, str], where: str):
        """told: the metadata of the file."""
        self.columns, self._kind, self._told, self._where = columns, kind, told, where
        self._made = functools.lru_cache(maxsize=_KEPT)(self._one)
        # What gives the same columns anew where reading fails: the file may have been replaced.
        self.again: Callable[[], Columns] | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, place: Any) -> Any:
        found = range(len(self))[place]
        return self._made(found) if isinstance(found, int) else [self._made(number) for number in found]

    def __iter__(self) -> Iterator[Entry]:
        for first in range(0, len(self), _KEPT):
            yield from self._some(first, min(first + _KEPT, len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} shards of {self._where}>"

    def __getstate__(self) -> tuple:
        """Another process gets the columns themselves."""
        columns = {name: Held(self._rows(name, 0, len(self))) for name in self.columns}
        return self._kind, columns, self._told, self._where

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def fingerprint(self, beside: str) -> str:
        """The manifest's, as whoever wrote it found it; empty where it was of something else `beside` the shards."""
        return self._told.get("fingerprint", "") if self._told.get("beside") == beside else ""

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Samples of each shard, i64 [shards]."""
        return self._rows("samples", 0, self.columns["samples"].shape[0])

    def column(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """A field of every shard, or of those from `first` on to before `last`: i64 [shards], or bytes of a text each,
        read now."""
        found = self._rows(name, first, len(self) if last is None else min(last, len(self)))
        return found if found.ndim == 1 else as_texts(found)

    def _one(self, number: int) -> Entry:
        return self._some(number, number + 1)[0]

    def _some(self, first: int, last: int) -> list[Entry]:
        values = []
        for name in self.columns:
            found = self._rows(name, first, last)
            values.append(found.tolist() if found.ndim == 1 else [text.decode() for text in as_texts(found).tolist()])
        return [self._kind(**dict(zip(self.columns, row, strict=True))) for row in zip(*values, strict=True)]

    def _rows(self, name: str, first: int, last: int) -> np.ndarray:
        return anew(lambda: self.columns[name].some(first, last), self._reopen, lambda: self._where)

    def _reopen(self) -> None:
        if self.again is not None:
            self.columns = self.again()


def as_texts(column: np.ndarray) -> np.ndarray:
    """u8 [n, width] as n texts in bytes."""
    return np.ascontiguousarray(column).view(f"S{column.shape[1]}")[:, 0]


def column_of(shards: Sequence[Any], name: str) -> np.ndarray:
    """A field of the shards of any manifest, as Shards.column gives it."""
    if isinstance(shards, Shards):
        return shards.column(name)
    values = [getattr(shard, name) for shard in shards]
    if values and isinstance(values[0], str):
        return np.array([value.encode("utf-8", "surrogatepass") for value in values])
    return np.array(values, np.int64)


def first_difference(ours: Sequence[Any], field: str, theirs: Sequence[Any], other: str) -> int | None:
    """The first of as many shards whose `field` is not the `other` of theirs."""
    for first in range(0, len(ours), _SLICE):
        parts = []
        for shards, name in ((ours, field), (theirs, other)):
            parts.append(
                shards.column(name, first, first + _SLICE)
                if isinstance(shards, Shards)
                else column_of(shards[first : first + _SLICE], name)
            )
        if (wrong := np.flatnonzero(parts[0] != parts[1])).size:
            return first + int(wrong[0])
    return None


def columns_of(kind: type, shards: Sequence[Any]) -> dict[str, np.ndarray] | None:
    """The columns of a list of shards; None where what they say does not fit into columns."""
    columns: dict[str, np.ndarray] = {}
    for field in fields(kind):
        values = [getattr(shard, field.name) for shard in shards]
        if field.type is int:
            if not all(type(value) is int and 0 < value < _MOST_COUNT for value in values):
                return None
            columns[field.name] = np.array(values, np.int64)
        else:
            if not all(is_plain(value) and len(value.encode()) <= MOST_NAME for value in values):
                return None
            texts = np.array([value.encode() for value in values])
            columns[field.name] = texts.view(np.uint8).reshape(len(texts), -1)
    return columns if sum(column.nbytes for column in columns.values()) < MOST_BYTES // 2 else None


def file_parts(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """The parts of a file of columns; the last is the seal, which is not set yet."""
    return laid_out({**columns, SEAL: np.zeros(SEAL_BYTES, np.uint8)}, metadata, SEAL)


def digest_of(parts: Sequence[bytes | memoryview]) -> str:
    """xxh3-128 of them, end to end."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def sealed_file(source: Path | OpenFile, digest: str, manifest_digest: str | None) -> TensorFile:
    """A file of columns that has the digest its manifest names and the seal of that; None for any seal. Raises Damaged,
    ShardError, EOFError, OSError."""
    whole = source if isinstance(source, OpenFile) else OpenFile(source)
    if whole.size > MOST_BYTES:
        raise Damaged(f"it has {whole.size} bytes, and may have {MOST_BYTES}")
    file = TensorFile(whole)
    seal, end = file.tensors.get(SEAL), whole.size - SEAL_BYTES
    if seal is None or seal.dtype != np.uint8 or seal.shape != (SEAL_BYTES,) or seal.start != end:
        raise Damaged("it has no seal")
    if file.bytes.digest_before(end) != digest:
        raise Damaged("its digest differs from the one that manifest.json names")
    file.check_header()
    if manifest_digest not in (None, whole.read(SEAL_BYTES, end).hex()):
        raise Damaged("it was made with another manifest.json")
    return file


def rest_of(file: TensorFile) -> dict:
    """The other fields of the manifest. Raises Damaged."""
    content = parse_json(file.metadata.get("rest", "").encode("utf-8", "surrogatepass"))
    if not isinstance(content, dict):
        raise Damaged("its fields are no object")
    return content


def rest_text(content: dict) -> str | None:
    """What `rest_of` reads; None for more than a header takes."""
    text = json.dumps(content)
    return text if len(text) <= _MOST_REST else None


def checked_columns(kind: type, file: TensorFile) -> Columns:
    """The columns of a kind of shards, whose values are what these may say. Raises Damaged, EOFError, OSError."""
    columns: Columns = {}
    for field in fields(kind):
        column = file.tensors.get(field.name)
        if column is None:
            raise Damaged(f"it has no column {field.name}")
        if field.type is int:
            whole = column.dtype == np.int64 and len(column.shape) == 1
        else:
            whole = column.dtype == np.uint8 and len(column.shape) == 2 and 0 < column.shape[1] <= MOST_NAME
        if not whole or not column.shape[0] or column.shape[0] != next(iter(columns.values()), column).shape[0]:
            raise Damaged(f"its column {field.name} is of another form")
        columns[field.name] = column
        for first in range(0, len(column), _SLICE):
            found = column.some(first, min(first + _SLICE, len(column)))
            if not (_are_counts(found) if field.type is int else _are_plain(found)):
                raise Damaged(f"its column {field.name} holds what no shard has")
    names = file.tensors["name"]
    _check_names(names)
    if columns["samples"].some(0, names.shape[0]).sum(dtype=np.float64) >= _MOST_COUNT / 2:
        raise Damaged("it has more samples than can be counted")
    return columns


def _are_counts(values: np.ndarray) -> bool:
    return bool((values > 0).all() and (values < _MOST_COUNT).all())


def _are_plain(texts: np.ndarray) -> bool:
    """Of u8 [n, width]."""
    if texts.min() >= 0x20 and texts.max() < 0x7F:
        return True
    ended = texts == 0
    if ((texts < 0x20) & ~ended).any() or (texts == 0x7F).any() or (ended[:, :-1] & ~ended[:, 1:]).any():
        return False
    beyond = np.flatnonzero((texts >= 0x80).any(axis=1))
    try:
        return all(is_plain(text.decode()) for text in as_texts(texts[beyond]).tolist())
    except UnicodeDecodeError:
        return False


def _check_names(column: Tensor) -> None:
    """Raises Damaged unless these plain texts can be the names of files, each of another."""
    rising = True
    for first in range(0, len(column), _SLICE):
        before = max(0, first - 1)
        raw = column.some(before, min(first + _SLICE, len(column)))
        names = as_texts(raw)
        odd = names[(raw[:, 0] == 0) | (raw[:, 0] == ord("."))]
        if (raw == ord("/")).any() or np.isin(odd, [b"", b".", b".."]).any():
            raise Damaged("its shards have names that are no file's")
        rising = rising and bool((names[1:] > names[:-1]).all())
    if not rising and len(np.unique(as_texts(column.some(0, len(column))))) < len(column):
        raise Damaged("two of its shards have one name")


def unusable(folder: Path | str, error: Exception, cure: str) -> str:
    """The line about a file of columns that is named, and is not there or not believed."""
    if isinstance(error, (FileNotFoundError, Missing)):
        return (
            f"{folder} has no {NAME}, which its manifest.json names: all of manifest.json is read in its place, which "
            f"takes large sets longer and more memory: {cure}"
        )
    return f"{folder}/{NAME} is left aside, and all of manifest.json read ({error}): {cure}"
