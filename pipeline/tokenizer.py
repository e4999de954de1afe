"""The own tokenizer: a discrete VAE from pixels to visual tokens and back (RECIPE, "Own tokenizer").

Three stride-2 convolutions and residual blocks give logits over the vocabulary for each 8×8 field; the decoder mirrors
them. Training draws from a Gumbel-softmax; a trained tokenizer takes the argmax. Shape letters as in pipeline.model;
h, w: the token grid, E: embedding size. Must not know shards or deepspeed.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import TOKENIZER_STRIDE, ConfigError, Tokenizer

_LOGIT_GAIN = 4 / 3**0.5
_WEIGHTS, _CONFIG = "tokenizer.safetensors", "tokenizer.json"


class Residual(nn.Module):
    """x + conv1(relu(conv3(relu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv3, self.conv1 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


class Dvae(nn.Module):
    """Encoder, codebook and decoder. Input and output are pixels in the range of pixels.tokenizer_input."""

    def __init__(self, settings: Tokenizer, seed: int):
        """All weights are drawn from `seed` alone."""
        super().__init__()
        width, vocabulary = settings.width, settings.vocabulary
        self.vocabulary = vocabulary
        # torch's own layers draw from the global generator when made; it is put back as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            down = [nn.Conv2d(3, width // 4, 4, 2, 1), nn.ReLU()]
            down += [nn.Conv2d(width // 4, width // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 4, 2, 1)]
            deep = [Residual(width) for _ in range(settings.residual_blocks)]
            logits = nn.Conv2d(width, vocabulary, 1)
            # torch's default leaves the logits so small that the Gumbel noise drowns them for hundreds of steps
            nn.init.normal_(logits.weight, std=_LOGIT_GAIN / width**0.5)
            self.encoder = nn.Sequential(*down, *deep, nn.ReLU(), logits)
            self.codebook_VE = nn.Parameter(torch.randn(vocabulary, settings.embedding))
            rise = [Residual(width) for _ in range(settings.residual_blocks)]
            up = [nn.ConvTranspose2d(width, width // 2, 4, 2, 1), nn.ReLU()]
            up += [nn.ConvTranspose2d(width // 2, width // 4, 4, 2, 1), nn.ReLU()]
            up += [nn.ConvTranspose2d(width // 4, 3, 4, 2, 1)]
            self.decoder = nn.Sequential(nn.Conv2d(settings.embedding, width, 1), *rise, nn.ReLU(), *up)

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, V, h, w], h = H / 8."""
        return self.encoder(pixels_BCHW * 2 - 1)

    def decode_soft(self, weights_BVhw: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] from a weighting of the codebook at each place."""
        return self.decoder(torch.einsum("bvhw,ve->behw", weights_BVhw, self.codebook_VE)) * 0.5 + 0.5

    def forward(self, pixels_BCHW: Tensor, temperature: float, noise_BVhw: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction [B, 3, H, W] and logits [B, V, h, w]. noise_BVhw: standard Gumbel draws."""
        logits_BVhw = self.logits(pixels_BCHW)
        weights_BVhw = ((logits_BVhw + noise_BVhw) / temperature).softmax(dim=1)
        return self.decode_soft(weights_BVhw), logits_BVhw

    @torch.no_grad()
    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        """Visual tokens i64 [B, N], N = h · w in row order, of pixels in the range of pixels.tokenizer_input."""
        return self.logits(pixels_BCHW).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode(self, tokens_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels [B, 3, H, W] from visual tokens, in the range of pixels.tokenizer_input."""
        embedded = F.embedding(tokens_BN.view(len(tokens_BN), *grid), self.codebook_VE).permute(0, 3, 1, 2)
        return self.decoder(embedded) * 0.5 + 0.5


def save_tokenizer(folder: Path, dvae: Dvae, settings: Tokenizer) -> str:
    """Write weights, then config with their fingerprint; returns the fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / _WEIGHTS
    partial = weights.with_suffix(".partial")
    save_file({name: tensor.contiguous().cpu() for name, tensor in dvae.state_dict().items()}, partial)
    partial.replace(weights)
    shape = {name: getattr(settings, name) for name in _SHAPE}
    fingerprint = _fingerprint(weights, shape)
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps({"kind": "dvae", **shape, "fingerprint": fingerprint}, indent=1) + "\n")
    partial.replace(folder / _CONFIG)
    return fingerprint


_SHAPE = ("input_size", "vocabulary", "width", "embedding", "residual_blocks")


def _fingerprint(weights: Path, shape: dict) -> str:
    digest = hashlib.sha256(json.dumps(["dvae", shape], sort_keys=True).encode())
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


def load_tokenizer(folder: Path) -> tuple[Dvae, dict]:
    """A trained tokenizer and what token manifests say of it: fingerprint, vocabulary, grid, input_size.

    Raises ConfigError when the folder holds none, or its weights are not those its config was written for.
    """
    cure = "train one with `tokenizer CONFIG`, or point data.tokenizer at a finished one"
    try:
        content = json.loads((folder / _CONFIG).read_text())
        shape = {name: content[name] for name in _SHAPE}
        fingerprint = _fingerprint(folder / _WEIGHTS, shape)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no finished tokenizer ({error.filename} is missing): {cure}") from error
    except (json.JSONDecodeError, KeyError) as error:
        raise ConfigError(f"{folder / _CONFIG} is damaged ({error}): {cure}") from error
    if fingerprint != content.get("fingerprint"):
        raise ConfigError(f"{folder / _WEIGHTS} is not the file its {_CONFIG} was written for (sha256 differs): {cure}")
    dvae = Dvae(Tokenizer(**shape), seed=0)
    dvae.load_state_dict(load_file(folder / _WEIGHTS))
    rows = shape["input_size"] // TOKENIZER_STRIDE
    identity = {"kind": "dvae", "fingerprint": fingerprint, "vocabulary": shape["vocabulary"]}
    return dvae.eval(), {**identity, "grid": [rows, rows], "input_size": shape["input_size"]}
