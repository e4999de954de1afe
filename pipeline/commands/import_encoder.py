"""`import SRC OUT`: published BEiT weights become an encoder of ours."""

import argparse
from pathlib import Path

HELP = "convert a BEiT of transformers, timm or the released code into an encoder folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, destination and overrides."""
    parser.add_argument("source", metavar="SRC", type=Path, help="folder, or a .pth or .safetensors file")
    text = "encoder folder to write; probe, report and export read it, and train.init=OUT starts from it"
    parser.add_argument("out", metavar="OUT", type=Path, help=text)
    text = "settings that win over what SRC says"
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Write OUT."""
    from beitforge.pipeline.stages import import_encoder

    return import_encoder.run(arguments.source, arguments.out, arguments.overrides)
