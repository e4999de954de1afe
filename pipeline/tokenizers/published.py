"""Tokenizers as their publishers saved them, read without running anything of the file.

OpenAI's encoder.pkl and decoder.pkl are whole pickled modules, and VQ-KD's .pth is a pickled dictionary; both are read
by safe_pickle. Must not know shards or deepspeed.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.dalle import Dalle, DalleShape, flava_name, openai_name
from beitforge.pipeline.tokenizers.safe_pickle import CURE, DECODER, ENCODER, Inert, Refused, Weights, read_pickle
from beitforge.pipeline.tokenizers.vqkd import Vqkd, VqkdShape, published_name

_Names = Callable[[str], str]  # our name of a weight to its publisher's
_GROUPS = 4  # of residual blocks in DALL-E's halves
_HEAD = 64  # size of VQ-KD's attention heads
# what else its training saves: the decoder, the codebook's statistics, the teacher
_VQKD_LEFT = re.compile(
    r"decode|quantize\.(cluster_size|embedding\.(cluster_size|embed_avg|initted))|loss|teacher|scaling"
)
_FLAVA = re.compile(r"(image_codebook\.)?blocks\.")  # alone, or within a whole FLAVA


def read_dalle_pickles(encoder: Path, decoder: Path | None) -> tuple[DalleShape, Weights]:
    """OpenAI's encoder.pkl and, if given, decoder.pkl: shape and weights of a pipeline.tokenizers.dalle.Dalle.

    Raises ConfigError for a file that is not theirs.
    """
    encoded = read_pickle(encoder, lambda saved: _module_tensors(saved, ENCODER))
    shape = _encoder_shape(encoder, encoded, openai_name)
    decoded: Weights = {}
    if decoder is not None:
        decoded = read_pickle(decoder, lambda saved: _module_tensors(saved, DECODER))
        shape = dataclasses.replace(
            shape,
            decoder_hidden=_sizes(decoder, decoded, "blocks.output.conv.w", 4)[1],
            decoder_init=_sizes(decoder, decoded, "blocks.input.w", 4)[0],
            decoder_blocks_per_group=_blocks(decoded, openai_name),
            has_decoder=True,
        )
    dalle = _meta(shape)
    weights = _ours(encoder, dalle.encoder, encoded, openai_name, "encoder.")
    if decoder is not None and dalle.decoder is not None:
        weights |= _ours(decoder, dalle.decoder, decoded, openai_name, "decoder.")
    return shape, weights


def _module_tensors(root: Any, kind: str) -> dict[str, Inert]:
    """The parameters of a saved module, under the names its state dict would give them."""
    if not isinstance(root, Inert) or root.kind != kind:
        held = root.kind if isinstance(root, Inert) else type(root).__name__.strip("_").lower()
        raise Refused(f"holds a {held}, not a {kind}")
    found: dict[str, Inert] = {}
    seen: set[int] = set()
    left = [("", root)]
    while left:
        prefix, module = left.pop()
        # a module in itself would have endless names, and a long chain of modules long ones
        if id(module) in seen or len(prefix) > 100 or not isinstance(module, Inert):
            raise Refused(f"holds no module of its own as {prefix[:100]!r}")
        seen.add(id(module))
        own: dict[str, Any] = module.state.get("_parameters", {})
        inner: dict[str, Any] = module.state.get("_modules", {})
        found |= {f"{prefix}{name}": tensor for name, tensor in own.items() if tensor is not None}
        left += [(f"{prefix}{name}.", child) for name, child in inner.items() if child is not None]
    return found


def read_flava_codebook(folder_or_file: Path) -> tuple[DalleShape, Weights]:
    """A FlavaImageCodebook of `transformers`, alone or within a whole FLAVA: model.safetensors or pytorch_model.bin.

    Its names are the encoder's with two more levels; a decoder it has not. Raises ConfigError for anything else.
    """
    path = folder_or_file
    if path.is_dir():
        safe = path / "model.safetensors"
        path = safe if safe.exists() else path / "pytorch_model.bin"
        if not path.exists():
            raise ConfigError(f"{folder_or_file} holds neither model.safetensors nor pytorch_model.bin: {CURE}")
    _check_flava_config(path.with_name("config.json"))
    found = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, _flava_tensors)
    inner = {name.removeprefix("image_codebook."): tensor for name, tensor in found.items()}
    shape = _encoder_shape(path, inner, flava_name)
    return shape, _ours(path, _meta(shape).encoder, inner, flava_name, "encoder.")


def _check_flava_config(path: Path) -> None:
    """The one setting that changes the tokens and shows in no weight."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        part = content.get("image_codebook_config") or content
        groups = part.get("num_groups", _GROUPS)
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): {CURE}") from error
    if groups != _GROUPS:
        raise ConfigError(f"{path} says num_groups {groups!r:.40}; DALL-E's encoder has {_GROUPS}: {CURE}")


