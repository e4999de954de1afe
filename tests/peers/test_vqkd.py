"""VQ-KD against the published layout, a reference of torch's own layers, and timm's BEiT as its encoder.

There is no package of the released code. Its layout is written out here from microsoft/unilm, beit2/modeling_vqkd.py,
modeling_finetune.py and norm_ema_quantizer.py.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.vqkd import Vqkd, VqkdShape, published_name, read_vqkd

CLOSE = 1e-5  # largest difference over largest value, float32
SMALL = VqkdShape(vocabulary=50, code_size=8, layers=3, width=128, heads=2, input_size=32, patch_size=8)
Layout = dict[str, tuple[int, ...]]


def vit(prefix: str, layers: int, width: int, channels: int, patch: int, patches: int) -> Layout:
    """The released VisionTransformer: absolute positions, no layer scale, a norm behind the last block only."""
    layout: Layout = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches + 1, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
    }
    for layer in range(layers):
        layout |= {f"blocks.{layer}.{name}": (width,) for name in ("norm1.weight", "norm1.bias")}
        layout |= {f"blocks.{layer}.{name}": (width,) for name in ("norm2.weight", "norm2.bias")}
        layout |= {f"blocks.{layer}.attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")}
        layout |= {f"blocks.{layer}.attn.qkv.weight": (3 * width, width)}
        layout |= {f"blocks.{layer}.attn.proj.weight": (width, width)}
        layout |= {f"blocks.{layer}.mlp.fc1.weight": (4 * width, width), f"blocks.{layer}.mlp.fc1.bias": (4 * width,)}
        layout |= {f"blocks.{layer}.mlp.fc2.weight": (width, 4 * width), f"blocks.{layer}.mlp.fc2.bias": (width,)}
    return {f"{prefix}.{name}": size for name, size in layout.items()}


def published(shape: VqkdShape) -> tuple[Layout, Layout]:
    """Names and sizes in a released checkpoint: of the tokenizer, and of what only its training needs."""
    width, patches = shape.width, (shape.input_size // shape.patch_size) ** 2
    needed = vit("encoder", shape.layers, width, 3, shape.patch_size, patches)
    needed |= {"encode_task_layer.0.weight": (width, width), "encode_task_layer.0.bias": (width,)}
    needed |= {"encode_task_layer.2.weight": (shape.code_size, width), "encode_task_layer.2.bias": (shape.code_size,)}
    needed |= {"quantize.embedding.weight": (shape.vocabulary, shape.code_size)}
    rest = vit("decoder", 1, width, shape.code_size, 1, patches)
    rest |= {"decode_task_layer.0.weight": (width, width), "decode_task_layer.0.bias": (width,)}
    rest |= {"decode_task_layer.2.weight": (512, width), "decode_task_layer.2.bias": (512,)}
    rest |= {"quantize.cluster_size": (shape.vocabulary,), "quantize.embedding.cluster_size": (shape.vocabulary,)}
    rest |= {"quantize.embedding.embed_avg": (shape.vocabulary, shape.code_size), "quantize.embedding.initted": (1,)}
    rest |= {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
    return needed, rest | {"teacher_model.visual.proj": (width, 512)}


def drawn(layout: Layout) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(size, generator=generator) * 0.2 for name, size in layout.items()}
    for name in weights:
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    return weights


def checkpoint(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"model": weights}, folder / "vqkd.pth")
    return folder / "vqkd.pth"


def pixels(side: int) -> Tensor:
    """In [0, 1]."""
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(2))


def reference(shape: VqkdShape, weights: dict[str, Tensor], pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the patches [B, N, D] and codes [B, N, E], by torch's convolution and transformer layers."""
    named = {name.removeprefix("encoder."): weight for name, weight in weights.items()}
    stem = F.conv2d(
        pixels_BCHW * 2 - 1, named["patch_embed.proj.weight"], named["patch_embed.proj.bias"], stride=shape.patch_size
    )
    x = torch.cat([named["cls_token"].expand(len(stem), -1, -1), stem.flatten(2).transpose(1, 2)], dim=1)
    x = x + named["pos_embed"]
    for layer in range(shape.layers):
        part = {name: named[f"blocks.{layer}.{name}"] for name in ("attn.q_bias", "attn.v_bias")}
        block = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 4 * shape.width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        )
        state = {
            "self_attn.in_proj_weight": named[f"blocks.{layer}.attn.qkv.weight"],
            "self_attn.in_proj_bias": torch.cat([part["attn.q_bias"], torch.zeros(shape.width), part["attn.v_bias"]]),
        }
        theirs = {"self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
        for name, ours in (theirs | {"norm1": "norm1", "norm2": "norm2"}).items():
            state |= {f"{name}.{end}": named[f"blocks.{layer}.{ours}.{end}"] for end in ("weight", "bias")}
        block.load_state_dict(state)
        x = block(x)
    x = F.layer_norm(x[:, 1:], (shape.width,), named["fc_norm.weight"], named["fc_norm.bias"], 1e-6)
    inner = torch.tanh(F.linear(x, named["encode_task_layer.0.weight"], named["encode_task_layer.0.bias"]))
    codes = F.linear(inner, named["encode_task_layer.2.weight"], named["encode_task_layer.2.bias"])
    return x, codes / codes.norm(dim=-1, keepdim=True)


def loaded(path: Path) -> Vqkd:
    shape, weights = read_vqkd(path)
    vqkd = Vqkd(shape)
    vqkd.load_state_dict(weights)
    return vqkd.eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) <= CLOSE


