"""Random access to an image shard set: bytes by (shard, row), every read checked against the index.

A set is a folder, or lies behind a URL: then what is read of it comes in chunks of samples, kept in this node's cache.
"""

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from beitforge.shards.decode import codec
from beitforge.shards.errors import Damaged, ShardError, printable
from beitforge.shards.format.index import FLAG_BAD, TONES, Index, Row, index_path, most_bytes
from beitforge.shards.format.levels import NO_TONES, Greys, without_tones
from beitforge.shards.format.manifest import ImageManifest, ImageShard, read_image_manifest
from beitforge.shards.storage.cache import ALWAYS, PART, Cache
from beitforge.shards.storage.files import open_files
from beitforge.shards.storage.reading import OpenFile, Turns, forget, twice_read
from beitforge.shards.storage.remote import Kept, Remote, cache_for, is_url
from beitforge.shards.storage.retry import READS, anew, reread
from beitforge.shards.storage.tensors import TensorFile
from beitforge.shards.stream.order import Chunks, Order

Value = TypeVar("Value")

_ROWS, _MOST_ROWS = 64, 4096  # of an index that are read together, and how many times that is kept: 15 MB
_MOST_CHUNK = 1 << 33  # bytes that are fetched together; images whose chunk has more are fetched alone
_CURE = "restore it, or pack again; `verify` lists every difference"
_log = logging.getLogger(__name__)


class DamagedSample(ShardError):
    """One sample whose bytes are not what was packed, or do not decode. The stream substitutes it and counts it."""


class KnownBad(DamagedSample):
    """One that was known not to decode when its set was indexed, or to have no tokens when it was tokenized."""


@dataclass(frozen=True)
class Sample:
    """One image of a set: its key, its label (-1 where it has none) and the encoded file."""

    key: str
    label: int
    data: bytes

    def pixels(self) -> np.ndarray:
        """The decoded image, uint8 [H, W, 3] in RGB, as stored. Raises ShardError when it does not decode."""
        return codec.decode(self.data)


@dataclass
class _OpenShard:
    """`tar` is None where it is remote."""

    tar: OpenFile | None
    index: Index


@dataclass
class Reading:
    """Who reads a set on this node and how far they are, so that the cache evicts by furthest next use.

    ranks: of this node, of `world` in all. sample: the one that is read now.
    """

    order: Order
    ranks: range
    world: int
    sample: int


