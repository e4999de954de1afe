"""OpenAI's DALL-E tokenizer: a discrete VAE of residual convolutions, from pixels to visual tokens and back.

The encoder halves the image three times, the decoder mirrors it. `transformers` calls the same encoder
FlavaImageCodebook. For inference only: the weights come from OpenAI's files or those of `transformers`, which are read
without executing anything in them. Shape letters as in pipeline.model.beit; h, w: the token grid. Must not know shards
or deepspeed.
"""

import dataclasses
import itertools
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import DVAE_STRIDE
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.pixels import from_tokenizer, tokenizer_input
from beitforge.pipeline.reading import read_object, require_regular
from beitforge.pipeline.tokenizers.published import Names, Published, count, our_weights, sizes
from beitforge.pipeline.tokenizers.safe_pickle import CURE, DECODER, ENCODER, Inert, Refused, Weights, read_pickle

_ENCODER_WIDTHS, _DECODER_WIDTHS = (1, 2, 4, 8), (8, 4, 2, 1)  # of the groups, in units of `hidden`
_COLOURS = 3
_PUBLISHED_SIZE = Size(112, 112)
_NUM_GROUPS = 4  # of residual blocks in each half
_FLAVA = re.compile(r"(image_codebook\.)?blocks\.")  # alone, or within a whole FLAVA


@dataclass(frozen=True, kw_only=True)
class DalleShape:
    """Sizes of both halves; the defaults are the published model's."""

    vocabulary: int = 8192
    hidden: int = 256  # channels of the encoder's first group
    blocks_per_group: int = 2
    decoder_hidden: int = 256  # channels of the decoder's last group
    decoder_init: int = 128  # size of a codebook entry
    decoder_blocks_per_group: int = 2
    has_decoder: bool


class Residual(nn.Module):
    """x, widened where it must be, + gain · four convolutions, each behind a ReLU."""

    def __init__(self, inputs: int, outputs: int, sizes: tuple[int, int, int, int], gain: float):
        """sizes: of the four kernels. gain: 1 / (residual blocks in the half)², fixed."""
        super().__init__()
        self.gain = gain
        narrow = outputs // 4
        self.id_path = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.res_path = nn.Sequential()
        widths = (inputs, narrow, narrow, narrow, outputs)
        for number, size in enumerate(sizes, start=1):
            self.res_path.add_module(f"relu_{number}", nn.ReLU())
            self.res_path.add_module(f"conv_{number}", _conv(widths[number - 1], widths[number], size))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class Half(nn.Module):
    """Encoder or decoder: a first convolution, four groups of residual blocks with a resampling between, a last 1 × 1.

    Its modules are named as in OpenAI's files.
    """

    def __init__(self, first: nn.Module, groups: list[nn.Sequential], last: nn.Module):
        super().__init__()
        named = [(f"group_{number}", group) for number, group in enumerate(groups, start=1)]
        output = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", last)]))
        self.blocks = nn.Sequential(OrderedDict([("input", first), *named, ("output", output)]))

    @property
    def first(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.blocks[0])

    @property
    def last(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.blocks[-1].get_submodule("conv"))

    def between(self, x: Tensor) -> Tensor:
        """All that is between the first and the last convolution."""
        return F.relu(self.blocks[1:-1](x))


class Dalle(nn.Module):
    """The published encoder and, where the file had one, its decoder (pipeline.tokenizers.storage.VisualTokenizer)."""

    stride = DVAE_STRIDE
    fixed_size: Size | None = None

    def __init__(self, shape: DalleShape):
        """Parameters are NaN until loaded."""
        super().__init__()
        self.shape, self.decodes = shape, shape.has_decoder
        self.encoder = _encoder(shape)
        self.decoder = _decoder(shape) if shape.has_decoder else None

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, V, h, w] in float32, h = H / 8, of pixels in [0, 1]."""
        features = self.encoder.between(self.encoder.first(tokenizer_input(pixels_BCHW)))
        # the published module keeps its last convolution in float32, so that half precision ties no two tokens
        with torch.autocast(features.device.type, enabled=False):
            return self.encoder.last(features.float())

    @torch.no_grad()
    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        """Visual tokens i64 [B, N], N = h · w in row order, of pixels in [0, 1]."""
        return self.logits(pixels_BCHW).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode(self, tokens_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] from visual tokens on a grid of (rows, columns).

        Raises ConfigError when the tokenizer came without its decoder.
        """
        if self.decoder is None:
            raise ConfigError(
                "this DALL-E tokenizer has no decoder, so there are no images from its tokens: import it again with "
                "decoder.pkl beside encoder.pkl"
            )
        first = self.decoder.first
        # a 1 × 1 convolution of a one-hot image is a look-up
        codebook_VE = first.weight[:, :, 0, 0].t()
        bias_E = cast(Tensor, first.bias)
        embedded_BhwE = F.embedding(tokens_BN.view(len(tokens_BN), *grid), codebook_VE) + bias_E
        values_BCHW = self.decoder.last(self.decoder.between(embedded_BhwE.permute(0, 3, 1, 2)))
        # the other three channels are the logarithm of the scale of its distribution
        return from_tokenizer(values_BCHW[:, :_COLOURS].float().sigmoid())


def _encoder(shape: DalleShape) -> Half:
    widths = [shape.hidden * width for width in _ENCODER_WIDTHS]
    groups = _groups([shape.hidden, *widths], shape.blocks_per_group, (3, 3, 3, 1))
    for group in groups[:-1]:
        group.add_module("pool", nn.MaxPool2d(2))
    return Half(_conv(_COLOURS, shape.hidden, 7), groups, _conv(widths[-1], shape.vocabulary, 1))


