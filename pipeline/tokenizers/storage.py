"""Tokenizer folders: weights as safetensors, a JSON that says what they are, and the fingerprint that names both.

All kinds share one contract, so the trainer never knows which it has. A kind is one module and one line of KINDS.
Must not know shards or deepspeed.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import FILTERS
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.reading import read_object, require_regular
from beitforge.pipeline.tokenizers import user_class
from beitforge.pipeline.tokenizers.published import Published

_WEIGHTS, _CONFIG = "tokenizer.safetensors", "tokenizer.json"
_CURE = (
    "train one with `tokenizer CONFIG`, import one with `import-tokenizer`, or point data.tokenizer at a finished one"
)


# kind in tokenizer.json: the module that implements it (Kind); a published file is read by the first that knows it,
# and vqkd, which takes any file, comes last
KINDS = {
    "dvae": "beitforge.pipeline.tokenizers.dvae",
    "dalle": "beitforge.pipeline.tokenizers.dalle",
    "vqkd": "beitforge.pipeline.tokenizers.vqkd",
}


class VisualTokenizer(Protocol):
    """A torch module that turns images into visual tokens. Pixels are float32 in [0, 1], jittered, of its input
    size."""

    decodes: bool  # whether `decode` gives pixels
    stride: int  # pixels on each side of the square that one token stands for
    fixed_size: Size | None  # the only input size it takes; None: any multiple of the stride

    def to(self, device: torch.device) -> "VisualTokenizer":
        """nn.Module.to."""

    def eval(self) -> "VisualTokenizer":
        """nn.Module.eval."""

    def state_dict(self) -> dict[str, Tensor]:
        """nn.Module.state_dict."""

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> object:
        """nn.Module.load_state_dict."""

    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        """Visual tokens i64 [B, N], in row order."""

    def decode(self, tokens_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] from visual tokens on a grid of (rows, columns)."""


class Kind(Protocol):
    """The functions of a kind's module."""

    def build(self, shape: dict) -> VisualTokenizer:
        """The tokenizer of a shape, which is the JSON object that tokenizer.json keeps; it has a key `vocabulary`."""

    def read_published(self, source: Path) -> Published | None:
        """The tokenizer in a publisher's file or folder; None if the source is not of this kind."""


def load_kind(name: str) -> Kind:
    """The module of a kind. Raises ConfigError for an unknown one."""
    if name not in KINDS:
        raise ConfigError(f"a tokenizer of kind {name!r} is unknown; known kinds: {', '.join(KINDS)}: {_CURE}")
    return cast(Kind, importlib.import_module(KINDS[name]))


def build(kind: str, shape: dict) -> VisualTokenizer:
    """The tokenizer of a kind, `module:Class` outside this package included, with its weights still to be loaded."""
    if ":" in kind:
        return cast(VisualTokenizer, user_class.build(kind, shape))
    return load_kind(kind).build(shape)


def save_tokenizer(folder: Path, weights: dict[str, Tensor], kind: str, shape: dict, size: Size, resample: str) -> str:
    """Write weights, then tokenizer.json with their fingerprint; returns the fingerprint.

    kind: a key of KINDS or what user_kind returns; shape: what its module is built from. size: of the views it takes,
    in pixels, resized with the filter `resample` (pipeline.config.settings.FILTERS). Raises ConfigError for another.
    """
    require_filter(resample, "the filter")
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


def require_filter(name: object, where: str) -> None:
    """Raise ConfigError unless views can be cut with a filter here. where: what states it, in words."""
    if name not in FILTERS:
        raise ConfigError(f"{where} is {shown(str(name))}, expected one of {', '.join(FILTERS)}: {_CURE}")
    if name == "torch lanczos":
        try:
            F.interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode="lanczos", antialias=True)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"{where} is {name}, which torch {torch.__version__} does not have: install torch 2.13 or newer"
            ) from error


def _fingerprint(weights: Path, content: dict) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    with open(weights, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stated_fingerprint(folder: Path) -> str | None:
    """What the tokenizer in `folder` says it is, without reading its weights; None where there is none."""
    try:
        stated = read_object(folder / _CONFIG).get("fingerprint")
        return stated if isinstance(stated, str) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def load_tokenizer(folder: Path) -> tuple[VisualTokenizer, dict]:
    """A tokenizer, and what token manifests say of it: kind, fingerprint, vocabulary, grid, input_size, filter.

    Raises ConfigError when the folder holds none, or its weights are not those its tokenizer.json was written for.
    """
    try:
        content = read_object(folder / _CONFIG)
        stated = content.pop("fingerprint")
        kind, shape, size = content["kind"], content["shape"], Size(*content["input_size"])
        fingerprint = _fingerprint(require_regular(folder / _WEIGHTS), content)
        if fingerprint != stated:
            raise ConfigError(
                f"{folder / _WEIGHTS} is not the file its {_CONFIG} was written for (sha256 differs): {_CURE}"
            )
        tokenizer = build(kind, shape)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no finished tokenizer ({error.filename} is missing): {_CURE}") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / _CONFIG} is damaged ({shown(str(error))}): {_CURE}") from error
    try:
        tokenizer.load_state_dict(load_file(folder / _WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        said = shown(" ".join(str(error).split()))
        raise ConfigError(f"{folder / _WEIGHTS} is damaged or of another shape ({said}): {_CURE}") from error
    require_filter(content["filter"], f"the filter of {folder / _CONFIG}")
    identity = {"kind": kind, "fingerprint": fingerprint, "vocabulary": shape["vocabulary"]}
    identity |= {"grid": list(size.grid(tokenizer.stride)), "input_size": list(size), "filter": content["filter"]}
    return tokenizer.eval(), identity


def codebook_use(counts: Tensor) -> dict[str, float]:
    """From token counts [V]: how many codes occur, and the perplexity of their distribution (V at best)."""
    share = counts.double() / counts.sum()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {"used": int((counts > 0).sum()), "vocabulary": len(counts), "perplexity": float(entropy.exp())}
