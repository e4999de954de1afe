"""Lines for the person watching."""

import os
import sys


def say(text: str) -> None:
    """Print a line on stderr, apart from any progress bar."""
    print(text, file=sys.stderr, flush=True)


def program_name() -> str:
    """The command to show in messages: launch.sh where it started this process, else beitforge."""
    return os.environ.get("BEITFORGE_COMMAND", "beitforge")
