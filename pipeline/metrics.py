"""What a run reports: metrics.jsonl, TensorBoard, and the progress line. Must not know model, shards or any stage."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.lines import read_metrics as read_metrics
from pipeline.run import end_cut_line

# Dense 16-bit peak in TFLOP/s by a word of the device's name (NVIDIA and AMD data sheets, without sparsity).
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A40", 149.7),
    ("V100", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.0),
    ("MI250", 362.1),
)


class Reporter(Protocol):
    """A progress bar (shards.progress.Progress)."""

    def advance(self, count: int = 1, note: str = "") -> None: ...


def peak_flops(device: torch.device, setting_tflops: float) -> float:
    """Peak FLOP/s of the device: the setting when given, else the table's; 0 when neither knows."""
    if setting_tflops > 0:
        return setting_tflops * 1e12
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for word, peak in _PEAK_TFLOPS if word in name), 0.0)


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's allocator, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """Appends lines to metrics.jsonl and events to TensorBoard; on ranks other than the first it does nothing."""

    def __init__(self, run: Path, first: bool, tensorboard: bool):
        self.run, self.first = run, first
        self.writer: Any = None
        if first:
            run.mkdir(parents=True, exist_ok=True)
            end_cut_line(run / "metrics.jsonl")
            self.file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line: {"step", "kind": train · heldout · start · skip · return, "time", …values}."""
        if not self.first:
            return
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both files."""
        if self.first:
            self.file.close()
            if self.writer is not None:
                self.writer.close()


def timed(batches: Iterator[Any], waits: list[float]) -> Iterator[Any]:
    """Pass batches on; append the seconds each was waited for to `waits`."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        waits.append(time.perf_counter() - started)
        yield batch


def say(text: str) -> None:
    """A line for the person watching, apart from any bar."""
    print(text, file=sys.stderr, flush=True)
