"""This process's device: which one it is, its name, memory and peak speed."""

import os
import platform
from pathlib import Path

import torch

from beitforge.pipeline.cluster.environment import RankInfo

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of the model, by train.precision


def own_device(place: RankInfo) -> torch.device:
    """This process's GPU, made the current one, or the CPU with this process's share of its cores."""
    if torch.cuda.is_available():
        # SLURM may show each task its own GPU only, as number 0
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(place.threads or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    return torch.device("cpu")


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


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
