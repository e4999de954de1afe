"""The parts of a pre-norm vision transformer, shared by the encoder and by tokenizers that are one.

Shape letters as in pipeline.model.beit. Parameters are NaN until initialised or loaded. Must not know shards or any
stage.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.kernels.attention import attention, expand_bias, pack, relative_index
from beitforge.kernels.attention.reference import attention_reference
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model.dropout import MLP, OUTPUT, Dropout

_EPSILON = 1e-6
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, weight and bias


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, math.nan))


class Linear(nn.Module):
    """x · weightᵀ + bias; NaN until initialised. product: how (pipeline.model.float8)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.product: Product = linear
        self.weight, self.bias = empty(outputs, inputs), empty(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x · weightᵀ + bias over the last dimension, as one operator. ZeRO-3's own F.linear is one for matrices alone;
    otherwise it adds the bias in place, a second time where the product was kept and is not computed again."""
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension. epsilon: 1e-6; another one only to compare with a model that has it."""

    def __init__(self, width: int):
        super().__init__()
        self.epsilon = _EPSILON
        self.weight, self.bias = empty(width), empty(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RelativeBias(nn.Module):
    """A relative-position table [(2·rows − 1)(2·columns − 1) + 3, A] and its expansion to the bias [A, S, S]."""

    index_SS: Tensor  # noqa: N815

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        rows, columns = grid
        self.table = empty((2 * rows - 1) * (2 * columns - 1) + 3, heads)
        self.register_buffer("index_SS", relative_index(rows, columns), persistent=False)

    def forward(self) -> Tensor:
        return expand_bias(self.table, self.index_SS)


class Attention(nn.Module):
    """Multi-head attention with bias on q and v only."""

    def __init__(self, model: Model, grid: tuple[int, int]):
        super().__init__()
        self.heads, self.kernels = model.heads, model.kernels
        self.product: Product = linear
        self.qkv_weight = empty(3 * model.width, model.width)
        self.q_bias, self.v_bias = empty(model.width), empty(model.width)
        self.own_bias = RelativeBias(grid, model.heads) if model.positions == "relative" else None
        self.out = Linear(model.width, model.width)

    def project(self, x_BSD: Tensor) -> Tensor:
        """Queries, keys and values [B, S, 3, A, K]."""
        b, s, d = x_BSD.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.product(x_BSD, self.qkv_weight, qkv_bias).view(b, s, 3, self.heads, d // self.heads)

    def forward(
        self,
        x_BSD: Tensor,
        bias_ASS: Tensor | None,
        packed_AT: Tensor | None,
        picked_BM: Tensor | None,
        drop: Dropout | None = None,
    ) -> Tensor:
        """Output [B, S, D], or only at the positions picked_BM (i64), [B, M, D]: they attend to all the others. With
        dropout of the probabilities it is the reference that runs, whatever the setting."""
        b, s, d = x_BSD.shape
        qkv_BS3AK = self.project(x_BSD)
        if self.own_bias is not None:
            bias_ASS = self.own_bias()
        if drop is not None and drop.attention_rate:
            y_BSAK = attention_reference(qkv_BS3AK, bias_ASS, drop.probabilities)
        else:
            if self.own_bias is not None:
                packed_AT = pack(bias_ASS, d // self.heads, qkv_BS3AK.dtype, self.kernels)
            y_BSAK = attention(qkv_BS3AK, bias_ASS, packed_AT, self.kernels)
        return self.out(at(y_BSAK.reshape(b, s, d), picked_BM))


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
        self.gamma1 = empty(model.width) if model.layer_scale else None
        self.gamma2 = empty(model.width) if model.layer_scale else None

    def forward(
        self,
        x_BSD: Tensor,
        bias_ASS: Tensor | None,
        packed_AT: Tensor | None,
        scale_B2: Tensor | None,
        picked_BM: Tensor | None = None,
        drop: Dropout | None = None,
    ) -> Tensor:
        """packed_AT: kernels.attention.pack of the bias. scale_B2: what each branch of each sample is multiplied by
        (0 drops it, 1/(1 − p) keeps it), or None. picked_BM: positions whose output alone is wanted, or None: all.
        drop: this layer's dropout, which goes with all positions."""
        y_BSD = self.attention(self.norm1(x_BSD), bias_ASS, packed_AT, picked_BM, drop)
        y_BSD = y_BSD if drop is None else drop.outputs(y_BSD, OUTPUT)
        x_BSD = at(x_BSD, picked_BM) + _scaled(y_BSD, self.gamma1, None if scale_B2 is None else scale_B2[:, 0])
        y_BSD = self.fc2(F.gelu(self.fc1(self.norm2(x_BSD))))
        y_BSD = y_BSD if drop is None else drop.outputs(y_BSD, MLP)
        return x_BSD + _scaled(y_BSD, self.gamma2, None if scale_B2 is None else scale_B2[:, 1])


def at(x_BSD: Tensor, picked_BM: Tensor | None) -> Tensor:
    """The rows at the positions picked_BM, [B, M, D]; all of them for None."""
    if picked_BM is None:
        return x_BSD
    return x_BSD.gather(1, picked_BM[..., None].expand(-1, -1, x_BSD.shape[-1]))


def _scaled(y_BSD: Tensor, gamma_D: Tensor | None, scale_B: Tensor | None) -> Tensor:
    if gamma_D is not None:
        y_BSD = y_BSD * gamma_D
    return y_BSD if scale_B is None else y_BSD * scale_B[:, None, None].to(y_BSD.dtype)