def _flava_tensors(root: Any) -> dict[str, Inert]:
    if not isinstance(root, dict):
        raise Refused("holds no state dict")
    return {name: tensor for name, tensor in root.items() if _FLAVA.match(name)}


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys() if _FLAVA.match(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): {CURE}") from error


def read_vqkd(path: Path) -> tuple[VqkdShape, Weights]:
    """BEiT v2's vqkd_encoder_base_*.pth: shape and weights of a pipeline.tokenizers.vqkd.Vqkd; its decoder is left
    where it is.

    The number of heads shows in no weight: it is width / 64, as in every published one. Raises ConfigError for anything
    that is not such a file.
    """
    found = read_pickle(path, _vqkd_tensors)
    width, _, patch_size, _ = _sizes(path, found, "encoder.patch_embed.proj.weight", 4)
    if width % _HEAD:
        raise ConfigError(f"{path} has width {width}; a VQ-KD tokenizer's is a multiple of {_HEAD}: {CURE}")
    vocabulary, code_size = _sizes(path, found, "quantize.embedding.weight", 2)
    positions = _sizes(path, found, "encoder.pos_embed", 3)[1] - 1
    shape = VqkdShape(
        vocabulary=vocabulary,
        code_size=code_size,
        layers=_count(lambda layer: f"encoder.blocks.{layer}.norm1.weight" in found),
        width=width,
        heads=width // _HEAD,
        input_size=max(1, math.isqrt(positions)) * patch_size,
        patch_size=patch_size,
    )
    found["encoder.patch_embed.proj.weight"] = found["encoder.patch_embed.proj.weight"].flatten(1)
    with torch.device("meta"):
        vqkd = Vqkd(shape)
    return shape, _ours(path, vqkd, found, published_name, "")


def _vqkd_tensors(root: Any) -> dict[str, Inert]:
    if not isinstance(root, dict):
        raise Refused("holds no dictionary with the model in it")
    settings = root.get("args")
    if isinstance(settings, Inert) and settings.state.get("process_type", "default") != "default":
        raise Refused("was trained with another process_type than default, so on pixels in another range")
    model: Any = root.get("model", root.get("state_dict", root))
    return {name: tensor for name, tensor in model.items() if not _VQKD_LEFT.match(name)}


def _encoder_shape(path: Path, weights: Weights, theirs: _Names) -> DalleShape:
    """Of a DALL-E encoder alone."""
    return DalleShape(
        vocabulary=_sizes(path, weights, theirs("blocks.output.conv.weight"), 4)[0],
        hidden=_sizes(path, weights, theirs("blocks.input.weight"), 4)[0],
        blocks_per_group=_blocks(weights, theirs),
        has_decoder=False,
    )


def _meta(shape: DalleShape) -> Dalle:
    with torch.device("meta"):
        return Dalle(shape)


def _blocks(weights: Weights, theirs: _Names) -> int:
    return _count(lambda number: theirs(f"blocks.group_1.block_{number + 1}.res_path.conv_1.weight") in weights)


def _count(there: Callable[[int], bool]) -> int:
    """How many are there, from number 0 on; 1 for none, whose weights will be missed."""
    return next(number for number in itertools.count(1) if not there(number))


def _sizes(path: Path, weights: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a weight that tells the shape of the whole."""
    found = tuple(weights[name].shape) if name in weights else ()
    if len(found) != dimensions or min(found) < 1:
        held = f"is of shape {list(found)}" if name in weights else "is missing"
        raise ConfigError(f"{path}: {name} {held}, where {dimensions} dimensions are due: {CURE}")
    return found


def _ours(path: Path, module: nn.Module, weights: Weights, theirs: _Names, prefix: str) -> Weights:
    """Weights by our names, with `prefix`, if they are those that `module` has, all of them and no others."""
    due = {theirs(name): (f"{prefix}{name}", list(tensor.shape)) for name, tensor in module.state_dict().items()}
    for name in sorted(due.keys() - weights.keys()):
        raise ConfigError(f"{path} lacks the weight {name!r} of such a tokenizer: {CURE}")
    for name in sorted(weights.keys() - due.keys()):
        raise ConfigError(f"{path} has a weight {name[:100]!r} that such a tokenizer has not: {CURE}")
    for name, (_, size) in due.items():
        if list(weights[name].shape) != size:
            raise ConfigError(f"{path}: {name} is of shape {list(weights[name].shape)}, where {size} is due: {CURE}")
        if not weights[name].isfinite().all():
            raise ConfigError(f"{path}: {name} holds numbers that are not finite: {CURE}")
    return {ours: weights[name] for name, (ours, _) in due.items()}
