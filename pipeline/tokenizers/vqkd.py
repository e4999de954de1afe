"""BEiT v2's tokenizer VQ-KD: a vision transformer whose patches are looked up in a codebook by direction.

Peng et al. 2022 (arXiv 2208.06366); microsoft/unilm, beit2/modeling_vqkd.py and norm_ema_quantizer.py. The encoder
alone: the published decoder predicts CLIP's or DINO's features, no pixels. Shape letters as in pipeline.model.beit; E:
code size. Must not know shards, deepspeed or pipeline.model.beit.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.blocks import Block, LayerNorm, Linear, empty
from beitforge.pipeline.tokenizers.published import Published, count, our_weights, sizes
from beitforge.pipeline.tokenizers.safe_pickle import CURE, Inert, Refused, Weights, read_pickle

_HEAD = 64  # size of its attention heads
# what else its training saves: the decoder, the codebook's statistics, the teacher
_NOT_ENCODER = re.compile(
    r"decode|quantize\.(cluster_size|embedding\.(cluster_size|embed_avg|initted))|loss|teacher|scaling"
)

# how our names begin, and how the published ones do; behind `blocks.N.` the second
_NAMES = (
    ("cls_embedding", "encoder.cls_token"),
    ("position_embedding", "encoder.pos_embed"),
    ("patch_embedding.", "encoder.patch_embed.proj."),
    ("norm.", "encoder.fc_norm."),
    ("code1.", "encode_task_layer.0."),
    ("code2.", "encode_task_layer.2."),
    ("codebook_VE", "quantize.embedding.weight"),
)
_BLOCK_NAMES = (
    ("attention.qkv_weight", "attn.qkv.weight"),
    ("attention.out.", "attn.proj."),
    ("attention.", "attn."),
    ("fc", "mlp.fc"),
)


@dataclass(frozen=True, kw_only=True)
class VqkdShape:
    """Sizes of the encoder and its codebook; the defaults are the published model's."""

    vocabulary: int = 8192
    code_size: int = 32
    layers: int = 12
    width: int = 768
    heads: int = 12
    input_size: int = 224  # of square images
    patch_size: int = 16


class Vqkd(nn.Module):
    """The published encoder and codebook (pipeline.tokenizers.storage.VisualTokenizer)."""

    decodes = False

    def __init__(self, shape: VqkdShape):
        """Parameters are NaN until loaded."""
        super().__init__()
        self.shape, self.stride = shape, shape.patch_size
        self.fixed_size: Size | None = Size(shape.input_size, shape.input_size)  # of its learned positions
        model = Model(
            input_size=Size(shape.input_size, shape.input_size),
            patch_size=shape.patch_size,
            layers=shape.layers,
            width=shape.width,
            heads=shape.heads,
            positions="absolute",
            layer_scale=False,
            drop_path=0.0,
            kernels="sdpa",  # used once for many epochs: the safe choice
        )
        self.patch_embedding = Linear(3 * shape.patch_size**2, shape.width)
        self.cls_embedding = empty(1, 1, shape.width)
        self.position_embedding = empty(1, model.num_patches + 1, shape.width)
        self.blocks = nn.ModuleList(Block(model, model.grid) for _ in range(shape.layers))
        self.norm = LayerNorm(shape.width)
        self.code1, self.code2 = Linear(shape.width, shape.width), Linear(shape.width, shape.code_size)
        self.codebook_VE = empty(shape.vocabulary, shape.code_size)

    def codes(self, pixels_BCHW: Tensor) -> Tensor:
        """Directions [B, N, E] of length one in float32, which the codebook is searched for. Pixels in [0, 1]."""
        x_BSD = self._embed(pixels_BCHW)
        for block in self.blocks:
            x_BSD = block(x_BSD, None, None, None)
        x_BND = self.norm(x_BSD[:, 1:])
        # the published code leaves half precision here, so that near codes stay apart
        with torch.autocast(x_BND.device.type, enabled=False):
            return F.normalize(self.code2(self.code1(x_BND.float()).tanh()), dim=-1)

    def _embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Patch embeddings of 2x − 1, [S] in front, positions: [B, S, D]."""
        b, c, h, w = pixels_BCHW.shape
        side, size = self.shape.input_size, self.shape.patch_size
        if (h, w) != (side, side):
            raise ConfigError(
                f"this VQ-KD tokenizer takes {side} × {side} pixels, not {h} × {w}: its positions are learned for that "
                f"size; set tokenizer.input_size to {side}"
            )
        # 255 first, as published: the same rounding
        values_BCHW = pixels_BCHW * 255 / 127.5 - 1
        patches = values_BCHW.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5)
        x_BND = self.patch_embedding(patches.reshape(b, (h // size) * (w // size), c * size * size))
        x_BSD = torch.cat([self.cls_embedding.to(x_BND.dtype).expand(b, -1, -1), x_BND], dim=1)
        return x_BSD + self.position_embedding

    @torch.no_grad()
    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        """Visual tokens i64 [B, N] in row order of pixels in [0, 1]: the nearest codebook entry.

        Raises ConfigError for pixels of another size than the shape's.
        """
        codes_BNE = self.codes(pixels_BCHW)
        # smallest ‖z − e‖² = 1 + ‖e‖² − 2 z·e; ‖e‖ is 1 but for rounding, which the published code does not ignore
        with torch.autocast(codes_BNE.device.type, enabled=False):
            distance_BNV = self.codebook_VE.pow(2).sum(dim=1) - 2 * codes_BNE @ self.codebook_VE.t()
        return distance_BNV.argmin(dim=-1)

    def decode(self, tokens_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """There is nothing to decode with: raises ConfigError."""
        raise ConfigError(
            "a VQ-KD tokenizer has no images from its tokens: its decoder predicts another model's features, not "
            "pixels; use a DALL-E or an own tokenizer where images are wanted"
        )


def published_name(name: str) -> str:
    """What BEiT v2's files call one of our weights. Its patch embedding is a convolution, ours that as a matrix."""
    block = re.match(r"blocks\.\d+\.", name)
    if block is not None:
        return f"encoder.{block[0]}{_renamed(name.removeprefix(block[0]), _BLOCK_NAMES)}"
    return _renamed(name, _NAMES)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    return next((theirs + name.removeprefix(ours) for ours, theirs in pairs if name.startswith(ours)), name)


