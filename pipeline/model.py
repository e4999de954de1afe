"""The encoder: BEiT's pre-norm vision transformer and its head over visual tokens (RECIPE, "Model").

Shape letters: B batch · C channels · H, W pixels · N patches · S = N + 1 with [S] (cls) in front · D width · A heads ·
K head size · V vocabulary · M masked patches · L layers. Draws nothing at random but its initial weights: drop path
comes in as an argument. Must not know shards, deepspeed or any stage.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention, expand_bias, relative_index
from pipeline.config import Model

_EPSILON = 1e-6


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, math.nan))


class Linear(nn.Module):
    """x · weightᵀ + bias; NaN until initialised."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = _empty(outputs, inputs), _empty(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, eps 1e-6."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = _empty(width), _empty(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, _EPSILON)


class RelativeBias(nn.Module):
    """A relative-position table [(2·rows − 1)(2·columns − 1) + 3, A] and its expansion to the bias [A, S, S]."""

    index_SS: Tensor  # noqa: N815

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        rows, columns = grid
        self.table = _empty((2 * rows - 1) * (2 * columns - 1) + 3, heads)
        self.register_buffer("index_SS", relative_index(rows, columns), persistent=False)

    def forward(self) -> Tensor:
        return expand_bias(self.table, self.index_SS)


