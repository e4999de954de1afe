"""`export RUN OUT`: the encoder and head of a run, in our format or another library's."""

import argparse
from pathlib import Path

from beitforge.pipeline.config.loading import to_size

HELP = "write the encoder of a run for other programs; each export is checked by loading it back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, where to, and in whose layout."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or an exported or imported encoder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    text = "whose names and layout (default safetensors: ours)"
    parser.add_argument("--to", choices=("safetensors", "hf", "timm", "unilm"), default="safetensors", help=text)
    text = "write an encoder as a classifier without a head: mean pooling, a bias table for each layer"
    parser.add_argument("--finetune", action="store_true", help=text)
    text = "of a fine-tuning with finetune.ema_decay: the moving average of its weights"
    parser.add_argument("--ema", action="store_true", help=text)
    text = "with --finetune: image size in pixels, such as 384 or 224x288 (default: the run's)"
    parser.add_argument("--input-size", metavar="PIXELS", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Write OUT."""
    size = to_size(arguments.input_size, "--input-size") if arguments.input_size else None
    from beitforge.pipeline.stages import export

    return export.run(arguments.run, arguments.out, arguments.to, arguments.finetune, size, arguments.ema)
