"""`stats SHARDS`: what a shard set holds."""

import argparse
import json

from beitforge.pipeline.errors import ConfigError
from beitforge.shards.options import add_against, add_workers, local_folder, num_workers

HELP = "show counts, sizes, classes and flags of an image set, or the codebook use of a token set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, and what to look for in it."""
    parser.add_argument("shards", metavar="SHARDS", help="folder of an image or token shard set")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_against(parser)
    text = (
        "also find images that are near one another: the same one in another size or compression. Decodes every image"
    )
    parser.add_argument("--duplicates", action="store_true", help=text)
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    folder = local_folder(arguments.shards)
    against = [local_folder(other) for other in arguments.against]
    from beitforge.shards.format.manifest import kind_of
    from beitforge.shards.inspect.stats import duplicate_stats, image_stats, table, token_stats

    if kind_of(folder) == "tokens":
        if against or arguments.duplicates:
            raise ConfigError(f"--against and --duplicates are for image sets, and {folder} holds tokens")
        stats = token_stats(folder)
    else:
        stats = image_stats(folder, against)
        if arguments.duplicates:
            stats |= duplicate_stats(folder, against, num_workers(arguments))
    print(json.dumps(stats, indent=1) if arguments.json else table(stats))
    return 0
