"""`import-tokenizer SRC OUT`: a published tokenizer becomes a tokenizer folder, for data.tokenizer.

SRC is OpenAI's `encoder.pkl` (with `decoder.pkl` beside it) or their folder, a FlavaImageCodebook folder or file, BEiT
v2's VQ-KD `.pth`, or a tokenizer folder of ours. Nothing of a pickle is run.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from torch import Tensor

from beitforge.pipeline.config.settings import Size
from beitforge.pipeline.console import say
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.published import read_dalle_pickles, read_flava_codebook, read_vqkd
from beitforge.pipeline.tokenizers.storage import build, load_tokenizer, save_tokenizer
from beitforge.pipeline.weights.encoder import refuse_full

_DALLE_SIZE = Size(112, 112)
_OURS = "tokenizer.json"


def run(source: Path, out: Path, size: Size | None) -> int:
    """Write OUT whole or not at all; returns the exit code. size: of the views it will be given, None: as published."""
    refuse_full(out)
    if not source.exists():
        raise ConfigError(f"{source} does not exist: give encoder.pkl, a FLAVA folder, a VQ-KD .pth, or one of ours")
    kind, shape, weights, fitting, resample = _read(source)
    size = size or fitting
    stride = build(kind, shape)[1]
    if any(side % stride or not side for side in size):
        raise ConfigError(
            f"--input-size {size} is not a multiple of {stride}, the pixels that a token of it stands for"
        )
    if kind == "vqkd" and size != fitting:
        raise ConfigError(
            f"--input-size {size}: this VQ-KD tokenizer has learned positions for {fitting}; leave it out"
        )
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_tokenizer(partial, weights, kind, shape, size, resample)
    _, identity = load_tokenizer(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    rows, columns = identity["grid"]
    say(
        f"imported a {kind} tokenizer of {identity['vocabulary']} tokens on a grid of {rows}×{columns} to {out}; "
        f"fingerprint {identity['fingerprint']}"
    )
    say(
        f"its config section:  tokenizer.input_size={size} tokenizer.stride={stride} "
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