def build(shape: dict) -> Vqkd:
    """The module of this shape; its parameters are NaN until loaded."""
    return Vqkd(VqkdShape(**shape))


def read_published(source: Path) -> Published | None:
    """BEiT v2's vqkd_encoder_base_*.pth, whatever the file is called; None for a folder.

    Raises ConfigError for any other file.
    """
    if source.is_dir():
        return None
    shape, weights = read_vqkd(source)
    size = Size(shape.input_size, shape.input_size)
    return Published(
        shape=dataclasses.asdict(shape),
        weights=weights,
        input_size=size,
        resample="bicubic",
        assumed=f"{shape.heads} attention heads, of {_HEAD} each, and pixels from -1 to 1 (process_type default), as "
        f"in every published VQ-KD tokenizer",
    )


def read_vqkd(path: Path) -> tuple[VqkdShape, Weights]:
    """BEiT v2's vqkd_encoder_base_*.pth: shape and weights of a Vqkd, without its decoder.

    The number of heads shows in no weight: it is width / 64, as in every published one. Raises ConfigError for anything
    that is not such a file.
    """
    found = read_pickle(path, _vqkd_tensors)
    if "patch_embed.proj.weight" in found and "encoder.patch_embed.proj.weight" not in found:
        raise ConfigError(f"{path} is an encoder, no tokenizer: bring it in with `import {path} OUT`")
    width, _, patch_size, _ = sizes(path, found, "encoder.patch_embed.proj.weight", 4)
    if width % _HEAD:
        raise ConfigError(f"{path} has width {width}; a VQ-KD tokenizer's is a multiple of {_HEAD}: {CURE}")
    vocabulary, code_size = sizes(path, found, "quantize.embedding.weight", 2)
    positions = sizes(path, found, "encoder.pos_embed", 3)[1] - 1
    shape = VqkdShape(
        vocabulary=vocabulary,
        code_size=code_size,
        layers=count(lambda layer: f"encoder.blocks.{layer}.norm1.weight" in found),
        width=width,
        heads=width // _HEAD,
        input_size=max(1, math.isqrt(positions)) * patch_size,
        patch_size=patch_size,
    )
    found["encoder.patch_embed.proj.weight"] = found["encoder.patch_embed.proj.weight"].flatten(1)
    with torch.device("meta"):
        vqkd = Vqkd(shape)
    return shape, our_weights(path, vqkd, found, published_name, "")


def _vqkd_tensors(root: Any) -> dict[str, Inert]:
    if not isinstance(root, dict):
        raise Refused("holds no dictionary with the model in it")
    settings = root.get("args")
    if isinstance(settings, Inert) and settings.state.get("process_type", "default") != "default":
        raise Refused("was trained with another process_type than default, so on pixels in another range")
    model: Any = root.get("model", root.get("state_dict", root))
    return {name: tensor for name, tensor in model.items() if not _NOT_ENCODER.match(name)}
