"""Time between two points of a step; on a GPU measured with CUDA events."""

import time

import torch


class DeviceTimer:
    """Sums the seconds between start and stop. On a GPU it uses CUDA events and only `read` waits for the device."""

    def __init__(self, device: torch.device):
        self.cuda, self.seconds = device.type == "cuda", 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.seconds -= time.perf_counter()

    def stop(self) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter()

    def read(self) -> float:
        """The sum in seconds, which is then reset. On a GPU it waits for the last stop."""
        if self.events:
            self.events[-1][1].synchronize()
            self.seconds += sum(begun.elapsed_time(ended) for begun, ended in self.events) / 1e3
            self.events.clear()
        seconds, self.seconds = self.seconds, 0.0
        return seconds
