"""Whole files or none: atomic writes, digests, and safetensors files read by offset.

A file that exists under its final name is complete. Partial files carry a `.partial-` infix, are never read, and are
harmless wherever a killed process left them.
"""

import contextlib
import errno
import json
import os
import resource
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards.errors import ShardError

PARTIAL = ".partial-"

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


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a partial path beside `path`; flush it to disk and rename it into place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(
                f"no space left while writing {path}; free some and run the same command again: what is finished stays"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def open_files(each: int) -> int:
    """How many things with `files` open files each a process may keep open, leaving half of its limit to others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(32, min(soft, 65536) // 2 // each)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave what was there."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """xxh3-128 of a whole file, hex. Guards against damage and mix-ups, not against an adversary."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; the same tensors and metadata always give the same bytes.

    Written here because the library's writer puts the metadata in an order that differs from process to process, which
    would change digests, and reports a full disk as an error of its own that is no OSError.
    """
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(np.ascontiguousarray(tensor).data)


def open_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map a safetensors file: read-only arrays backed by the file, and its metadata. Reads the header only.

    Raises ShardError when the file is missing, cut short, or its header does not describe it.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            header = json.loads(file.read(length)) if length <= size - 8 else None
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing; make it again with the command that made its folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ShardError(f"{path} is not a whole safetensors file: its header is damaged; make it again")
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, np.ndarray] = {}
    start = 8 + length
    try:
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ShardError(f"{path} is {size} bytes long but its header describes {end}: damaged; make it again")
        mapped = np.memmap(path, dtype=np.uint8, mode="r") if end > start else np.empty(size, np.uint8)
        mapped = mapped.view(np.ndarray)  # a memmap's own class takes a microsecond more for every row read
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = mapped[start + first : start + last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} is not a whole safetensors file: {error}; make it again") from error
    return tensors, metadata
