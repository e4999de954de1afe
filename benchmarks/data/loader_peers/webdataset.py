"""webdataset's reader over our tars, with our decode or with Pillow's."""

import io
from collections.abc import Iterator

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.data.loader_peers.equal_work import Cut, empty_batch, shown
from benchmarks.data.loader_peers.given import BATCH, BUFFER, PREFETCH, SIZE, Given, LoaderPath


def tars(urls: list[str]) -> webdataset.WebDataset:
    """Shuffled as its documentation has it."""
    return webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(BUFFER)


class WithPillow:
    """What torchvision's transforms on Pillow images do with a given view."""

    def __init__(self, given: Given):
        self.boxes, self.flips = given.boxes, given.flips

    def into(self, out: torch.Tensor, number: int, data: bytes) -> None:
        """Fill `out`, u8 [3, SIZE, SIZE]."""
        x, y, width, height = self.boxes[number].tolist()
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((x, y, x + width, y + height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if self.flips[number]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))


class Batches(IterableDataset):
    """The batch is filled in the worker."""

    def __init__(self, urls: list[str], cut: Cut | WithPillow):
        self.reader, self.cut = tars(urls).repeat(), cut

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        samples = iter(self.reader)
        while True:
            pixels, numbers = empty_batch(), torch.empty(BATCH, dtype=torch.int64)
            for i in range(BATCH):
                sample = next(samples)
                numbers[i] = number = int(sample["__key__"])
                self.cut.into(pixels[i], number, sample["jpg"])
            yield pixels, numbers


def open_path(given: Given, variant: str) -> LoaderPath:
    """ours or pillow: who decodes."""
    dataset = Batches(given.urls(), Cut(given) if variant == "ours" else WithPillow(given))
    return LoaderPath(iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=PREFETCH)), shown)
