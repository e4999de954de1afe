"""`verify SHARDS`: every digest of a shard set, and the pairing of tokens with images."""

import argparse
from pathlib import Path

from beitforge.shards.options import add_workers, local_folder, num_workers
from beitforge.shards.wording import counted

HELP = "check every digest of an image or token shard set, and that tokens belong to their images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, and what to hold it against."""
    parser.add_argument("shards", metavar="SHARDS", help="folder of an image or token shard set")
    parser.add_argument("--images", metavar="SHARDS", help="for a token set: the image set it must belong to")
    parser.add_argument("--decode", action="store_true", help="for an image set: also decode every image")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; exit code 2 if there is one."""
    folder = local_folder(arguments.shards)
    pair = local_folder(arguments.images) if arguments.images else None
    from beitforge.shards.format.manifest import kind_of
    from beitforge.shards.inspect.verify import verify_images
    from beitforge.shards.inspect.verify_tokens import verify_tokens

    findings: list[str] = []

    def report(finding: str) -> None:
        findings.append(finding)
        print(finding, flush=True)

    workers = num_workers(arguments)
    if kind_of(folder) == "tokens":
        tokens = verify_tokens(folder, pair or Path(), pair is not None, workers, report)
        seen = f"{counted(tokens.samples, 'sample')} in {counted(len(tokens.shards), 'shard')}"
    else:
        images = verify_images(folder, arguments.decode, workers, report)
        seen = f"{counted(images.samples, 'sample')} in {counted(len(images.shards), 'shard')}"
    print(f"{folder}: {counted(len(findings), 'finding')} in {seen}" if findings else f"{folder}: {seen}, clean")
    return 2 if findings else 0
