"""`import-tokenizer SRC OUT`: a published tokenizer becomes a tokenizer folder of ours."""

import argparse
from pathlib import Path

from beitforge.pipeline.config.loading import to_size
from beitforge.pipeline.config.settings import FILTERS

HELP = "convert the tokenizer of DALL-E, FLAVA or BEiT v2 into a tokenizer folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, destination and view size."""
    text = "DALL-E's encoder.pkl or its folder, a FLAVA folder, or VQ-KD's .pth"
    parser.add_argument("source", metavar="SRC", type=Path, help=text)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, for data.tokenizer")
    text = "size in pixels of the views it is given (default: as published)"
    parser.add_argument("--input-size", metavar="PIXELS", help=text)
    text = "filter that cuts its views (default: as published, Pillow's); torch lanczos is 72 dB from lanczos, at a "
    text += "fifth of the time"
    parser.add_argument("--filter", choices=FILTERS, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Write OUT."""
    size = to_size(arguments.input_size, "--input-size") if arguments.input_size else None
    from beitforge.pipeline.stages import import_tokenizer

    return import_tokenizer.run(arguments.source, arguments.out, size, arguments.filter)
