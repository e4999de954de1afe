"""OpenAI's DALL-E tokenizer: a discrete VAE of residual convolutions, from pixels to visual tokens and back.

The encoder halves the picture three times, the decoder mirrors it. `transformers` calls the same encoder
FlavaImageCodebook. For inference only: the weights come from a file. Shape letters as in pipeline.model.beit; h, w: the
token grid. Must not know shards, deepspeed or any file format.
"""

import itertools
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.pixels import from_tokenizer, tokenizer_input

_ENCODER_WIDTHS, _DECODER_WIDTHS = (1, 2, 4, 8), (8, 4, 2, 1)  # of the groups, in units of `hidden`
_COLOURS = 3


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
                "this DALL-E tokenizer has no decoder, so there are no pictures from its tokens: import it again with "
                "decoder.pkl beside encoder.pkl"
            )
        first = self.decoder.first
        # a 1 × 1 convolution of a one-hot picture is a look-up
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
