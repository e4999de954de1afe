"""Many views of each image of a shard, built in the worker: for `tokenize`. Uses torch, as shards.stream.loader
does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from beitforge.shards.decode import codec
from beitforge.shards.format.views import Views
from beitforge.shards.stream.image_set import DamagedSample, ImageSet, KnownBad
from beitforge.shards.stream.loader import cut_into, start_worker


class ViewBatch(NamedTuple):
    """K views of n images of one shard: rows i64 [n] · pixels u8 [n, K, 3, H, W] · bad u8 [n] (1: unreadable) · reasons
    of those that were not known to be, by row."""

    rows: torch.Tensor
    pixels: torch.Tensor
    bad: torch.Tensor
    reasons: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class ShardViews(Dataset):
    """Item i is `per_item` images of a shard from row i · per_item on, each decoded once and cut by K records.

    `views` are those of the whole shard, with leading [K, samples]; `resample` is the tokenizer's filter.
    """

    images: ImageSet
    shard: int
    views: Views
    size: tuple[int, int]
    resample: str
    per_item: int
    decoder: str = "auto"

    def __len__(self) -> int:
        return -(-self.views.flips.shape[1] // self.per_item)

    def __getitem__(self, i: int) -> ViewBatch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        views = self.views
        rows = np.arange(i * self.per_item, min((i + 1) * self.per_item, views.flips.shape[1]), dtype=np.int64)
        pixels = torch.zeros((len(rows), len(views.flips), 3, *self.size), dtype=torch.uint8)
        bad, reasons = np.zeros(len(rows), dtype=np.uint8), {}
        for n, row in enumerate(rows.tolist()):
            try:
                known = self.images.row(self.shard, row)
                data = self.images.read_row(self.shard, row, known)
                image = codec.decode_whole(data, known.flags, self.decoder)
            except (DamagedSample, codec.ImageError) as error:
                bad[n] = 1
                if not isinstance(error, KnownBad):
                    reasons[row] = str(error)
                continue
            for k, box in enumerate(views.boxes[:, row].tolist()):
                how = bool(views.flips[k, row]), views.levels[k, row, :2].tolist()
                cut_into(pixels[n, k], codec.crop(image, box), *how, self.resample)
        return ViewBatch(torch.from_numpy(rows), pixels, torch.from_numpy(bad), reasons)


def load_view_batches(cuts: ShardViews, *, workers: int, prefetch: int) -> Iterator[ViewBatch]:
    """Iterate over the items in row order, decoded by `workers` processes (0: here)."""
    prefetched = prefetch if workers else None
    loader = DataLoader(
        cuts, batch_size=None, num_workers=workers, prefetch_factor=prefetched, worker_init_fn=start_worker
    )
    return iter(loader)
