"""Models that a training step is compared on: ours, transformers', timm's, and the released code's arithmetic.

Each takes (pixels, mask, tokens of the masked patches in row order) and gives the mean loss. timm's BEiT takes no mask:
it gets the same head on the same patches, and is spared the mask.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.kernels.attention import relative_index
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.torchvision_stub import install

V = 8192


@dataclass(frozen=True)
class Contender:
    """A model and its loss."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


Build = Callable[[Model, int], Contender]  # of a model and the number of masked patches an image; on the CPU, float32


def ours(kernels: str) -> Build:
    def build(model: Model, masked: int) -> Contender:
        beit = Beit(dataclasses.replace(model, kernels=kernels), V, seed=0)

        def loss(pixels: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
            of_patches = torch.zeros(mask.shape, dtype=tokens.dtype, device=tokens.device).masked_scatter(mask, tokens)
            total, _, count = beit(pixels, mask, masked, None, of_patches)
            return total / count

        return Contender(beit, loss)

    return build


def of_transformers(model: Model, masked: int) -> Contender:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        vocab_size=V,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=4 * model.width,
        layer_norm_eps=1e-6,
        image_size=model.input_size.height,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        drop_path_rate=0.0,
        attn_implementation="sdpa",
    )
    peer = BeitForMaskedImageModeling(config).train()
    return Contender(peer, lambda pixels, mask, tokens: peer(pixels, bool_masked_pos=mask, labels=tokens).loss)


def of_timm(model: Model, masked: int) -> Contender:
    install()  # where no torchvision loads
    from timm.models.beit import Beit as TimmBeit

    peer = TimmBeit(
        img_size=tuple(model.input_size),
        embed_dim=model.width,
        depth=model.layers,
        num_heads=model.heads,
        init_values=model.layer_scale_init,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        num_classes=0,
        global_pool="",
        use_fc_norm=False,
    )
    module = nn.ModuleDict({"encoder": peer, "head": nn.Linear(model.width, V)}).train()

    def loss(pixels: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        features = peer.forward_features(pixels)[:, 1:][mask]
        return F.cross_entropy(module["head"](features).float(), tokens)

    return Contender(module, loss)


class ReleasedBlock(nn.Module):
    """A block as the released code computes it: microsoft/unilm, beit/modeling_finetune.py, Attention and Block."""

    def __init__(self, model: Model):
        super().__init__()
        width, self.heads = model.width, model.heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(model.layer_scale_init * torch.ones(width)) for _ in range(2))

    def attention(self, x: Tensor, bias_ASS: Tensor) -> Tensor:
        b, s, d = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).reshape(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)
        weights = (scores + bias_ASS.unsqueeze(0)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, s, -1))

    def forward(self, x: Tensor, bias_ASS: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attention(self.norm1(x), bias_ASS)
        return x + self.gamma_2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Released(nn.Module):
    """The released pretraining model: microsoft/unilm, beit/modeling_pretrain.py, without drop path."""

    index_SS: Tensor  # noqa: N815

    def __init__(self, model: Model):
        super().__init__()
        width, size, (rows, columns) = model.width, model.patch_size, model.grid
        self.patch_embed = nn.Conv2d(3, width, size, size)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2))
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, model.heads))
        self.register_buffer("index_SS", relative_index(rows, columns), persistent=False)
        self.blocks = nn.ModuleList(ReleasedBlock(model) for _ in range(model.layers))
        self.norm, self.lm_head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, V)
        for parameter in (p for p in self.parameters() if p.dim() > 1):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Logits of the masked patches, in row order."""
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        weight = mask.unsqueeze(-1).type_as(self.mask_token)
        x = x * (1 - weight) + self.mask_token.expand(*x.shape[:2], -1) * weight
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        positions = self.index_SS.shape[0]
        bias = self.table[self.index_SS.view(-1)].view(positions, positions, -1).permute(2, 0, 1).contiguous()
        for block in self.blocks:
            x = block(x, bias)
        return self.lm_head(self.norm(x)[:, 1:][mask])


def released(model: Model, masked: int) -> Contender:
    peer = Released(model).train()
    return Contender(peer, lambda pixels, mask, tokens: F.cross_entropy(peer(pixels, mask).float(), tokens))


CONTENDERS: dict[str, Build] = {
    "ours": ours("auto"),
    "transformers": of_transformers,
    "timm": of_timm,
    "unilm's arithmetic": released,
    "ours, SDPA": ours("sdpa"),
    "ours, reference": ours("reference"),
}
