"""The DALL-E tokenizer against OpenAI's own package and transformers' FlavaImageCodebook: same weights, same image,
same logits, tokens and pixels. The files are those that the peers themselves write.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.pipeline.model.pixels import tokenizer_input
from beitforge.pipeline.tokenizers.dalle import Dalle, read_dalle_pickles, read_flava_codebook

dall_e = pytest.importorskip("dall_e")
transformers = pytest.importorskip("transformers")

CLOSE = 1e-5  # largest difference over largest value, float32
SMALL = {"n_hid": 64, "vocab_size": 512}


def pixels(height: int = 32, width: int = 48) -> Tensor:
    """In [0, 1]: flat fields of 8 pixels, which random weights tell apart better than noise."""
    fields = torch.rand(2, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    return F.interpolate(fields, scale_factor=8)


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter from one seed. In a fresh peer biases are zero, and residual branches next to nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 2 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def saved(module: nn.Module, path: Path, old: bool = False) -> Path:
    torch.save(module, path, _use_new_zipfile_serialization=not old)
    return path


def ours(encoder: Path, decoder: Path | None = None) -> Dalle:
    shape, weights = read_dalle_pickles(encoder, decoder)
    dalle = Dalle(shape)
    dalle.load_state_dict(weights)
    return dalle.eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) <= CLOSE


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@torch.no_grad()
def test_encoder(tmp_path, blocks, old):
    peer = randomised(dall_e.Encoder(**SMALL, n_blk_per_group=blocks))
    dalle = ours(saved(peer, tmp_path / "encoder.pkl", old))
    assert not dalle.decodes
    assert (dalle.shape.vocabulary, dalle.shape.hidden, dalle.shape.blocks_per_group) == (512, 64, blocks)
    expected = peer(dall_e.map_pixels(pixels()))
    assert_close(dalle.logits(pixels()), expected)
    assert expected.flatten(2).argmax(dim=1).unique().numel() > 5
    assert torch.equal(dalle.tokenize(pixels()), expected.argmax(dim=1).flatten(1))


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
@torch.no_grad()
def test_decoder(tmp_path, old):
    """Of the peer, a one-hot image; of ours, the tokens."""
    encoder, peer = dall_e.Encoder(**SMALL), randomised(dall_e.Decoder(**SMALL, n_init=24, n_blk_per_group=3))
    dalle = ours(saved(encoder, tmp_path / "encoder.pkl", old), saved(peer, tmp_path / "decoder.pkl", old))
    assert dalle.decodes
    tokens = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(3))
    one_hot = F.one_hot(tokens.view(2, 3, 4), 512).permute(0, 3, 1, 2).float()
    expected = dall_e.unmap_pixels(torch.sigmoid(peer(one_hot)[:, :3]))
    found = dalle.decode(tokens, (3, 4))
    assert found.shape == (2, 3, 24, 32)
    assert expected.std() > 0.01
    assert_close(found, expected)


@torch.no_grad()
def test_published_sizes(tmp_path):
    """8192 codes, 256 channels: 53.79 M parameters (docs/recipe.md); 112 pixels are 14 × 14 tokens."""
    peer = randomised(dall_e.Encoder())
    image = dall_e.map_pixels(pixels(112, 112)[:1])
    peer.blocks.output.conv.b -= peer(image).mean(dim=(0, 2, 3))  # else one code wins everywhere
    dalle = ours(saved(peer, tmp_path / "encoder.pkl"))
    assert round(sum(weight.numel() for weight in dalle.parameters()) / 1e6, 2) == 53.79
    expected = peer(image)
    assert expected.argmax(dim=1).unique().numel() > 5
    assert_close(dalle.logits(pixels(112, 112)[:1]), expected)
    assert torch.equal(dalle.tokenize(pixels(112, 112)[:1]), expected.argmax(dim=1).flatten(1))


@torch.no_grad()
def test_half_precision_ends_in_float32(tmp_path):
    """Autocast or the peer's own mixed precision: the last convolution is float32, so logits are no bf16 numbers."""
    dalle = ours(saved(randomised(dall_e.Encoder(**SMALL)), tmp_path / "encoder.pkl"))
    with torch.autocast("cpu", torch.bfloat16):
        logits = dalle.logits(pixels())
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_flava(tmp_path, blocks):
    config = transformers.FlavaImageCodebookConfig(hidden_size=32, vocab_size=300, num_blocks_per_group=blocks)
    peer = randomised(transformers.FlavaImageCodebook(config))
    peer.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        shape, weights = read_flava_codebook(source)
        dalle = Dalle(shape)
        dalle.load_state_dict(weights)
        expected = peer(tokenizer_input(pixels()))
        assert_close(dalle.logits(pixels()), expected)
        codes = peer.get_codebook_indices(tokenizer_input(pixels()))
        assert torch.equal(dalle.tokenize(pixels()), codes.flatten(1))
