"""The products of an encoder's blocks in FP8, by torchao (docs/recipe.md, "FP8"). Must not know shards or any stage.

Parameters, their names and everything outside the blocks stay as they are, so that checkpoints and exports do, too.
"""

import dataclasses
import socket
from typing import Any

import torch
from torch import Tensor, nn

from beitforge.pipeline.errors import ConfigError, HostError
from beitforge.pipeline.model.beit import Encoder
from beitforge.pipeline.model.blocks import Block, Product

_CAPABILITY = (8, 9)  # of the first chips that multiply FP8: Ada, then Hopper


def use_float8(encoder: Encoder, device: torch.device, emulate: bool = False) -> str:
    """Multiply in FP8 in the blocks' four products; returns a line that says so. Not the patch embedding and the head:
    torchao leaves out a model's first and last layers, whose sizes need not be multiples of 16.

    emulate: round as FP8 does, and multiply in float32, on any device. Raises ConfigError where torchao is missing and
    HostError for a device that cannot.
    """
    where = socket.gethostname()
    if not emulate and (
        device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < _CAPABILITY
    ):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
        raise HostError(
            f"train.precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and "
            f"{where} has {name}; use bf16"
        )
    product = _product(emulate)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        for layer in (block.attention, block.attention.out, block.fc1, block.fc2):
            layer.product = product
    return f"products of {len(encoder.blocks)} blocks in FP8, by torchao"


def _product(emulate: bool) -> Product:
    """In the place of blocks.linear: torchao's linear layer, given the weight at every call."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(f"train.precision fp8 needs torchao ({error}): pip install 'beitforge[fp8]'") from error
    config: Any = dataclasses.replace(Float8LinearConfig(), emulate=emulate, pad_inner_dim=True)
    with torch.device("meta"):
        layer = convert_to_float8_training(nn.Sequential(nn.Linear(16, 16, bias=False)), config=config)[0]

    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = torch.func.functional_call(layer, {"weight": weight}, (x.flatten(0, -2),))
        return (rows + bias).unflatten(0, x.shape[:-1])

    return product
