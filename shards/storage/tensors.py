"""Safetensors files: written whole and always alike, read row by row."""

import functools
import json
import math
import struct
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.storage.files import atomic_path
from beitforge.shards.storage.reading import OpenFile, forget, parse_json, twice_read
from beitforge.shards.storage.retry import reread, retry

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
}
MOST_HEADER = 1 << 24  # bytes
_MOST_ROWS, _MOST_DIMENSIONS = 1 << 48, 8
BLOCK_SUMS = "block_sums"  # the tensor of a file that has the checksums of its blocks in itself
_BLOCK = 4096  # bytes that have a checksum of their own
_CURE = "make it again with the command that made its folder"


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], last: str = "") -> str:
    """Write a safetensors file atomically; the same tensors and metadata always give the same bytes. Returns the
    xxh3-128 of what was written. last: the tensor that ends the file, where the order matters.

    Written here because the library's writer puts the metadata in an order that differs from process to process, which
    would change digests, and reports a full disk as an error of its own that is no OSError.
    """
    state = xxhash.xxh3_128()
    with atomic_path(path) as partial, open(partial, "wb") as file:
        for part in laid_out(tensors, metadata, last):
            file.write(part)
            state.update(part)
    return state.hexdigest()


def laid_out(tensors: dict[str, np.ndarray], metadata: dict[str, str], last: str = "") -> list[bytes | memoryview]:
    """The parts of a safetensors file: its header and its tensors, with `last` at the end."""
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[0] == last, -item[1].dtype.itemsize, item[0]))
    header: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = (np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data for _, tensor in ordered)
    return [struct.pack("<Q", len(text)) + text, *data]


