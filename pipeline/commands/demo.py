"""`demo [DIR]`: the whole pipeline on this machine, on sample photographs or the user's own images."""

import argparse
from pathlib import Path

from beitforge.pipeline.cluster.launching import require_packages
from beitforge.pipeline.errors import ConfigError

HELP = "run the whole pipeline on this machine, on sample photographs or your own folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images, settings and the output folder."""
    text = "your own images (default: sample photographs), and settings that win over configs/demo.yaml"
    parser.add_argument("words", metavar="DIR section.key=value", nargs="*", help=text)
    text = "folder for everything it makes (default runs/demo)"
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs/demo"), help=text)


def run(arguments: argparse.Namespace) -> int:
    """Run every step that is not finished yet."""
    folders = [word for word in arguments.words if "=" not in word]
    if len(folders) > 1:
        raise ConfigError(f"demo takes one folder of images, not {len(folders)}: {' '.join(folders)}")
    require_packages("torch", "deepspeed", "tensorboard")  # before minutes of packing
    settings = [word for word in arguments.words if "=" in word]
    from beitforge.pipeline.stages import demo

    return demo.run(Path(folders[0]) if folders else None, arguments.out, settings)
