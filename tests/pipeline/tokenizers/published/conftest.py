"""Tokenizer files as their publishers save them, made of our own modules; and what a refusal looks like."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.dalle import Dalle, DalleShape, Residual, read_dalle_pickles

SHAPE = DalleShape(vocabulary=20, hidden=8, decoder_hidden=12, decoder_init=6, blocks_per_group=1, has_decoder=True)
FORMATS = pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


class Conv2d(nn.Module):
    """As OpenAI's: the parameters are w and b."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.n_in, self.device = conv.in_channels, torch.device("cpu")
        self.w, self.b = conv.weight, conv.bias


class Encoder(nn.Module):
    def __init__(self, blocks: nn.Module):
        super().__init__()
        self.use_mixed_precision, self.blocks = True, blocks


class EncoderBlock(nn.Module):
    def __init__(self, id_path: nn.Module, res_path: nn.Module):
        super().__init__()
        self.post_gain, self.id_path, self.res_path = 0.25, id_path, res_path


class Decoder(Encoder):
    pass


class DecoderBlock(EncoderBlock):
    pass


@pytest.fixture
def openai(monkeypatch) -> Callable[[nn.Module, str], nn.Module]:
    """Turns a half of ours into the module OpenAI's pickle holds, classes of dall_e and all."""
    for part, classes in {
        "encoder": (Encoder, EncoderBlock),
        "decoder": (Decoder, DecoderBlock),
        "utils": (Conv2d,),
    }.items():
        module = ModuleType(f"dall_e.{part}")
        module.__file__ = __file__  # the old format looks for the source
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for made in classes:
            monkeypatch.setattr(made, "__module__", module.__name__)
            setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, "dall_e", ModuleType("dall_e"))

    def convert(module: nn.Module, part: str) -> nn.Module:
        if isinstance(module, nn.Conv2d):
            return Conv2d(module)
        if isinstance(module, Residual):
            block = EncoderBlock if part == "encoder" else DecoderBlock
            return block(convert(module.id_path, part), convert(module.res_path, part))
        if isinstance(module, nn.Sequential):
            return nn.Sequential(OrderedDict((name, convert(child, part)) for name, child in module.named_children()))
        return module

    return lambda half, part: (Encoder if part == "encoder" else Decoder)(convert(half.blocks, part))


@pytest.fixture
def encoder_file(tmp_path, openai) -> Path:
    dalle = filled(Dalle(SHAPE))
    torch.save(openai(dalle.encoder, "encoder"), tmp_path / "encoder.pkl")
    return tmp_path / "encoder.pkl"


def refusal(path: Path, read: Callable[[Path], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert line.startswith(str(path))
    assert ": " in line  # what is wrong, and the cure
    return line


def encoder_of(path: Path) -> object:
    return read_dalle_pickles(path, None)
