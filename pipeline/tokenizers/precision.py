"""At which precision a tokenizer computes, and what another would change. Must not know shards or any stage."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from beitforge.pipeline.tokenizers.storage import VisualTokenizer


@contextlib.contextmanager
def autocast_as(precision: str, device: torch.device) -> Iterator[None]:
    """Products as `precision` says: fp32 (IEEE; torch's default for convolutions is TF32), tf32, or bf16 and fp16 by
    autocast."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision
    # also under autocast, which leaves a tokenizer's last layer in float32
    conv.fp32_precision = matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    try:
        with torch.autocast(device.type, half, enabled=precision in ("bf16", "fp16")):
            yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


@torch.no_grad()
def changed_tokens(tokenizer: VisualTokenizer, pixels_BCHW: Tensor) -> dict[str, float]:
    """Share of the visual tokens that differ from fp32's, for every other precision the device has."""
    device = pixels_BCHW.device
    with autocast_as("fp32", device):
        exact = tokenizer.tokenize(pixels_BCHW)
    changed = {}
    for precision in ("tf32", "fp16", "bf16") if device.type == "cuda" else ("fp16", "bf16"):
        with autocast_as(precision, device):
            changed[precision] = float((tokenizer.tokenize(pixels_BCHW) != exact).double().mean())
    return changed
