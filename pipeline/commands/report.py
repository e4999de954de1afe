"""`report RUN …`: a run, or a comparison of runs, as one HTML file."""

import argparse
from pathlib import Path

HELP = "write one HTML file: curves, with --data images and attention; for several runs, a comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where to write."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder; several are compared")
    text = "file to write (default RUN/report.html; for several runs ./comparison.html)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    text = "also read the sets and the tokenizer that RUN's config names, for images; for a run you trust"
    parser.add_argument("--data", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Write the file."""
    from beitforge.pipeline.stages import report

    return report.run(arguments.runs, arguments.out, arguments.data)
