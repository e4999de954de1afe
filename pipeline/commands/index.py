"""`index SHARDS`: WebDataset tars that somebody else made become an image shard set, in place."""

import argparse

from beitforge.shards.options import add_workers, local_folder, num_workers
from beitforge.shards.wording import counted

HELP = "adopt existing WebDataset tars in place: write an index beside each, and a manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder of tars."""
    parser.add_argument("shards", metavar="SHARDS", help="folder of *.tar; they are never rewritten")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the indexes and the manifest."""
    folder = local_folder(arguments.shards)
    from beitforge.shards.pack.adopt import adopt

    adopted = adopt(folder, num_workers(arguments))
    shards = adopted.manifest.shards
    for name in adopted.empty:
        print(f"{name}.tar holds no sample: left out of the manifest")
    if adopted.num_bad:
        print(f"images that do not decode: {adopted.num_bad}; their rows are marked bad, a stream substitutes them")
    print(f"{folder}: {counted(adopted.manifest.samples, 'sample')} in {counted(len(shards), 'shard')}", end="")
    print(f", {adopted.kept} of {len(shards) + len(adopted.empty)} tars were indexed already" if adopted.kept else "")
    return 0
