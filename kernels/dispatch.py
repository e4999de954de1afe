"""Which implementation of a kernel runs on a device."""

import contextlib
import importlib.util
import os

import torch

_TRITON = importlib.util.find_spec("triton") is not None  # here: asked inside, it would break a compiled graph
NAMES = ("auto", "fused", "sdpa", "reference")


def runs_fused(implementation: str, device: torch.device) -> bool:
    """Whether the Triton kernels run: auto on a GPU (CUDA or ROCm), fused also where Triton interprets.

    Raises ValueError for a name that is none of NAMES, and for fused where it cannot run.
    """
    if implementation not in NAMES:
        raise ValueError(f"implementation is {implementation!r}; it takes {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if implementation not in ("auto", "fused"):
        return False
    asked = implementation == "fused"
    if _TRITON and (device.type == "cuda" or (asked and interpreted())):
        return True
    if asked:
        raise ValueError(f"fused kernels need a GPU and Triton, not {device.type}; use auto, or sdpa")
    return False


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter; it looks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