def _decoder(shape: DalleShape) -> Half:
    widths = [shape.decoder_hidden * width for width in _DECODER_WIDTHS]
    groups = _groups([shape.decoder_init, *widths], shape.decoder_blocks_per_group, (1, 3, 3, 3))
    for group in groups[:-1]:
        group.add_module("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
    return Half(_conv(shape.vocabulary, shape.decoder_init, 1), groups, _conv(widths[-1], 2 * _COLOURS, 1))


def _groups(widths: list[int], blocks: int, sizes: tuple[int, int, int, int]) -> list[nn.Sequential]:
    """Groups of `blocks` residual blocks; widths: channels before the first group and after each."""
    gain = 1 / ((len(widths) - 1) * blocks) ** 2
    groups = []
    for inputs, outputs in itertools.pairwise(widths):
        group = nn.Sequential()
        for number in range(blocks):
            group.add_module(f"block_{number + 1}", Residual(outputs if number else inputs, outputs, sizes, gain))
        groups.append(group)
    return groups


def _conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """Without torch's initialisation, which costs a second and moves the global generator."""
    conv = skip_init(nn.Conv2d, inputs, outputs, size, padding=size // 2, device=torch.get_default_device())
    for parameter in conv.parameters():
        nn.init.constant_(parameter, math.nan)
    return conv


def openai_name(name: str) -> str:
    """What OpenAI's files call a weight of one of the halves."""
    return re.sub(r"weight$", "w", re.sub(r"bias$", "b", name))


def flava_name(name: str) -> str:
    """What FlavaImageCodebook calls a weight of the encoder."""
    return name.replace(".block_", ".group.block_").replace("res_path.", "res_path.path.")


def build(shape: dict) -> Dalle:
    """The module of this shape; its parameters are NaN until loaded."""
    return Dalle(DalleShape(**shape))


def read_published(source: Path) -> Published | None:
    """OpenAI's encoder.pkl (with decoder.pkl next to it) or their folder, or a FlavaImageCodebook's folder or file.

    None for any other source. Raises ConfigError for a file that only looks like one of them.
    """
    encoder = source / "encoder.pkl" if source.is_dir() else source
    if encoder.suffix == ".pkl" and encoder.exists():
        decoder = encoder.with_name("decoder.pkl")
        shape, weights = read_dalle_pickles(encoder, decoder if decoder.exists() else None)
    elif source.is_dir() or source.suffix == ".safetensors":
        shape, weights = read_flava_codebook(source)
    else:
        return None
    return Published(shape=dataclasses.asdict(shape), weights=weights, input_size=_PUBLISHED_SIZE, resample="lanczos")


def read_dalle_pickles(encoder: Path, decoder: Path | None) -> tuple[DalleShape, Weights]:
    """OpenAI's encoder.pkl and, if given, decoder.pkl: shape and weights of a Dalle.

    Raises ConfigError for a file that is not theirs.
    """
    encoded = read_pickle(encoder, lambda saved: _module_tensors(saved, ENCODER))
    shape = _encoder_shape(encoder, encoded, openai_name)
    decoded: Weights = {}
    if decoder is not None:
        decoded = read_pickle(decoder, lambda saved: _module_tensors(saved, DECODER))
        shape = dataclasses.replace(
            shape,
            decoder_hidden=sizes(decoder, decoded, "blocks.output.conv.w", 4)[1],
            decoder_init=sizes(decoder, decoded, "blocks.input.w", 4)[0],
            decoder_blocks_per_group=_blocks(decoded, openai_name),
            has_decoder=True,
        )
    dalle = _meta(shape)
    weights = our_weights(encoder, dalle.encoder, encoded, openai_name, "encoder.")
    if decoder is not None and dalle.decoder is not None:
        weights |= our_weights(decoder, dalle.decoder, decoded, openai_name, "decoder.")
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

    Its names are the encoder's with two more levels; it has no decoder. Raises ConfigError for anything else.
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
    return shape, our_weights(path, _meta(shape).encoder, inner, flava_name, "encoder.")


def _check_flava_config(path: Path) -> None:
    """The one setting that changes the tokens and shows in no weight."""
    try:
        content = read_object(path)
        part = content.get("image_codebook_config") or content
        groups = part.get("num_groups", _NUM_GROUPS)
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): {CURE}") from error
    if groups != _NUM_GROUPS:
        raise ConfigError(f"{path} says num_groups {groups!r:.40}; DALL-E's encoder has {_NUM_GROUPS}: {CURE}")


def _flava_tensors(root: Any) -> dict[str, Inert]:
    if not isinstance(root, dict):
        raise Refused("holds no state dict")
    return {name: tensor for name, tensor in root.items() if _FLAVA.match(name)}


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(require_regular(path), framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys() if _FLAVA.match(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): {CURE}") from error


def _encoder_shape(path: Path, weights: Weights, theirs: Names) -> DalleShape:
    """Of a DALL-E encoder alone."""
    return DalleShape(
        vocabulary=sizes(path, weights, theirs("blocks.output.conv.weight"), 4)[0],
        hidden=sizes(path, weights, theirs("blocks.input.weight"), 4)[0],
        blocks_per_group=_blocks(weights, theirs),
        has_decoder=False,
    )


def _meta(shape: DalleShape) -> Dalle:
    with torch.device("meta"):
        return Dalle(shape)


def _blocks(weights: Weights, theirs: Names) -> int:
    return count(lambda number: theirs(f"blocks.group_1.block_{number + 1}.res_path.conv_1.weight") in weights)
