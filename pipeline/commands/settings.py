"""`settings [SECTION]`: every setting with its default, range, unit and meaning."""

import argparse

HELP = "list every setting with its default, range, unit and meaning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One section or all."""
    parser.add_argument("section", metavar="SECTION", nargs="?", default="", help="one section (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the reference page, docs/settings.md")


def run(arguments: argparse.Namespace) -> int:
    """Print the reference."""
    from beitforge.pipeline.config.reference import markdown, text

    print(markdown() if arguments.markdown else text(arguments.section))
    return 0