def with_checks(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> dict[str, np.ndarray]:
    """The tensors and BLOCK_SUMS, u64 [blocks]: the xxh3-64 of each 4 KiB of the file that they make with these
    metadata and BLOCK_SUMS as its last, up to that."""
    count, needed = 0, 1
    while count != needed:  # the header says how many there are, and counts
        count = needed
        parts = laid_out({**tensors, BLOCK_SUMS: np.zeros(count, np.uint64)}, metadata, BLOCK_SUMS)[:-1]
        needed = -(-sum(len(part) for part in parts) // _BLOCK)
    return {**tensors, BLOCK_SUMS: np.array(_sums(b"".join(parts)), np.uint64)}


def _sums(data: bytes) -> array:
    return array("Q", (xxhash.xxh3_64_intdigest(data[at : at + _BLOCK]) for at in range(0, len(data), _BLOCK)))


class Checked:
    """The bytes of a file: any, until what they have to be is known; then only those. `digest` reads all of them for
    that, `digest_before` some; where a file has BLOCK_SUMS and these are vouched for, it is `sums` that are told."""

    def __init__(self, file: OpenFile):
        self.file = file
        self.sums: array | None = None  # xxh3-64 of each block
        self.end = file.size  # of what the sums are of

    @functools.cached_property
    def digest(self) -> str:
        """xxh3-128 of the whole file, read now."""
        return self.digest_before(self.file.size)

    def digest_before(self, end: int) -> str:
        """xxh3-128 of what lies before `end`, read now. What lies behind stays as it is read."""
        state, sums = xxhash.xxh3_128(), array("Q")
        for start in range(0, end, 256 * _BLOCK):
            data = self.file.read(min(256 * _BLOCK, end - start), start)
            state.update(data)
            sums.extend(_sums(data))
        if self.sums is None:
            self.sums, self.end = sums, end
        return state.hexdigest()

    def fits(self, sums: array) -> bool:
        """Whether checksums can be those of this file."""
        return len(sums) == -(-self.file.size // _BLOCK)

    def read(self, size: int, start: int) -> bytes:
        """Raises Damaged, EOFError, OSError."""
        data, within = self.around(size, start)
        return data if len(data) == size else data[within : within + size]

    def around(self, size: int, start: int) -> tuple[bytes, int]:
        """Bytes among which those asked for are, and from where on: not copied again. Raises as `read` does."""
        if self.sums is None or not size or start >= self.end:
            return self.file.read(size, start), 0
        if start + size > self.end:
            raise EOFError(f"bytes {start} to {start + size} are asked for, and {self.end} are known")
        block, stop = start // _BLOCK, min(self.end, start + size + -(start + size) % _BLOCK)
        known, before = self.sums[block : -(-stop // _BLOCK)], block * _BLOCK
        data = self.file.read(stop - before, before)
        if _sums(data) != known:
            data = b"".join(
                twice_read(self.file, min(_BLOCK, stop - at), at, sums)
                for at, sums in zip(range(before, stop, _BLOCK), known, strict=True)
            )
        return data, start - before

    def certain(self, size: int, start: int) -> bytes:
        """`read`, tried again where it fails. Raises ShardError."""
        return retry(lambda: self.read(size, start), str(self.file.path))


class Tensor:
    """One tensor of an open file; indexing reads the row, and `whole` the rest."""

    def __init__(self, source: Checked, start: int, dtype: np.dtype, shape: tuple[int, ...]):
        self.source, self.start, self.dtype, self.shape = source, start, dtype, shape
        self.rows = [math.prod(shape[depth:]) * dtype.itemsize for depth in range(len(shape) + 1)]  # bytes, by depth

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: Any) -> np.ndarray:
        """What lies at the leading indexes, read now; of all of it, where NumPy's other indexes ask for more. Raises
        IndexError, and as Checked.read does."""
        indexes = place if isinstance(place, tuple) else (place,)
        if not all(isinstance(index, int) for index in indexes):
            return self.whole()[place]
        start = self.start
        for depth, index in enumerate(indexes):
            if not 0 <= index < self.shape[depth]:
                raise IndexError(f"{index} of {self.shape[depth]}")
            start += index * self.rows[depth + 1]
        found = np.frombuffer(self.source.read(self.rows[len(indexes)], start), self.dtype)
        return found.reshape(self.shape[len(indexes) :])[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.whole(), dtype=dtype)

    def some(self, first: int, last: int) -> np.ndarray:
        """From the leading index `first` on to before `last`, read now. Raises as Checked.read does."""
        size = self.rows[1]
        data, within = self.source.around((last - first) * size, self.start + first * size)
        found = np.frombuffer(data, self.dtype, (last - first) * size // self.dtype.itemsize, within)
        return found.reshape(last - first, *self.shape[1:])

    def whole(self) -> np.ndarray:
        """All of it, read now. Raises ShardError when that fails."""
        return np.frombuffer(self.source.certain(self.rows[0], self.start), self.dtype).reshape(self.shape)


class TensorFile:
    """A safetensors file, open; of its contents nothing is kept. `tensors` by name, `metadata` as written."""

    def __init__(self, source: Path | OpenFile):
        """Reads the header only. Raises ShardError when the file is missing or no regular file, Damaged when it is cut
        short or its header does not describe it, OSError when its disk fails."""
        try:
            file = source if isinstance(source, OpenFile) else OpenFile(source)
        except FileNotFoundError as error:
            raise ShardError(f"{source} is missing; {_CURE}") from error
        self.path, self.bytes = file.path, Checked(file)
        header, start = self._header(file)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("its metadata are no texts")
        self.metadata: dict[str, str] = metadata
        self.tensors = {name: self._tensor(name, entry, start) for name, entry in header.items()}
        end = max((tensor.start + tensor.rows[0] for tensor in self.tensors.values()), default=start)
        if end != file.size:
            raise Damaged(f"{self.path} is {file.size} bytes long but its header describes {end}: damaged; {_CURE}")

    @property
    def digest(self) -> str:
        """Checked.digest, from which on every read is checked."""
        return self.bytes.digest

    @functools.cached_property
    def checks_digest(self) -> str:
        """xxh3-128 of the checksums of its blocks, which end it; empty where it has none."""
        sums = self._checksums()
        return xxhash.xxh3_128_hexdigest(sums.tobytes()) if sums is not None else ""

    @property
    def checks_hold(self) -> bool:
        """Whether all of the file is what its own checksums say, where it has some. Raises ShardError."""
        sums = self._checksums()
        return sums is None or _sums(self.bytes.certain(self.tensors[BLOCK_SUMS].start, 0)).tobytes() == sums.tobytes()

    def vouched(self, checks_digest: str) -> bool:
        """Whether the file's own checksums are those that `checks_digest` vouches for. If so every read is checked by
        them from now on, the header too, and nothing else was read. Raises Damaged, EOFError, OSError."""
        sums = self._checksums()
        if sums is None or xxhash.xxh3_128_hexdigest(sums.tobytes()) != checks_digest:
            return False
        self.bytes.sums, self.bytes.end = array("Q", sums.tobytes()), self.tensors[BLOCK_SUMS].start
        self.check_header()
        return True

    def check_header(self) -> None:
        """Raises Damaged where the header was read otherwise than it is known to be by now."""
        size, found = self._head
        if xxhash.xxh3_64_intdigest(self.bytes.read(size, 0)) != found:
            raise self._damaged("its header came otherwise before")

    def _checksums(self) -> np.ndarray | None:
        found = self.tensors.get(BLOCK_SUMS)
        if found is None or found.dtype != np.uint64 or found.start + found.rows[0] != self.bytes.file.size:
            return None
        return found.some(0, len(found)) if found.shape == (-(-found.start // _BLOCK),) else None

    def _damaged(self, why: str) -> Damaged:
        return Damaged(f"{self.path} is not a whole safetensors file: {why}; {_CURE}")

    def _header(self, file: OpenFile) -> tuple[dict, int]:
        """The header, and where the tensors begin."""
        if not file.size:
            raise self._damaged("it is empty (zero bytes), cut or never written")
        prefix = file.up_to(8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else file.size
        if length > min(MOST_HEADER, file.size - 8):
            raise self._damaged("its header is damaged")
        text = file.up_to(length, 8)
        self._head = 8 + length, xxhash.xxh3_64_intdigest(prefix + text)
        try:
            header = parse_json(text)
        except Damaged as error:
            raise self._damaged(f"its header is damaged ({error})") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is damaged")
        return header, 8 + length

    def _tensor(self, name: str, entry: Any, start: int) -> Tensor:
        impossible = self._damaged(f"what it says of {name[:40]} cannot be")
        try:
            dtype, shape, (first, last) = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
            numbers = [first, last, *shape]
        except (KeyError, TypeError, ValueError) as error:
            raise impossible from error
        if len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < _MOST_ROWS for n in numbers):
            raise impossible
        tensor = Tensor(self.bytes, start + first, dtype, tuple(shape))
        if last - first != tensor.rows[0]:
            raise impossible
        return tensor


def open_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, read whole, and its metadata. Raises ShardError when the file is missing,
    damaged, or cannot be read."""

    def read() -> tuple[dict[str, np.ndarray], dict[str, str]]:
        opened = reread(lambda: TensorFile(path), lambda: forget(path))
        return {name: tensor.whole() for name, tensor in opened.tensors.items()}, opened.metadata

    return retry(read, str(path))
