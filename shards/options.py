"""What the verbs of shard sets have in common on the command line. Instant: no NumPy."""

import argparse
import os
from pathlib import Path

from beitforge.shards.errors import ShardError


def local_folder(where: str) -> Path:
    """A folder of this machine. Raises ShardError for a URL, of which a Path would lose a slash."""
    if "://" in where:
        raise ShardError(f"{where} is a URL: this verb reads folders of this machine alone")
    return Path(where)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The option --workers of a verb that spreads shards over processes."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"processes to use (default: one per CPU, here {cpus})"
    parser.add_argument("--workers", type=int, default=cpus, metavar="N", help=text)


def add_against(parser: argparse.ArgumentParser) -> None:
    """The option --against of a verb that counts the images that sets have in common."""
    text = "also count the images that are in this set, too, such as the one to train on; may be repeated. Those that "
    text += "the same packing made beside SHARDS always count"
    parser.add_argument("--against", action="append", default=[], metavar="SET", help=text)


def num_workers(arguments: argparse.Namespace) -> int:
    """What --workers says. Raises ShardError for less than one."""
    if arguments.workers < 1:
        raise ShardError(f"--workers is {arguments.workers}, it must be at least 1")
    return arguments.workers
