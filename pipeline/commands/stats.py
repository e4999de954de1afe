"""`stats SHARDS`: what a shard set holds."""

import argparse
import json

from beitforge.shards.options import local_folder

HELP = "show counts, sizes, classes and flags of an image set, or the codebook use of a token set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set."""
    parser.add_argument("shards", metavar="SHARDS", help="folder of an image or token shard set")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    folder = local_folder(arguments.shards)
    from beitforge.shards.format.manifest import kind_of
    from beitforge.shards.inspect.stats import image_stats, table, token_stats

    stats = (token_stats if kind_of(folder) == "tokens" else image_stats)(folder)
    print(json.dumps(stats, indent=1) if arguments.json else table(stats))
    return 0
