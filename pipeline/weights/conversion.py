"""The same weights under other names: the released code's (unilm, which timm shares) and `transformers`'.

Tensors in, tensors out; reads and writes no file. Names ours → theirs are written once, as pairs, and read both ways.
Must not know shards, deepspeed or any stage.
"""

import re

import torch
from torch import Tensor

from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.errors import ConfigError

Weights = dict[str, Tensor]

# ours, unilm's, and transformers' as published checkpoints have them (version 5 reads and writes these too)
_PAIRS = (
    ("cls_embedding", "cls_token", "beit.embeddings.cls_token"),
    ("mask_embedding", "mask_token", "beit.embeddings.mask_token"),
    ("position_embedding", "pos_embed", "beit.embeddings.position_embeddings"),
    ("patch_embedding.", "patch_embed.proj.", "beit.embeddings.patch_embeddings.projection."),
    (
        "shared_bias.table",
        "rel_pos_bias.relative_position_bias_table",
        "beit.encoder.relative_position_bias.relative_position_bias_table",
    ),
    ("head.", "lm_head.", "lm_head."),
    ("norm.", "norm.", "layernorm."),
)
_BLOCK_PAIRS = (
    (
        "attention.own_bias.table",
        "attn.relative_position_bias_table",
        "attention.attention.relative_position_bias.relative_position_bias_table",
    ),
    ("attention.qkv_weight", "attn.qkv.weight", ""),
    ("attention.q_bias", "attn.q_bias", "attention.attention.query.bias"),
    ("attention.v_bias", "attn.v_bias", "attention.attention.value.bias"),
    ("attention.out.", "attn.proj.", "attention.output.dense."),
    ("norm1.", "norm1.", "layernorm_before."),
    ("norm2.", "norm2.", "layernorm_after."),
    ("gamma1", "gamma_1", "lambda_1"),
    ("gamma2", "gamma_2", "lambda_2"),
    ("fc1.", "mlp.fc1.", "intermediate.dense."),
    ("fc2.", "mlp.fc2.", "output.dense."),
)
_QKV = tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value"))
_UNILM_BLOCK, _HF_BLOCK = "blocks.{}.", "beit.encoder.layer.{}."


def to_unilm(weights: Weights, model: Model) -> Weights:
    """Our encoder's weights under the released code's names; the patch embedding as a convolution."""
    renamed = {_renamed(name, 0, 1, "blocks.{}.", _UNILM_BLOCK): tensor for name, tensor in weights.items()}
    return {name: _as_convolution(name, tensor, model) for name, tensor in renamed.items()}


def from_unilm(weights: Weights) -> Weights:
    """The inverse of to_unilm; index buffers, which follow from the shape, are dropped."""
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("relative_position_index")}
    return {_renamed(name, 1, 0, _UNILM_BLOCK, "blocks.{}."): _as_matrix(name, w) for name, w in kept.items()}


def to_hf(weights: Weights, model: Model) -> Weights:
    """Our encoder's weights under the names of `transformers`' BeitForMaskedImageModeling."""
    renamed: Weights = {}
    for name, tensor in weights.items():
        if name.endswith("attention.qkv_weight"):
            block = _HF_BLOCK.format(name.split(".")[1])
            renamed |= {block + theirs: part.contiguous() for theirs, part in zip(_QKV, tensor.chunk(3), strict=True)}
            continue
        theirs = _renamed(name, 0, 2, "blocks.{}.", _HF_BLOCK)
        renamed[theirs] = _as_convolution(theirs, tensor, model)
    return renamed


def from_hf(weights: Weights) -> Weights:
    """The inverse of to_hf."""
    renamed: Weights = {}
    for name, tensor in weights.items():
        if name.endswith("relative_position_index") or name.endswith(_QKV):
            continue
        renamed[_renamed(name, 2, 0, _HF_BLOCK, "blocks.{}.")] = _as_matrix(name, tensor)
    layers = sum(name.endswith(_QKV[0]) for name in weights)
    for layer in range(layers):
        parts = [weights[_HF_BLOCK.format(layer) + part] for part in _QKV]
        renamed[f"blocks.{layer}.attention.qkv_weight"] = torch.cat(parts)
    return renamed


def _renamed(name: str, here: int, there: int, block: str, other_block: str) -> str:
    """A name in another column of the tables; one that no table has stays as it is."""
    match = re.fullmatch(re.escape(block).replace(r"\{\}", r"(\d+)") + "(.*)", name)
    prefix, rest = "", name
    pairs: tuple[tuple[str, str, str], ...] = _PAIRS
    if match:
        prefix, rest, pairs = other_block.format(match[1]), match[2], _BLOCK_PAIRS
    for row in pairs:
        whole = not row[here].endswith(".")
        if row[here] and (rest == row[here] if whole else rest.startswith(row[here])):
            return prefix + row[there] + rest[len(row[here]) :]
    return name


def _as_convolution(name: str, tensor: Tensor, model: Model) -> Tensor:
    if name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")):
        return tensor.reshape(len(tensor), 3, model.patch_size, model.patch_size)
    return tensor


def _as_matrix(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")):
        if tensor.shape[1] != 3:
            raise ConfigError(
                f"{name} takes {tensor.shape[1]} channels; the encoder takes 3: choose another checkpoint"
            )
        if tensor.dim() != 4 or tensor.shape[2] != tensor.shape[3]:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; patches of the encoder are square")
        return tensor.flatten(1)
    return tensor
