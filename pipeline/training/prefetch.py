"""Moves batches to the device; on a GPU the copy of the next one overlaps with the computation on the current one.

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
    """Takes batches from the stream, and measures how long the device was idle waiting for them."""

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.batches, self.device = batches, device
        self.waiting = DeviceTimer(device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: tuple[Batch, Any] | None = None

    def next(self) -> tuple[Batch, Any]:
        """The next batch, on the host and on the device. Work enqueued after this call may use it."""
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
        """On a GPU, start copying the next batch, if there is one. Call it after a step's work is enqueued and before
        anything waits for that work."""
        if self.side is not None and self.ready is None:
            self._fetch()

    def _fetch(self) -> None:
        self.waiting.start()  # on a GPU, once the enqueued work is done
        batch = next(self.batches, None)
        self.waiting.stop()
        if batch is None:
            return
        with torch.cuda.stream(self.side):  # does nothing without a GPU
            self.ready = batch, batch.to(self.device)
