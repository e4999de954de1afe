"""Tokenizer folders: weights as safetensors, a JSON that says what they are, and the fingerprint that names both.

Three kinds share one contract and the trainer never knows which it has: the own dVAE, OpenAI's (DALL-E), and BEiT v2's
VQ-KD. Must not know shards or deepspeed.
"""

import hashlib
import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from beitforge.pipeline.config.settings import DVAE_STRIDE, Size, Tokenizer
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.dalle import Dalle, DalleShape
from beitforge.pipeline.tokenizers.dvae import Dvae
from beitforge.pipeline.tokenizers.vqkd import Vqkd, VqkdShape

_WEIGHTS, _CONFIG = "tokenizer.safetensors", "tokenizer.json"
_CURE = (
    "train one with `tokenizer CONFIG`, import one with `import-tokenizer`, or point data.tokenizer at a finished one"
)
_DVAE_SHAPE = ("vocabulary", "width", "embedding", "residual_blocks")


class VisualTokenizer(Protocol):
    """What every tokenizer does, as a torch module. Pixels are float32 in [0, 1], jittered, of its input size."""

    decodes: bool  # whether `decode` gives pixels

    def to(self, device: torch.device) -> "VisualTokenizer":
        """As torch modules do."""

    def state_dict(self) -> dict[str, Tensor]:
        """As torch modules do."""

    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        """Visual tokens i64 [B, N], in row order."""

    def decode(self, tokens_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] from visual tokens on a grid of (rows, columns)."""


def save_dvae(folder: Path, dvae: Dvae, settings: Tokenizer) -> str:
    """Write a trained own tokenizer; returns its fingerprint."""
    shape = {name: getattr(settings, name) for name in _DVAE_SHAPE}
    return save_tokenizer(folder, dvae.state_dict(), "dvae", shape, settings.input_size, "lanczos")


def save_tokenizer(folder: Path, weights: dict[str, Tensor], kind: str, shape: dict, size: Size, resample: str) -> str:
    """Write weights, then tokenizer.json with their fingerprint; returns the fingerprint.

    kind: dvae, dalle or vqkd; shape: what its module is built from. size: of the views it is given, in pixels, cut with
    the filter `resample` (bicubic or lanczos).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _WEIGHTS
    partial = path.with_suffix(".partial")
    # save_file would leave the file to its owner alone, whatever the umask
    partial.write_bytes(save({name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}))
    partial.replace(path)
    content = {"kind": kind, "shape": shape, "input_size": list(size), "filter": resample}
    fingerprint = _fingerprint(path, content)
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps({**content, "fingerprint": fingerprint}, indent=1) + "\n")
    partial.replace(folder / _CONFIG)
    return fingerprint


def _fingerprint(weights: Path, content: dict) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    with open(weights, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stated_fingerprint(folder: Path) -> str | None:
    """What the tokenizer in `folder` says it is, without reading its weights; None where there is none."""
    try:
        return json.loads((folder / _CONFIG).read_text()).get("fingerprint")
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def load_tokenizer(folder: Path) -> tuple[VisualTokenizer, dict]:
    """A tokenizer, and what token manifests say of it: kind, fingerprint, vocabulary, grid, input_size, filter.

    Raises ConfigError when the folder holds none, or its weights are not those its tokenizer.json was written for.
    """
    try:
        content = json.loads((folder / _CONFIG).read_text())
        stated = content.pop("fingerprint")
        kind, shape, size = content["kind"], content["shape"], Size(*content["input_size"])
        fingerprint = _fingerprint(folder / _WEIGHTS, content)
        if fingerprint != stated:
            raise ConfigError(
                f"{folder / _WEIGHTS} is not the file its {_CONFIG} was written for (sha256 differs): {_CURE}"
            )
        module, stride = build(kind, shape)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no finished tokenizer ({error.filename} is missing): {_CURE}") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / _CONFIG} is damaged ({error}): {_CURE}") from error
    module.load_state_dict(load_file(folder / _WEIGHTS))
    identity = {"kind": kind, "fingerprint": fingerprint, "vocabulary": shape["vocabulary"]}
    identity |= {"grid": list(size.grid(stride)), "input_size": list(size), "filter": content["filter"]}
    return module.eval(), identity  # type: ignore[return-value]  # a module of these kinds is a VisualTokenizer


def codebook_use(counts: Tensor) -> dict[str, float]:
    """From token counts [V]: how many codes occur, and the perplexity of their distribution (V at best)."""
    share = counts.double() / counts.sum()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {"used": int((counts > 0).sum()), "vocabulary": len(counts), "perplexity": float(entropy.exp())}


def build(kind: str, shape: dict) -> tuple[nn.Module, int]:
    """The module of a kind, its weights still to be loaded, and the pixels on a side that a token stands for."""
    if kind == "dvae":
        return Dvae(Tokenizer(**shape), seed=0), DVAE_STRIDE
    if kind == "dalle":
        return Dalle(DalleShape(**shape)), DVAE_STRIDE
    if kind == "vqkd":
        vqkd = VqkdShape(**shape)
        return Vqkd(vqkd), vqkd.patch_size
    raise ConfigError(f"a tokenizer of kind {kind!r} is unknown; there are dvae, dalle and vqkd: {_CURE}")
