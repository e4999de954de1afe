"""Our decode and cut of the given views, for the loaders that leave both to their users."""

import numpy as np
import torch

from beitforge.shards.decode import codec
from beitforge.shards.stream.loader import TORCH, cut_into
from benchmarks.data.loader_peers.given import BATCH, SIZE, Given


class Cut:
    """Decode, crop, clamp, resize, flip, as the stream does it. whole: with clamp and flip."""

    def __init__(self, given: Given, whole: bool = True):
        self.boxes, self.sizes, self.flags = given.boxes.tolist(), list(map(tuple, given.sizes)), given.flags.tolist()
        self.flips = given.flips.tolist() if whole else [False] * len(given)
        self.limits = given.limits.tolist() if whole else [[0, 255]] * len(given)

    def into(self, out: torch.Tensor, number: int, data: bytes) -> None:
        """Fill `out`, u8 [3, SIZE, SIZE]."""
        crop = codec.decode_view(data, self.boxes[number], self.sizes[number], self.flags[number])
        cut_into(out, crop, self.flips[number], self.limits[number], TORCH)

    def image(self, number: int, data: bytes) -> torch.Tensor:
        """u8 [3, SIZE, SIZE], for loaders that make batches of images."""
        out = torch.empty((3, SIZE, SIZE), dtype=torch.uint8)
        self.into(out, number, data)
        return out


def empty_batch() -> torch.Tensor:
    return torch.empty((BATCH, 3, SIZE, SIZE), dtype=torch.uint8)


def shown(batch) -> tuple[np.ndarray, np.ndarray]:
    """Of a batch that is (pixels, numbers)."""
    return batch[0].numpy(), batch[1].numpy()
