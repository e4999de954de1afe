"""litdata's chunks and loader, with our decode as the dataset's transform."""

from collections.abc import Iterator
from pathlib import Path

import litdata
import torch

from benchmarks.data.loader_peers.equal_work import Cut, shown
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, SEED, Given, LoaderPath


class Images(litdata.StreamingDataset):
    """An item is (pixels, number)."""

    def __init__(self, folder: Path, given: Given):
        super().__init__(str(folder), shuffle=True, seed=SEED)
        self.cut = Cut(given)

    def __getitem__(self, index) -> tuple[torch.Tensor, int]:
        found = super().__getitem__(index)
        return self.cut.image(found["number"], found["image"]), found["number"]


def open_path(given: Given, variant: str) -> LoaderPath:
    def item(number: int) -> dict:
        return {"image": given.data(number), "number": number}

    def make(folder: Path) -> None:
        litdata.optimize(
            item, list(range(len(given))), str(folder), num_workers=1, chunk_bytes="64MB", start_method="fork"
        )

    dataset = Images(given.copy("litdata", make), given)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=PREFETCH)
    return LoaderPath(endless(loader), shown)


def endless(loader: litdata.StreamingDataLoader) -> Iterator:
    while True:
        yield from loader
