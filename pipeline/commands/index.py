"""`index SHARDS`: WebDataset tars that somebody else made become an image shard set, in place."""

import argparse

from beitforge.shards.errors import printable
from beitforge.shards.options import add_workers, local_folder, num_workers
from beitforge.shards.wording import counted

_SHOWN = 10
HELP = "adopt existing WebDataset tars in place: write an index beside each, and a manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder of tars."""
    parser.add_argument("shards", metavar="SHARDS", help="folder of *.tar; they are never rewritten")
    parser.add_argument("--again", action="store_true", help="decode every image again, even where an index fits")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the indexes and the manifest; say what became of every member."""
    folder = local_folder(arguments.shards)
    from beitforge.shards.pack.adopt import adopt
    from beitforge.shards.pack.pack import REJECTED

    adopted = adopt(folder, num_workers(arguments), arguments.again)
    for line in adopted.passed_over:
        print(printable(f"passed over: {line}"))
    for line in adopted.left_out.lines():
        print(printable(line))
    for name in adopted.empty:
        print(f"{name}.tar holds no sample: left out of the manifest")
    for name in adopted.bad_only:
        print(f"{name}.tar holds no image that decodes: left out of the manifest")
    for bad in adopted.bad[:_SHOWN]:
        print(printable(f"bad image: {bad['shard']} {bad['key']}: {bad['reason']}"))
    if adopted.bad:
        of_set = f", {adopted.num_bad} of them in the set" if adopted.bad_only else ""
        what = f"images that do not decode: {len(adopted.bad)}{of_set}, with reasons in {folder / REJECTED}"
        print(f"{what}; their rows are marked bad, a stream substitutes them")
    if adopted.regions:
        print(f"images with fast regions: {adopted.regions}")
    shards, tars = adopted.manifest.shards, adopted.num_tars
    print(f"{folder}: {counted(adopted.manifest.samples, 'sample')} in {counted(len(shards), 'shard')}", end="")
    print(f", {adopted.kept} of {tars} tars were indexed already" if adopted.kept else "")
    return 0
