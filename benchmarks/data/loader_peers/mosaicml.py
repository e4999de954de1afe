"""mosaicml-streaming's shards and loader, with our decode in the dataset."""

from collections.abc import Iterator
from pathlib import Path

import torch

from beitforge.pipeline import torchvision_stub
from benchmarks.data.loader_peers.equal_work import Cut, shown
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, SEED, Given, LoaderPath

torchvision_stub.install()
import streaming  # noqa: E402

COLUMNS = {"image": "bytes", "number": "int"}


class Images(streaming.StreamingDataset):
    """An item is (pixels, number)."""

    def __init__(self, folder: Path, given: Given):
        super().__init__(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)
        self.cut = Cut(given)

    def __getitem__(self, index) -> tuple[torch.Tensor, int]:
        found = super().__getitem__(index)
        return self.cut.image(found["number"], found["image"]), found["number"]


def open_path(given: Given, variant: str) -> LoaderPath:
    def make(folder: Path) -> None:
        with streaming.MDSWriter(out=str(folder), columns=COLUMNS) as writer:
            for number in range(len(given)):
                writer.write({"image": given.data(number), "number": number})

    streaming.base.util.clean_stale_shared_memory()
    dataset = Images(given.copy("mosaicml", make), given)
    loader = streaming.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=PREFETCH)
    return LoaderPath(endless(loader), shown)


def endless(loader: streaming.StreamingDataLoader) -> Iterator:
    while True:
        yield from loader
