"""Many views of each image, built in workers that live across shards: for `tokenize`. Uses torch, as
shards.stream.loader does."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import COLUMNS, Row
from beitforge.shards.format.levels import Greys
from beitforge.shards.format.views import FIELDS, ViewPolicy, Views, draw_views
from beitforge.shards.stream.image_set import DamagedSample, ImageSet, KnownBad
from beitforge.shards.stream.loader import cut_into, start_worker
from beitforge.shards.stream.read_ahead import ReadAhead


class Piece(NamedTuple):
    """Rows `first` to `stop` of a shard."""

    shard: int
    first: int
    stop: int


class ViewBatch(NamedTuple):
    """K views of the n images of a piece: keys u64 [n] · views with leading [K, n], as drawn and cut · pixels u8 [n, K,
    3, H, W] · bad u8 [n] (1: unreadable) · key and reason of those that were not known to be, by row."""

    piece: Piece
    keys: np.ndarray
    views: Views
    pixels: torch.Tensor
    bad: np.ndarray
    reasons: dict[int, tuple[str, str]]


class _Found(NamedTuple):
    """What was read of an image, or why it cannot be used."""

    known: Row
    tones: np.ndarray
    data: bytes | DamagedSample


@dataclass(frozen=True, kw_only=True)
class ViewCutter(Dataset):
    """Each image of a piece decoded once and cut by views 0 to K - 1 of the policy, which are drawn with it: nobody
    holds the views of more than is in hand.

    `resample` is the tokenizer's filter (shards.stream.loader.cut_into).
    """

    images: ImageSet
    policy: ViewPolicy
    num_views: int
    size: tuple[int, int]
    resample: str
    decoder: str = "auto"

    def cut(self, piece: Piece) -> ViewBatch:
        """The batch of a piece. Raises ShardError when its shard cannot be read."""
        rows, found = self._ahead.batch(piece, self._coming(piece))
        columns = {
            name: np.array(values, COLUMNS[name])
            for name, values in zip(Row._fields, zip(*(one.known for one in found), strict=True), strict=True)
        }
        views = self._draw(piece, columns, np.array([one.tones for one in found], np.uint16))
        pixels = torch.zeros((len(rows), self.num_views, 3, *self.size), dtype=torch.uint8)
        bad, reasons = np.zeros(len(rows), dtype=np.uint8), {}
        for n, ((_, row), one) in enumerate(zip(rows, found, strict=True)):
            try:
                if isinstance(one.data, DamagedSample):
                    raise one.data
                image = codec.decode_whole(one.data, one.known.flags, self.decoder)
            except (DamagedSample, codec.ImageError) as error:
                bad[n] = 1
                if not isinstance(error, KnownBad):
                    reasons[row] = self.images.index(piece.shard).key(row), str(error)
                continue
            for k, box in enumerate(views.boxes[:, n].tolist()):
                how = bool(views.flips[k, n]), views.levels[k, n, :2].tolist()
                cut_into(pixels[n, k], codec.crop(image, box), *how, self.resample)
        return ViewBatch(piece, columns["key_hash"], views, pixels, bad, reasons)

    @functools.cached_property
    def _ahead(self) -> ReadAhead[Piece, list[tuple[int, int]], _Found]:
        return ReadAhead(lambda piece: [(piece.shard, row) for row in range(piece.first, piece.stop)], self._read)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_ahead"}

    def _coming(self, piece: Piece) -> Piece | None:
        """What this worker is asked for next, where it is of the same shard."""
        worker, size = get_worker_info(), piece.stop - piece.first
        first = piece.first + size * (worker.num_workers if worker else 1)
        samples = self.images.manifest.shards[piece.shard].samples
        return Piece(piece.shard, first, min(first + size, samples)) if first < samples else None

    def _read(self, place: tuple[int, int]) -> _Found:
        known, tones = self.images.row(*place), self.images.tones(*place)
        try:
            return _Found(known, tones, self.images.read_row(*place, known))
        except DamagedSample as error:
            return _Found(known, tones, error)

    def _draw(self, piece: Piece, columns: dict[str, np.ndarray], tones: np.ndarray) -> Views:
        """Views with leading [K, n]; an unreadable image (0 × 0) gets the box of a single pixel."""
        rows, count = np.arange(piece.first, piece.stop), self.num_views
        keys, widths, heights = (np.tile(columns[name], count) for name in ("key_hash", "width", "height"))
        drawn = draw_views(
            self.policy,
            keys,
            np.repeat(np.arange(count), len(rows)),
            widths.clip(1),
            heights.clip(1),
            Greys(np.tile(columns["mean_grey"], count), np.tile(tones, (count, 1))),
        )
        parts = (getattr(drawn, name) for name in FIELDS)
        return Views(*(part.reshape(count, len(rows), *part.shape[1:]) for part in parts))

    def __getitem__(self, piece: Piece) -> ViewBatch | str:
        """The batch, or the one line of its ShardError: raised in a worker it would come back as a traceback."""
        try:
            return self.cut(piece)
        except ShardError as error:
            return str(error)


def _as_it_is(found: Any) -> Any:
    return found


class _Pieces:
    """What DataLoader takes for its sampler: the pieces that are asked for at the time."""

    def __init__(self) -> None:
        self.now: Iterable[Piece] = ()

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.now)


class ViewLoader:
    """Batches cut by `workers` processes (0: by this one), which live as long as the loader, a context, is open."""

    def __init__(self, cutter: ViewCutter, *, workers: int, prefetch: int):
        """prefetch: pieces that each worker has in hand."""
        self._pieces = _Pieces()
        self._loader: DataLoader = DataLoader(
            cutter,
            batch_size=None,
            sampler=self._pieces,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=start_worker,
        )

    def __enter__(self) -> "ViewLoader":
        return self

    def __exit__(self, *_: object) -> None:
        del self._loader  # ends them: they obey no signal but this process's

    def load(self, pieces: Iterable[Piece]) -> Iterator[ViewBatch]:
        """The batches of pieces, in order; may be called again. The pieces are asked for one by one, no earlier than a
        worker has room for them, and after the workers were started, which inherit no lock that is taken then.

        Raises ShardError for a shard that cannot be read, whichever process met it."""
        self._pieces.now = pieces
        for found in self._loader:
            if isinstance(found, str):
                raise ShardError(found)
            yield found
