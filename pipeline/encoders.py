"""The encoder of a run's newest checkpoint, whatever the run was: with a head over tokens, or fine-tuned over classes;
and its blocks one by one. Shape letters as in pipeline.model.

Must not know shards, HTML or any stage.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels.attention import pack
from pipeline.blocks import Block
from pipeline.config import Config, ConfigError
from pipeline.model import Classifier, Encoder
from pipeline.weights import trained_weights, with_weights


def encoder_of(config: Config, run: Path, job: str) -> Encoder:
    """For use on the CPU, in float32. Raises ConfigError when the run has none, or another than its config says."""
    weights = trained_weights(run).all()
    if job != "finetune":
        return with_weights(config, weights, run)
    if "head.weight" not in weights:
        raise ConfigError(f"the weights in {run} are no classifier's; is it a fine-tuning run?")
    own, shared = "blocks.0.attention.own_bias.table" in weights, "shared_bias.table" in weights
    positions = "relative" if own else "relative_shared" if shared else "absolute"
    model = dataclasses.replace(
        config.model, input_size=config.finetune.input_size, positions=positions, kernels="auto"
    )
    with torch.device("meta"):
        classifier = Classifier(model, classes=len(weights["head.weight"]))
    wanted = {name: tensor.shape for name, tensor in classifier.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in weights.items()}:
        raise ConfigError(f"the weights in {run} are no classifier's of its config")
    classifier = Classifier(model, classes=len(weights["head.weight"]))
    classifier.load_state_dict(weights)
    return classifier.eval()


def walk(encoder: Encoder, pixels_BCHW: Tensor, mask_BN: Tensor | None = None) -> Iterator[tuple[Block, Tensor]]:
    """Every block and the hidden states [B, S, D] that go into it; pixels are normalised. Blocks are computed when the
    next is asked for, so whoever stops early leaves the rest out."""
    model, x_BSD = encoder.model, encoder.embed(pixels_BCHW, mask_BN)
    bias_ASS = encoder.shared_bias() if encoder.shared_bias is not None else None
    packed_AT = pack(bias_ASS, model.width // model.heads, x_BSD.dtype, model.kernels)
    for block in encoder.blocks:
        assert isinstance(block, Block), "an encoder is made of blocks"
        yield block, x_BSD
        x_BSD = block(x_BSD, bias_ASS, packed_AT, None)
