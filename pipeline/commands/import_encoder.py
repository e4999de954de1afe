"""`import SRC OUT`: published BEiT weights become an encoder or a classifier of ours."""

import argparse
from pathlib import Path

HELP = "convert a BEiT of transformers, timm or the released code into an encoder or classifier folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, destination and overrides."""
    parser.add_argument("source", metavar="SRC", type=Path, help="folder, or a .pth, .bin or .safetensors file")
    text = "folder to write; probe, report and export read it, train.init or finetune.init starts from it"
    parser.add_argument("out", metavar="OUT", type=Path, help=text)
    text = "of a classifier, leave out norm and head: an encoder that pretrains further"
    parser.add_argument("--encoder", action="store_true", help=text)
    text = "settings that win over what SRC says"
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Write OUT."""
    from beitforge.pipeline.stages import import_encoder

    return import_encoder.run(arguments.source, arguments.out, arguments.overrides, arguments.encoder)
