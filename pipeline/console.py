"""Text for the person at the terminal: lines, tables, and the name of the command."""

import os
import sys
from collections.abc import Sequence

from beitforge.shards.errors import printable


def say(text: str) -> None:
    """Print a line on stderr, apart from any progress bar; of names out of foreign files nothing reaches the terminal
    that does not print."""
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


def align_columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """The rows of a table, one line each, columns two spaces apart and as wide as their longest cell.

    right: align cells to the right, for numbers. Every row must have the same number of cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = str.rjust if right else str.ljust
    return ["  ".join(map(pad, row, widths)).rstrip() for row in rows]


def program_name() -> str:
    """The command to show in messages: launch.sh where it started this process, else beitforge."""
    return os.environ.get("BEITFORGE_COMMAND", "beitforge")
