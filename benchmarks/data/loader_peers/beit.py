"""BEiT's own data path, which draws its own boxes: its transform on files, or on webdataset."""

import io
from collections.abc import Iterator

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from benchmarks.data import official_path
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, Given, LoaderPath
from benchmarks.data.loader_peers.webdataset import tars


def official_sample(sample: dict) -> official_path.Sample:
    return official_path.transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))


def open_path(given: Given, variant: str) -> LoaderPath:
    """files or webdataset."""
    dataset: official_path.OfficialFiles | IterableDataset
    if variant == "files":
        dataset = official_path.OfficialFiles(sorted((given.folder / "originals").glob("*.jpg")))
        sampler = RandomSampler(dataset, num_samples=1 << 24, replacement=False)
    else:
        dataset, sampler = tars(given.urls()).map(official_sample).repeat(), None
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=1, prefetch_factor=PREFETCH)
    return LoaderPath(checked(iter(loader)), None)


def checked(batches: Iterator) -> Iterator:
    """No numbers unless the batch is whole."""
    for batch in batches:
        shapes = [tuple(part.shape) for part in batch]
        assert shapes == [(BATCH, 3, 224, 224), (BATCH, 3, 112, 112), (BATCH, 14, 14)], f"BEiT's path gives {shapes}"
        yield batch
