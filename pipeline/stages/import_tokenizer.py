"""`import-tokenizer SRC OUT`: a published tokenizer becomes a tokenizer folder, for data.tokenizer.

SRC is OpenAI's `encoder.pkl` (with `decoder.pkl` beside it) or their folder, a FlavaImageCodebook folder or file, BEiT
v2's VQ-KD `.pth`, or a tokenizer folder of ours. Nothing of a pickle is run.
"""

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from pipeline.config import ConfigError, Size
from pipeline.foreign import read_dalle_pickles, read_flava_codebook, read_vqkd
from pipeline.metrics import say
from pipeline.tokenizer import load_tokenizer, save_tokenizer

_DALLE_SIZE = Size(112, 112)
_OURS = "tokenizer.json"


def run(source: Path, out: Path, size: Size | None) -> int:
    """Write the folder; returns the exit code. size: of the views it will be given, instead of the published one."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give a new folder")
    if not source.exists():
        raise ConfigError(f"{source} does not exist: give encoder.pkl, a FLAVA folder, a VQ-KD .pth, or one of ours")
    kind, shape, weights, fitting, resample = _read(source)
    save_tokenizer(out, weights, kind, shape, size or fitting, resample)
    _, identity = load_tokenizer(out)
    rows, columns = identity["grid"]
    stride = identity["input_size"][0] // rows
    say(
        f"imported a {kind} tokenizer of {identity['vocabulary']} tokens on a grid of {rows}×{columns} to {out}; "
        f"fingerprint {identity['fingerprint']}"
    )
    say(
        f"its config section:  tokenizer.input_size={Size(*identity['input_size'])} tokenizer.stride={stride} "
        f"tokenizer.vocabulary={identity['vocabulary']}"
    )
    return 0


def _read(source: Path) -> tuple[str, dict, dict[str, Tensor], Size, str]:
    """Kind, shape, weights, size of the views as published, and the filter they are cut with."""
    if (source / _OURS).exists():
        tokenizer, identity = load_tokenizer(source)
        content = json.loads((source / _OURS).read_text(encoding="utf-8"))
        size = Size(*identity["input_size"])
        return identity["kind"], content["shape"], tokenizer.state_dict(), size, identity["filter"]
    encoder = source / "encoder.pkl" if source.is_dir() else source
    if encoder.suffix == ".pkl" and encoder.exists():
        decoder = encoder.with_name("decoder.pkl")
        dalle, weights = read_dalle_pickles(encoder, decoder if decoder.exists() else None)
        return "dalle", dataclasses.asdict(dalle), weights, _DALLE_SIZE, "lanczos"
    if source.is_dir() or source.suffix == ".safetensors":
        dalle, weights = read_flava_codebook(source)
        return "dalle", dataclasses.asdict(dalle), weights, _DALLE_SIZE, "lanczos"
    vqkd, weights = read_vqkd(source)
    return "vqkd", dataclasses.asdict(vqkd), weights, Size(vqkd.input_size, vqkd.input_size), "bicubic"