class ImageSet:
    """The tars and indexes of one set. Keeps the latest used shards open. May be handed to worker processes, and
    be read by many threads at once."""

    def __init__(self, where: Path | str, cache: Cache | None = None, chunk: int = 64):
        """where: a folder or a URL. cache: of this node, for a URL. chunk: samples that are fetched together."""
        self.folder: Path | Remote = Remote(str(where)) if is_url(where) else Path(where)
        self.manifest: ImageManifest = read_image_manifest(where, cache)
        self.chunk = chunk
        self.reading: Reading | None = None
        self._cache = cache
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._turns = Turns()
        self._rows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._doubted: set[int] = set()  # whose indexes are read through, for their checksums did not hold
        if isinstance(self.folder, Remote) and cache is None:
            raise ShardError(f"{where} is a URL, which is read through a cache on this machine only")

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": OrderedDict(), "_rows": OrderedDict()}

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` in the order of the manifest, with any index that a list takes. Raises DamagedSample as
        `read` does."""
        number = range(len(self))[number]
        shard = int(np.searchsorted(self._ends, number, side="right"))
        row = number - int(self._ends[shard] - self.manifest.counts[shard])
        known = self.row(shard, row)
        return Sample(self.index(shard).key(row), known.label, self.read_row(shard, row, known))

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.manifest.counts)

    def index(self, shard: int) -> Index:
        """The index of shard number `shard`, checked against the manifest when first opened."""
        return self._anew(shard, lambda: self._shard(shard)).index

    def key_hashes(self, shard: int) -> np.ndarray:
        """Of all its samples, u64."""

        def read() -> np.ndarray:
            index = self._shard(shard).index
            return index.rows(0, len(index))["key_hash"]

        return self._anew(shard, read)

    def greys(self, shards: np.ndarray, rows: np.ndarray, means: np.ndarray) -> Greys:
        """Of the images at these places, i64 [n] each. means: their mean greys."""
        found = without_tones(means)
        for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            found.tones[i] = self.tones(shard, row)
        return found

    def tones(self, shard: int, row: int) -> np.ndarray:
        """The tone table of an image, u16 [KNOTS]; zeros where its index has none."""

        def read() -> np.ndarray:
            index = self._shard(shard).index
            return index.columns[TONES][row] if index.has_tones else np.array(NO_TONES, np.uint16)

        return self._anew(shard, read)

    def row(self, shard: int, row: int) -> Row:
        """What the index says of a sample. Rows are read some at a time: those beside one come soon."""
        place = shard, row // _ROWS
        rows = self._rows.get(place)
        if rows is None:
            first = row - row % _ROWS
            rows = self._rows[place] = self._anew(shard, lambda: self._shard(shard).index.rows(first, first + _ROWS))
            if len(self._rows) > _MOST_ROWS:
                self._rows.popitem(last=False)
        return Row(*rows[row % _ROWS].item())

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image. Raises DamagedSample when its checksum or flags say it cannot be used."""
        return self.read_row(shard, row, self.row(shard, row))

    def read_row(self, shard: int, row: int, known: Row) -> bytes:
        """`read` where what the index says of it is known."""
        return self._anew(shard, lambda: self._read(shard, row, known))

    def _anew(self, shard: int, read: Callable[[], Value]) -> Value:
        """The value of `read`, made again where it fails. Raises ShardError."""

        def where() -> str:
            return f"{self.manifest.shards[shard].name} in {self.folder}"

        def forget() -> None:
            self._open.pop(shard, None)
            self._doubted.add(shard)

        try:
            return anew(read, forget, where)
        except DamagedSample:
            raise
        except ShardError as error:
            if self._is_replaced():
                raise ShardError(f"{self.folder} was changed while it was read: start again") from error
            raise

    def _is_replaced(self) -> bool:
        """Whether another set lies in the folder than was opened."""
        if isinstance(self.folder, Remote):
            return False
        with contextlib.suppress(ShardError):
            return read_image_manifest(self.folder, warn=False).fingerprint != self.manifest.fingerprint
        return False

    def _read(self, shard: int, row: int, known: Row) -> bytes:
        opened, name = self._shard(shard), self.manifest.shards[shard].name
        if known.flags & FLAG_BAD:
            raise KnownBad(f"{name} {opened.index.key(row)}: does not decode (known since it was indexed)")
        if isinstance(self.folder, Remote):
            data = self._read_remote(self.folder, shard, row, known)
            if xxhash.xxh3_64_intdigest(data) == known.image_xxh3:
                return data
            self.folder.check_ranges(f"{name}.tar")
        else:
            assert opened.tar is not None, "a folder's tars are open"
            try:
                return twice_read(opened.tar, known.image_size, known.image_offset, known.image_xxh3)
            except Damaged:
                pass
        raise DamagedSample(f"{name} {opened.index.key(row)}: the bytes differ from what was packed (checksum)")

    def _read_remote(self, remote: Remote, shard: int, row: int, known: Row) -> bytes:
        """An image out of the cache, or past it where it has no room. When it is not what was packed, its chunk is
        fetched once more, which repairs the cache, and then the image alone: processes that share a chunk may each
        drop what another has just fetched anew."""
        entry, now = self._entry(shard, row // self.chunk), ALWAYS
        if self.reading is not None:
            now = self.reading.sample
        offset, size = known.image_offset, known.image_size
        start, stop = self._span(shard, row // self.chunk)
        within = offset - start
        for tries in range(1, READS + 1):
            data = None
            if tries <= 2 and stop - start <= _MOST_CHUNK:
                data = self._kept().read(entry, within, size)
                if data is None and self.fetcher(shard, row // self.chunk)(now):
                    data = self._kept().read(entry, within, size)
            if data is None:
                data = remote.part(f"{self.manifest.shards[shard].name}.tar", offset, offset + size)
            if tries == READS or xxhash.xxh3_64_intdigest(data) == known.image_xxh3:
                return data
            if tries == 1:
                self._kept().drop(entry)
            key = self.index(shard).key(row)
            _log.warning("%s: %s came damaged, or is so in the cache; fetching it again", remote, printable(key))
        raise AssertionError("unreachable")

    def fetcher(self, shard: int, number: int) -> Callable[[float], bool]:
        """What sees to it that a chunk of a remote set is in the cache; given a sample, it answers False where there is
        no room among what is used before that. It may be called by any thread."""
        remote, (start, stop) = self.folder, self._span(shard, number)
        assert isinstance(remote, Remote), "a set of this machine is read where it lies"
        tar, entry = f"{self.manifest.shards[shard].name}.tar", self._entry(shard, number)
        uses = self._uses if self.reading else None

        def fetch(before: float) -> bool:
            return self._kept().keep_part(entry, stop - start, lambda: remote.part(tar, start, stop), uses, before)

        return fetch

    def _kept(self) -> Cache:
        assert self._cache is not None, "a remote set has a cache"
        return self._cache

    def _entry(self, shard: int, number: int) -> str:
        name = self.manifest.shards[shard].name
        return f"{self._owner}/{name}.{self.chunk}x{number:06d}{PART}"

    @functools.cached_property
    def _owner(self) -> str:
        """The set's folder in the cache."""
        return self.manifest.fingerprint[:16]

    @functools.cached_property
    def _names(self) -> tuple[np.ndarray, np.ndarray]:
        """The names of all shards, in bytes and sorted, and the number of each."""
        names = self.manifest.column("name")
        turn = np.argsort(names, kind="stable")
        return names[turn], turn

    def _numbers(self, names: list[str]) -> np.ndarray:
        """The numbers of the shards of these names, i64 [n]; -1 for those of no shard."""
        known, numbers = self._names
        wanted = np.array([name.encode("utf-8", "surrogateescape") for name in names])
        places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        return np.where(known[places] == wanted, numbers[places], -1)

    def _span(self, shard: int, number: int) -> tuple[int, int]:
        """The bytes of the tar from the first image of a chunk to the end of its last."""
        samples = self.manifest.shards[shard].samples
        first, last = self.row(shard, number * self.chunk), self.row(shard, min((number + 1) * self.chunk, samples) - 1)
        return first.image_offset, last.image_offset + last.image_size

    def _uses(self, entries: list[str]) -> np.ndarray:
        """cache.Uses of this set's parts; those of another chunk size are not used."""
        reading, names = self.reading, []
        assert reading is not None, "asked for only while it is read in an order"
        chunks, known = np.zeros(len(entries), np.int64), np.zeros(len(entries), bool)
        for i, entry in enumerate(entries):
            name, part = entry.partition("/")[2].removesuffix(PART).rsplit(".", 1)
            chunk, _, number = part.partition("x")
            known[i] = int(chunk) == self.chunk
            chunks[i] = int(number) if known[i] else 0
            names.append(name)
        shards = self._numbers(names)
        known &= shards >= 0
        chunks[~known], shards[~known] = 0, 0
        used = reading.order.next_use(Chunks(shards, chunks), reading.sample, reading.ranks, reading.world)
        return np.where(known, used, 2**62).astype(np.float64)

    def _shard(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is None:
            with self._turns.of(shard):
                opened = self._open.get(shard)
                if opened is None:
                    opened = reread(lambda: self._open_shard(shard), lambda: self._forget(shard))
                    self._open[shard] = opened
                    if len(self._open) > open_files(each=4):  # a tar and its index, and half for tokens
                        self._open.popitem(last=False)
        with contextlib.suppress(KeyError):  # another thread had it forgotten
            self._open.move_to_end(shard)
        return opened

    def _forget(self, shard: int) -> None:
        """Have the index come from the disk when it is opened next."""
        if not isinstance(self.folder, Remote):
            forget(index_path(self.folder, self.manifest.shards[shard].name))

    def _open_shard(self, shard: int) -> _OpenShard:
        """Raises ShardError, Damaged where another look may find otherwise, OSError."""
        entry, tar = self.manifest.shards[shard], None
        indexed = functools.partial(self._indexed, entry, shard in self._doubted)
        if isinstance(self.folder, Remote):
            name, uses = index_path(Path(), entry.name).name, self._uses if self.reading else None
            kept, most = Kept(self.folder, self._kept(), self._owner), most_bytes(entry.samples)
            index = kept.open(name, entry.index_digest, most, indexed, uses)
        else:
            index = indexed(index_path(self.folder, entry.name))
            tar = OpenFile(self.folder / f"{entry.name}.tar")
        size = tar.size if tar else entry.bytes
        if size != entry.bytes or len(index) != entry.samples:
            raise Damaged(
                f"{self.folder}/{entry.name}.tar has {size} bytes and {len(index)} indexed samples; the "
                f"manifest says {entry.bytes} bytes and {entry.samples} samples: {_CURE}"
            )
        index.check_places(size)
        return _OpenShard(tar, index)

    def _indexed(self, entry: ImageShard, doubted: bool, source: Path | OpenFile) -> Index:
        index = Index(TensorFile(source), "" if doubted else entry.checks_digest)
        if not index.vouched and index.digest != entry.index_digest:
            raise Damaged(f"{index.path} is not the index that {self.folder}/manifest.json lists: {_CURE}")
        return index


def open_images(where: Path | str, *, cache: Path | str = "", cache_gb: float = 100.0) -> ImageSet:
    """Open the image shard set in a folder or behind a URL. Raises ShardError when there is none.

    cache: the folder that a remote set is read through, by default one of the user's own; cache_gb: its size.
    """
    return ImageSet(where, cache_for(str(where), str(cache), cache_gb))
