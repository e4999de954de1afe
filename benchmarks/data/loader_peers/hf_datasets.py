"""Hugging Face datasets, map-style in Arrow files, with our decode as the transform."""

from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.data.loader_peers.equal_work import Cut, shown
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, Given, LoaderPath

FEATURES = datasets.Features({"image": datasets.Value("binary"), "number": datasets.Value("int64")})


def open_path(given: Given, variant: str) -> LoaderPath:
    def make(folder: Path) -> None:
        numbers = range(len(given))
        columns = {"image": [given.data(number) for number in numbers], "number": list(numbers)}
        datasets.Dataset.from_dict(columns, FEATURES).save_to_disk(folder)

    cut = Cut(given)

    def transform(found: dict) -> dict:
        images = [cut.image(number, data) for number, data in zip(found["number"], found["image"], strict=True)]
        return {"pixels": images, "number": found["number"]}

    def collate(items: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([item["pixels"] for item in items]), torch.tensor([item["number"] for item in items])

    dataset = datasets.load_from_disk(given.copy("hf_datasets", make)).with_transform(transform)
    sampler = RandomSampler(dataset, num_samples=1 << 24)
    loader = DataLoader(
        dataset, batch_size=BATCH, sampler=sampler, num_workers=1, prefetch_factor=PREFETCH, collate_fn=collate
    )
    return LoaderPath(iter(loader), shown)