class Attention(nn.Module):
    """Multi-head attention with bias on q and v only."""

    def __init__(self, model: Model, grid: tuple[int, int]):
        super().__init__()
        self.heads, self.kernels = model.heads, model.kernels
        self.qkv_weight = _empty(3 * model.width, model.width)
        self.q_bias, self.v_bias = _empty(model.width), _empty(model.width)
        self.own_bias = RelativeBias(grid, model.heads) if model.positions == "relative" else None
        self.out = Linear(model.width, model.width)

    def forward(self, x_BSD: Tensor, bias_ASS: Tensor | None) -> Tensor:
        b, s, d = x_BSD.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_BS3AK = F.linear(x_BSD, self.qkv_weight, qkv_bias).view(b, s, 3, self.heads, d // self.heads)
        bias_ASS = self.own_bias() if self.own_bias is not None else bias_ASS
        return self.out(attention(qkv_BS3AK, bias_ASS, self.kernels).reshape(b, s, d))


class Block(nn.Module):
    """x + keep · γ₁ · attention(norm(x)), then x + keep · γ₂ · MLP(norm(x)); γ only with layer scale."""

    def __init__(self, model: Model, grid: tuple[int, int]):
        super().__init__()
        hidden = int(model.width * model.mlp_ratio)
        self.norm1, self.attention = LayerNorm(model.width), Attention(model, grid)
        self.norm2, self.fc1, self.fc2 = (
            LayerNorm(model.width),
            Linear(model.width, hidden),
            Linear(hidden, model.width),
        )
        self.gamma1 = _empty(model.width) if model.layer_scale else None
        self.gamma2 = _empty(model.width) if model.layer_scale else None

    def forward(self, x_BSD: Tensor, bias_ASS: Tensor | None, scale_B2: Tensor | None) -> Tensor:
        """scale_B2: what each branch of each sample is multiplied by (0 drops it, 1/(1 − p) keeps it), or None."""
        y_BSD = self.attention(self.norm1(x_BSD), bias_ASS)
        x_BSD = x_BSD + _scaled(y_BSD, self.gamma1, None if scale_B2 is None else scale_B2[:, 0])
        y_BSD = self.fc2(F.gelu(self.fc1(self.norm2(x_BSD))))
        return x_BSD + _scaled(y_BSD, self.gamma2, None if scale_B2 is None else scale_B2[:, 1])


def _scaled(y_BSD: Tensor, gamma_D: Tensor | None, scale_B: Tensor | None) -> Tensor:
    if gamma_D is not None:
        y_BSD = y_BSD * gamma_D
    return y_BSD if scale_B is None else y_BSD * scale_B[:, None, None].to(y_BSD.dtype)


class Beit(nn.Module):
    """Encoder and head."""

    def __init__(self, model: Model, vocabulary: int, seed: int):
        """All parameters are drawn from `seed` alone."""
        super().__init__()
        rows = model.input_size // model.patch_size
        grid = (rows, rows)
        self.model, self.checkpointing = model, False
        self.patch_embedding = Linear(3 * model.patch_size**2, model.width)
        self.cls_embedding, self.mask_embedding = _empty(1, 1, model.width), _empty(1, 1, model.width)
        absolute, shared = model.positions == "absolute", model.positions == "relative_shared"
        self.position_embedding = _empty(1, rows * rows + 1, model.width) if absolute else None
        self.shared_bias = RelativeBias(grid, model.heads) if shared else None
        self.blocks = nn.ModuleList(Block(model, grid) for _ in range(model.layers))
        self.norm = LayerNorm(model.width)
        self.head = Linear(model.width, vocabulary)
        initialise(self, seed)

    def forward(
        self, pixels_BCHW: Tensor, mask_BN: Tensor, masked: int, keep_BL2: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the masked patches.

        pixels_BCHW: normalised. mask_BN: bool, at most `masked` True a row. keep_BL2: bool, which residual branches
        survive drop path; None keeps all. Returns logits [B, M, V], their patch numbers i64 [B, M] and weights
        [B, M]: 1 for a masked patch, 0 where a row has fewer than M = `masked` of them.
        """
        hidden_BSD = self.hidden(pixels_BCHW, mask_BN, keep_BL2)[-1]
        index_BM = torch.sort(mask_BN.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :masked]
        picked_BMD = hidden_BSD[:, 1:].gather(1, index_BM[..., None].expand(-1, -1, hidden_BSD.shape[-1]))
        return self.head(self.norm(picked_BMD)), index_BM, mask_BN.gather(1, index_BM)

    def hidden(
        self, pixels_BCHW: Tensor, mask_BN: Tensor | None, keep_BL2: Tensor | None = None, every: bool = False
    ) -> list[Tensor]:
        """Hidden states [B, S, D] after the last block, or with `every` after the embedding and after each block."""
        x_BSD = self.embed(pixels_BCHW, mask_BN)
        bias_ASS = self.shared_bias() if self.shared_bias is not None else None
        states = [x_BSD]
        for layer, block in enumerate(self.blocks):
            drop = self.model.drop_path * layer / max(1, len(self.blocks) - 1)
            scale_B2 = keep_BL2[:, layer] / (1 - drop) if keep_BL2 is not None and drop > 0 else None
            if self.checkpointing and torch.is_grad_enabled():
                x_BSD = checkpoint(block, x_BSD, bias_ASS, scale_B2, use_reentrant=True, preserve_rng_state=False)
            else:
                x_BSD = block(x_BSD, bias_ASS, scale_B2)
            states = [*states, x_BSD] if every else [x_BSD]
        return states

    def embed(self, pixels_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Patch embeddings, the mask embedding in place of masked ones, [S] in front, positions: [B, S, D]."""
        b, c, h, w = pixels_BCHW.shape
        size = self.model.patch_size
        patches = pixels_BCHW.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5)
        x_BND = self.patch_embedding(patches.reshape(b, (h // size) * (w // size), c * size * size))
        if mask_BN is not None:
            x_BND = torch.where(mask_BN[..., None], self.mask_embedding.to(x_BND.dtype), x_BND)
        x_BSD = torch.cat([self.cls_embedding.to(x_BND.dtype).expand(b, -1, -1), x_BND], dim=1)
        return x_BSD if self.position_embedding is None else x_BSD + self.position_embedding


@torch.no_grad()
def initialise(beit: Beit, seed: int) -> None:
    """Every parameter, in the order of named_parameters (RECIPE, "Init").

    Weights and embeddings: normal 0.02 truncated at ±0.02. Biases and bias tables 0, norms 1, layer scale its constant.
    The matrices that end a residual branch are divided by √(2 · layer number from 1).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in beit.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("bias", "q_bias", "v_bias", "table"):
            parameter.zero_()
        elif last in ("gamma1", "gamma2"):
            parameter.fill_(beit.model.layer_scale_init)
        elif ".norm" in f".{name}":
            parameter.fill_(1.0)
        else:
            # the inverse of the normal distribution function, between -1 and 1 standard deviation
            bound = math.erf(1 / math.sqrt(2))
            parameter.uniform_(-bound, bound, generator=generator).erfinv_().mul_(0.02 * math.sqrt(2))
        if name.endswith(("attention.out.weight", "fc2.weight")):
            parameter.div_(math.sqrt(2 * (int(name.split(".")[1]) + 1)))


def num_parameters(module: nn.Module) -> int:
    """Trainable numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def training_flops(model: Model, vocabulary: int, masked: int) -> float:
    """Floating-point operations of one training step per image: forward × 3, matrix products only (RECIPE, "Cost")."""
    patches = (model.input_size // model.patch_size) ** 2
    s, d = patches + 1, model.width
    block = s * (4 * d * d + 2 * d * int(d * model.mlp_ratio)) + 2 * s * s * d
    macs = model.layers * block + patches * 3 * model.patch_size**2 * d + masked * d * vocabulary
    return 6.0 * macs