def test_published_layout():
    """Name for name and size for size, at the published sizes: 86.7 M parameters, 14 × 14 tokens of 224 pixels."""
    with torch.device("meta"):
        vqkd = Vqkd(VqkdShape())
    found = {published_name(name): tuple(weight.shape) for name, weight in vqkd.state_dict().items()}
    needed, _ = published(VqkdShape())
    needed["encoder.patch_embed.proj.weight"] = (768, 3 * 16 * 16)  # a matrix in ours
    assert found == needed
    assert sum(weight.numel() for weight in vqkd.parameters()) == 86_666_784


@pytest.mark.parametrize(
    "shape",
    [SMALL, dataclasses.replace(SMALL, layers=1, width=192, heads=3, input_size=48, patch_size=16, code_size=5)],
    ids=["small", "another"],
)
@torch.no_grad()
def test_against_torch_layers(tmp_path, shape):
    needed, rest = published(shape)
    weights = drawn(needed | rest)
    vqkd = loaded(checkpoint(tmp_path, weights))
    assert vqkd.shape == shape
    _, expected = reference(shape, weights, pixels(shape.input_size))
    assert_close(vqkd.codes(pixels(shape.input_size)), expected)
    nearest = F.cosine_similarity(expected[:, :, None], weights["quantize.embedding.weight"], dim=-1).argmax(dim=-1)
    tokens = vqkd.tokenize(pixels(shape.input_size))
    assert tokens.dtype == torch.int64
    assert nearest.unique().numel() > 5
    assert torch.equal(tokens, nearest)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_against_timm(tmp_path):
    """The encoder of the file, under its own names, is timm's BEiT with absolute positions and pooled norm."""
    beit = pytest.importorskip("timm.models.beit")
    needed, rest = published(SMALL)
    weights = drawn(needed | rest)
    peer = beit.Beit(
        img_size=32, patch_size=8, num_classes=0, embed_dim=128, depth=3, num_heads=2, use_abs_pos_emb=True
    ).eval()
    peer.load_state_dict({n.removeprefix("encoder."): w for n, w in weights.items() if n.startswith("encoder.")})
    hidden = peer.fc_norm(peer.forward_features(pixels(32) * 2 - 1)[:, 1:])
    vqkd = loaded(checkpoint(tmp_path, weights))
    assert_close(hidden, reference(SMALL, weights, pixels(32))[0])
    assert_close(vqkd.codes(pixels(32)), F.normalize(vqkd.code2(vqkd.code1(hidden).tanh()), dim=-1))


@torch.no_grad()
def test_the_codebook_is_searched_by_distance(tmp_path):
    """‖z − e‖² as published: a shorter entry in the same direction is farther."""
    needed, _ = published(SMALL)
    weights = drawn(needed)
    shorter = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:25]
    weights["quantize.embedding.weight"][shorter] *= 0.2
    vqkd = loaded(checkpoint(tmp_path, weights))
    codes = reference(SMALL, weights, pixels(32))[1]
    nearest = torch.cdist(codes.double(), weights["quantize.embedding.weight"].double()[None]).argmin(dim=-1)
    assert torch.equal(vqkd.tokenize(pixels(32)), nearest)


@torch.no_grad()
def test_half_precision_ends_in_float32(tmp_path):
    needed, _ = published(SMALL)
    vqkd = loaded(checkpoint(tmp_path, drawn(needed)))
    with torch.autocast("cpu", torch.bfloat16):
        codes, tokens = vqkd.codes(pixels(32)), vqkd.tokenize(pixels(32))
    assert codes.dtype == torch.float32
    assert (codes.norm(dim=-1) - 1).abs().max() < 1e-5
    assert (tokens == vqkd.tokenize(pixels(32))).float().mean() > 0.8


def test_what_it_cannot_do(tmp_path):
    """Other sizes than its positions', and images from tokens: one line that says why."""
    needed, _ = published(SMALL)
    vqkd = loaded(checkpoint(tmp_path, drawn(needed)))
    assert not vqkd.decodes
    with pytest.raises(ConfigError, match="takes 32 × 32 pixels, not 40 × 40"):
        vqkd.tokenize(pixels(40))
    with pytest.raises(ConfigError, match="no images from its tokens"):
        vqkd.decode(torch.zeros(1, 16, dtype=torch.int64), (4, 4))
