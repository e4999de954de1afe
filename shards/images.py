"""Random access to an image shard set: bytes by (shard, row), every read checked against the index."""

import errno
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from shards.errors import ShardError
from shards.files import file_digest
from shards.index import FLAG_BAD, Index, index_path, open_index
from shards.manifest import ImageManifest, read_image_manifest

Value = TypeVar("Value")

_RETRY_SECONDS = (0.2, 1.0, 5.0, 20.0)
_OPEN_SHARDS = 256


class DamagedSample(ShardError):
    """One sample whose bytes are not what was packed, or do not decode. The stream substitutes it and counts it."""


@dataclass
class _OpenShard:
    descriptor: int
    index: Index


def retried(read: Callable[[], Value], what: str) -> Value:
    """Run `read`; on an I/O error try again with growing pauses, then give up: skipping would change the order."""
    for pause in (*_RETRY_SECONDS, None):
        try:
            return read()
        except OSError as error:
            if pause is None or error.errno in (errno.ENOENT, errno.EACCES, errno.EMFILE):
                raise ShardError(f"cannot read {what}: {error}; check the storage, then start again") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


class ImageSet:
    """The tars and indexes of one folder. Keeps the latest used shards open; may be handed to worker processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: ImageManifest = read_image_manifest(folder)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "manifest": self.manifest, "_open": OrderedDict()}

    def __len__(self) -> int:
        return self.manifest.samples

    def index(self, shard: int) -> Index:
        """The index of shard number `shard`, checked against the manifest when first opened."""
        return self._shard(shard).index

    def read(self, shard: int, row: int) -> bytes:
        """The encoded picture. Raises DamagedSample when its checksum or flags say it cannot be used."""
        opened = self._shard(shard)
        index, name = opened.index, self.manifest.shards[shard].name
        if int(index.flags[row]) & FLAG_BAD:
            raise DamagedSample(f"{name} {index.key(row)}: does not decode (known since it was indexed)")
        size, offset = int(index.image_size[row]), int(index.image_offset[row])
        data = retried(lambda: os.pread(opened.descriptor, size, offset), f"{name}.tar in {self.folder}")
        if xxhash.xxh3_64_intdigest(data) != int(index.image_xxh3[row]):
            raise DamagedSample(f"{name} {index.key(row)}: the bytes differ from what was packed (checksum)")
        return data

    def _shard(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is None:
            opened = retried(lambda: self._open_shard(shard), f"{self.manifest.shards[shard].name} in {self.folder}")
            self._open[shard] = opened
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1].descriptor)
        self._open.move_to_end(shard)
        return opened

    def _open_shard(self, shard: int) -> _OpenShard:
        entry = self.manifest.shards[shard]
        tar, beside = self.folder / f"{entry.name}.tar", index_path(self.folder, entry.name)
        cure = "restore it, or pack again; `verify` lists every difference"
        if file_digest(beside) != entry.index_digest:
            raise ShardError(f"{beside} is not the index that {self.folder}/manifest.json lists: {cure}")
        index = open_index(beside)
        descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(descriptor).st_size
        if size != entry.bytes or len(index) != entry.samples:
            os.close(descriptor)
            raise ShardError(
                f"{tar} has {size} bytes and {len(index)} indexed samples; the manifest says {entry.bytes} bytes and "
                f"{entry.samples} samples: {cure}"
            )
        return _OpenShard(descriptor, index)
