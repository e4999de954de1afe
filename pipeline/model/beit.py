"""The encoder: BEiT's pre-norm vision transformer and its head over visual tokens (docs/recipe.md, "Model").

Shape letters: B batch · C channels · H, W pixels · N patches · S = N + 1 with [S] (cls) in front · D width · A heads ·
K head size · V vocabulary · M masked patches · L layers. Draws nothing at random but its initial weights: drop path
comes in as an argument. Must not know shards, deepspeed or any stage.
"""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from beitforge.kernels.attention import pack
from beitforge.kernels.cross_entropy import linear_cross_entropy
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model.blocks import Block, LayerNorm, Linear, RelativeBias, empty
from beitforge.pipeline.model.dropout import EMBEDDING, Dropout

_PRODUCTS = ("aten::addmm", "aten::mm")  # mm: torchao's of FP8


class Encoder(nn.Module):
    """Embeddings and blocks: pixels to hidden states. checkpointing: train.activation_checkpointing."""

    def __init__(self, model: Model, masks: bool):
        """Parameters are NaN until initialised or loaded. masks: whether there is an embedding for masked patches."""
        super().__init__()
        grid = model.grid
        self.model, self.checkpointing = model, "none"
        self.patch_embedding = Linear(3 * model.patch_size**2, model.width)
        self.cls_embedding = empty(1, 1, model.width)
        self.mask_embedding = empty(1, 1, model.width) if masks else None
        absolute, shared = model.positions == "absolute", model.positions == "relative_shared"
        self.position_embedding = empty(1, model.num_patches + 1, model.width) if absolute else None
        self.shared_bias = RelativeBias(grid, model.heads) if shared else None
        self.blocks = nn.ModuleList(Block(model, grid) for _ in range(model.layers))

    def hidden(
        self,
        pixels_BCHW: Tensor,
        mask_BN: Tensor | None,
        keep_BL2: Tensor | None = None,
        every: bool = False,
        picked_BM: Tensor | None = None,
        drop: Dropout | None = None,
    ) -> list[Tensor]:
        """Hidden states [B, S, D] after the last block, or with `every` after the embedding and after each block.

        picked_BM: the positions that are wanted after the last block, [B, M, D]; what it would compute behind its
        attention for the others is left out. drop: dropout, or None.
        """
        assert drop is None or picked_BM is None, "dropout numbers the places of whole samples"
        x_BSD = self.embed(pixels_BCHW, mask_BN)
        x_BSD = x_BSD if drop is None else drop.outputs(x_BSD, EMBEDDING)
        bias_ASS = self.shared_bias() if self.shared_bias is not None else None
        packed_AT = pack(bias_ASS, self.model.width // self.model.heads, x_BSD.dtype, self.model.kernels)
        states = [x_BSD]
        for layer, block in enumerate(self.blocks):
            rate = self.model.drop_path * layer / max(1, len(self.blocks) - 1)
            picked = picked_BM if layer == len(self.blocks) - 1 else None
            scale_B2 = keep_BL2[:, layer] / (1 - rate) if keep_BL2 is not None and rate > 0 else None
            given = (
                x_BSD,
                bias_ASS,
                packed_AT,
                scale_B2,
                picked,
                dataclasses.replace(drop, layer=layer) if drop else None,
            )
            if self.checkpointing == "none" or not torch.is_grad_enabled():
                x_BSD = block(*given)
            elif self.checkpointing == "full":
                x_BSD = checkpoint(block, *given, use_reentrant=True, preserve_rng_state=False)
            else:
                x_BSD = checkpoint(
                    block, *given, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
                )
            states = [*states, x_BSD] if every else [x_BSD]
        return states

    def embed(self, pixels_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Patch embeddings, the mask embedding in place of masked ones, [S] in front, positions: [B, S, D]."""
        b, c, h, w = pixels_BCHW.shape
        size = self.model.patch_size
        patches = pixels_BCHW.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5)
        x_BND = self.patch_embedding(patches.reshape(b, (h // size) * (w // size), c * size * size))
        if mask_BN is not None:
            assert self.mask_embedding is not None, "an encoder without a mask embedding takes no mask"
            x_BND = torch.where(mask_BN[..., None], self.mask_embedding.to(x_BND.dtype), x_BND)
        x_BSD = torch.cat([self.cls_embedding.to(x_BND.dtype).expand(b, -1, -1), x_BND], dim=1)
        return x_BSD if self.position_embedding is None else x_BSD + self.position_embedding


@functools.cache
def _policy_of(operator: Any) -> CheckpointPolicy:
    name = operator.name().partition(".")[0]
    kept = name in _PRODUCTS or name.startswith(("beitforge::", "aten::_scaled_dot_product_"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Keep what matrix products and fused attention give; norms, GELU, layer scale and sums are cheap to repeat."""
    return _policy_of(operator)


_keep_products = functools.partial(create_selective_checkpoint_contexts, _policy)


class Head(nn.Module):
    """Logits over the vocabulary, or their cross entropy: both from `forward`, around which ZeRO-3 has the weights."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.weight, self.bias = empty(vocabulary, width), empty(vocabulary)

    def forward(
        self, x: Tensor, tokens: Tensor | None = None, counts: Tensor | None = None, kernels: str = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: [B, M, D]. Logits [B, M, V]; with tokens and counts [B, M], the two sums of linear_cross_entropy."""
        if tokens is None or counts is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, 1)
        return linear_cross_entropy(rows, self.weight, self.bias, tokens.flatten(), counts.flatten(), kernels)


class Beit(Encoder):
    """Encoder and head over visual tokens."""

    def __init__(self, model: Model, vocabulary: int, seed: int):
        """All parameters are drawn from `seed` alone."""
        super().__init__(model, masks=True)
        self.norm = LayerNorm(model.width)
        self.head = Head(model.width, vocabulary)
        initialise(self, seed)

    def forward(
        self,
        pixels_BCHW: Tensor,
        mask_BN: Tensor,
        masked: int,
        keep_BL2: Tensor | None = None,
        tokens_BN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the masked patches, or with tokens how well they are predicted.

        pixels_BCHW: normalised. mask_BN: bool, at most `masked` True a row. keep_BL2: bool, which residual branches
        survive drop path; None keeps all. Returns logits [B, M, V], their patch numbers i64 [B, M] and counts
        [B, M]: 1 for a masked patch, 0 where a row has fewer than M = `masked` of them. With tokens_BN, i64: sums over
        the masked patches of cross entropy, of right predictions and of ones, float32, and no logits are kept.
        """
        index_BM = torch.sort(mask_BN.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :masked]
        hidden_BMD = self.norm(self.hidden(pixels_BCHW, mask_BN, keep_BL2, picked_BM=index_BM + 1)[-1])
        counts_BM = mask_BN.gather(1, index_BM)
        if tokens_BN is None:
            return self.head(hidden_BMD), index_BM, counts_BM
        tokens_BM = tokens_BN.gather(1, index_BM)
        loss, right = self.head(hidden_BMD, tokens_BM, counts_BM.float(), self.model.kernels)
        return loss, right, counts_BM.float().sum()

    def all_logits(self, pixels_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Logits [B, N, V] of every patch, masked or not; for comparisons."""
        return self.head(self.norm(self.hidden(pixels_BCHW, mask_BN)[-1][:, 1:]))


class Classifier(Encoder):
    """BEiT for fine-tuning (the released code's): mean over patches or [S], LayerNorm, Linear; no mask embedding."""

    def __init__(self, model: Model, classes: int, pooling: str = "mean"):
        """NaN until initialised or loaded. classes: 0 leaves the head out, and `forward` gives the features [B, D].
        pooling: finetune.pooling."""
        super().__init__(model, masks=False)
        self.pooling, self.dropout, self.attention_dropout = pooling, 0.0, 0.0
        self.norm = LayerNorm(model.width)
        self.head = Linear(model.width, classes) if classes else nn.Identity()

    def forward(self, pixels_BCHW: Tensor, keep_BL2: Tensor | None = None, seeds_B: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of normalised pixels. seeds_B: what dropout draws from, i64 of 32 bits; None drops
        nothing."""
        drop = None if seeds_B is None else Dropout(self.dropout, self.attention_dropout, seeds_B)
        hidden_BSD = self.hidden(pixels_BCHW, None, keep_BL2, drop=drop)[-1]
        pooled_BD = hidden_BSD[:, 0] if self.pooling == "cls" else hidden_BSD[:, 1:].mean(dim=1)
        return self.head(self.norm(pooled_BD))


@torch.no_grad()
def initialise(encoder: Encoder, seed: int, truncation: float = 1.0) -> None:
    """Every parameter, in the order of named_parameters (docs/recipe.md, "Init").

    Weights and embeddings: normal 0.02 truncated at ±0.02, or at `truncation` such deviations. Biases and bias tables
    0, norms 1, layer scale its constant. The matrices that end a residual branch are divided by √(2 · layer number
    from 1).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("bias", "q_bias", "v_bias", "table"):
            parameter.zero_()
        elif last in ("gamma1", "gamma2"):
            parameter.fill_(encoder.model.layer_scale_init)
        elif ".norm" in f".{name}":
            parameter.fill_(1.0)
        else:
            # the inverse of the normal distribution function, between the two bounds; infinite at ±1, which far ones
            # are rounded to, and then cut at timm's bounds of ±2
            bound = math.erf(truncation / math.sqrt(2))
            parameter.uniform_(-bound, bound, generator=generator).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
        if name.endswith(("attention.out.weight", "fc2.weight")):
            parameter.div_(math.sqrt(2 * (int(name.split(".")[1]) + 1)))
