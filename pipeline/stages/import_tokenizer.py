"""`import-tokenizer SRC OUT`: a published tokenizer becomes a tokenizer folder, for data.tokenizer.

SRC is a file or folder that one of the kinds reads (pipeline.tokenizers.storage.KINDS): OpenAI's `encoder.pkl` (with
`decoder.pkl` next to it) or their folder, a FlavaImageCodebook folder or file, BEiT v2's VQ-KD `.pth`; or a tokenizer
folder of ours. Nothing of a pickle is run.
"""

import json
from pathlib import Path

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.console import say
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.published import Published
from beitforge.pipeline.tokenizers.storage import KINDS, load_kind, load_tokenizer, require_filter, save_tokenizer
from beitforge.shards.storage.staging import refuse_strangers, staged_folder

_OURS = "tokenizer.json"
_TAKES = "give encoder.pkl, a FLAVA folder, a VQ-KD .pth, or one of ours"


def run(source: Path, out: Path, size: Size | None, resample: str | None = None) -> int:
    """Write OUT whole or not at all; returns the exit code. size, resample: of the views it will take, and the filter
    that cuts them; None: as published.

    Raises ConfigError for a source that no kind reads, or a size that it cannot take.
    """
    refuse_strangers(out, replace=False)
    if not source.exists():
        raise ConfigError(f"{source} does not exist: {_TAKES}")
    kind, published = _read(source)
    size, resample = size or published.input_size, resample or published.resample
    require_filter(resample, "--filter")
    tokenizer = load_kind(kind).build(published.shape)
    stride, fixed_size = tokenizer.stride, tokenizer.fixed_size
    if any(side % stride or not side for side in size):
        raise ConfigError(
            f"--input-size {size} is not a multiple of {stride}, the pixels that a token of it stands for"
        )
    if fixed_size is not None and size != fixed_size:
        raise ConfigError(f"--input-size {size}: this {kind} tokenizer takes {fixed_size} alone; leave the option out")
    with staged_folder(out, "import-tokenizer", replace=False) as folder:
        save_tokenizer(folder, published.weights, kind, published.shape, size, resample)
        _, identity = load_tokenizer(folder)
    rows, columns = identity["grid"]
    say(
        f"imported a {kind} tokenizer of {identity['vocabulary']} tokens on a grid of {rows}×{columns} to {out}, "
        f"which sees views cut by {resample}; "
        f"fingerprint {identity['fingerprint']}"
    )
    if published.assumed:
        say(f"assumed, since no weight shows it: {published.assumed}")
    say(
        f"its config section:  tokenizer.input_size={size} tokenizer.stride={stride} "
        f"tokenizer.vocabulary={identity['vocabulary']}"
    )
    return 0


def _read(source: Path) -> tuple[str, Published]:
    """The kind of the tokenizer in `source`, and what was read."""
    if (source / _OURS).exists():
        tokenizer, identity = load_tokenizer(source)
        content = json.loads((source / _OURS).read_text(encoding="utf-8"))
        return identity["kind"], Published(
            shape=content["shape"],
            weights=tokenizer.state_dict(),
            input_size=Size(*identity["input_size"]),
            resample=identity["filter"],
        )
    for kind in KINDS:
        published = load_kind(kind).read_published(source)
        if published is not None:
            return kind, published
    raise ConfigError(f"{source} is no tokenizer that can be imported: {_TAKES}; `import` takes encoders")
