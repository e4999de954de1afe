"""Which implementation of a kernel runs on a device."""

import contextlib
import importlib.util
import os
from collections.abc import Callable

import torch

_TRITON = importlib.util.find_spec("triton") is not None  # here: asked inside, it would break a compiled graph
_LEAST = (8, 0)  # compute capability with matrix units for bf16
NAMES = ("auto", "fused", "sdpa", "reference")


def runs_fused(implementation: str, device: torch.device, passes: Callable[[], bool]) -> bool:
    """Whether the Triton kernels run: auto on a GPU (CUDA or ROCm) where they pass their check (kernels.probe), fused
    also where Triton interprets.

    Raises ValueError for a name that is none of NAMES, and for fused where it cannot run.
    """
    if implementation not in NAMES:
        raise ValueError(f"implementation is {implementation!r}; it takes {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if implementation not in ("auto", "fused"):
        return False
    if implementation == "auto":
        return device.type == "cuda" and passes()
    if _TRITON and (device.type == "cuda" or interpreted()):
        return True
    raise ValueError(f"fused kernels need a GPU and Triton, not {device.type}; use auto, or sdpa")


def ineligible(device: torch.device) -> str:
    """Why a GPU cannot run the Triton kernels whatever they are; empty where it can be tried."""
    if not _TRITON:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < _LEAST:
            return f"compute capability {found[0]}.{found[1]} is below {_LEAST[0]}.{_LEAST[1]}"
    return ""


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter; it looks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
