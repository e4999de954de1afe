"""Batches on their device: on a GPU each is copied there while the one before is computed with.

Must not know model, shards or any stage.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from beitforge.pipeline.training.device_timer import DeviceTimer


class Batch(Protocol):
    """What the loop needs of a batch (shards.stream.loader.Batch)."""

    @property
    def bad(self) -> list: ...
    @property
    def samples(self) -> Tensor: ...
    def to(self, device: torch.device) -> Any: ...
    def tensors(self) -> list[Tensor]: ...


class DevicePrefetcher:
    """Takes batches from the stream, and measures how long the device stood still for them."""

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.batches, self.device = batches, device
        self.waiting = DeviceTimer(device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: tuple[Batch, Any] | None = None

    def next(self) -> tuple[Batch, Any]:
        """The next batch as it came, and on the device. What is enqueued from here on may use it."""
        if self.ready is None:
            self._fetch()
        assert self.ready is not None, "the stream has a batch for every step"
        (batch, moved), self.ready = self.ready, None
        if self.side is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.side)
            for tensor in moved.tensors():
                tensor.record_stream(current)
        return batch, moved

    def prefetch(self) -> None:
        """On a GPU: have the following batch, if there is one, on its way. To be called when a step's work is enqueued
        and before anything waits for it."""
        if self.side is not None and self.ready is None:
            self._fetch()

    def _fetch(self) -> None:
        self.waiting.start()  # on a GPU when it has done what is enqueued
        batch = next(self.batches, None)
        self.waiting.stop()
        if batch is None:
            return
        with torch.cuda.stream(self.side):  # without a GPU it does nothing
            self.ready = batch, batch.to(self.device)
