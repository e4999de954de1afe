"""`simulate --samples N`: how well an order mixes a set of any size, and what a node reads, without the set."""

import argparse
import json

from beitforge.shards.errors import ShardError

HELP = "walk the order of a set of any size: mixing, bytes a node reads, cache and memory it needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, the ranks and the order."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for name, default, text in (
        ("samples", None, "images in the set; digits may be grouped, as 14_200_000"),
        ("samples-per-shard", 10_000, "images in a tar"),
        ("bytes-per-sample", 110_000, "mean size of an image"),
        ("ranks", 1, "processes that train"),
        ("ranks-per-node", 8, "of them on one machine"),
        ("global-batch", 2048, "train.global_batch"),
        ("epoch", 0, "that is walked"),
        ("seed", 0, "data.seed"),
        ("chunk", 64, "loader.chunk"),
        ("window", 16, "loader.window"),
        ("lanes", 256, "loader.lanes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, required=default is None, metavar="N", help=text)
    parser.add_argument("--all", action="store_true", help="walk every sample, also of more than 10^8")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from beitforge.shards.inspect.simulate import Simulated, simulate
    from beitforge.shards.inspect.stats import table
    from beitforge.shards.stream.order import OrderPolicy

    policy = {name: getattr(arguments, name) for name in ("seed", "chunk", "window", "lanes")}
    if min(policy["chunk"], policy["window"], policy["lanes"]) < 1:
        raise ShardError("--chunk, --window and --lanes must be at least 1")
    names = ("samples", "samples_per_shard", "bytes_per_sample", "ranks", "ranks_per_node", "global_batch", "epoch")
    asked = Simulated(**{name: getattr(arguments, name) for name in names}, order=OrderPolicy(**policy))
    found = simulate(asked, arguments.all)
    print(json.dumps(found, indent=1) if arguments.json else table(found))
    return 0
