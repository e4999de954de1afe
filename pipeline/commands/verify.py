"""`verify SHARDS`: every digest of a shard set, and the pairing of tokens with images. `verify RUN`: every digest of a
run's checkpoints, and its logs."""

import argparse
from collections.abc import Callable
from pathlib import Path

from beitforge.pipeline.errors import ConfigError
from beitforge.shards.options import add_workers, local_folder, num_workers
from beitforge.shards.wording import counted

_SHOWN = 10
HELP = "check every digest of an image or token shard set, and that tokens belong to their images; or of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, and what to hold it against."""
    what = "folder of an image or token shard set, of a run, or of one of its checkpoints"
    parser.add_argument("folder", metavar="FOLDER", help=what)
    parser.add_argument("--images", metavar="SHARDS", help="for a token set: the image set it must belong to")
    parser.add_argument("--decode", action="store_true", help="for an image set: also decode every image")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; exit code 2 if there is one."""
    folder = local_folder(arguments.folder)
    from beitforge.pipeline.runs.check import is_run, verify_run

    findings: list[str] = []

    def report(finding: str) -> None:
        findings.append(finding)
        print(finding, flush=True)

    if is_run(folder):
        if arguments.images or arguments.decode:
            raise ConfigError(f"--images and --decode are for shard sets, and {folder} is a run's")
        seen = verify_run(folder, print, report)
    else:
        seen = _verify_set(folder, arguments, report)
    print(f"{folder}: {counted(len(findings), 'finding')} in {seen}" if findings else f"{folder}: {seen}, clean")
    return 2 if findings else 0


def _verify_set(folder: Path, arguments: argparse.Namespace, report: Callable[[str], None]) -> str:
    """What of a shard set was looked at, in words."""
    pair = local_folder(arguments.images) if arguments.images else None
    from beitforge.shards.format.manifest import kind_of
    from beitforge.shards.inspect.verify import verify_images
    from beitforge.shards.inspect.verify_tokens import verify_tokens
    from beitforge.shards.pack.pack import REJECTED

    workers = num_workers(arguments)
    if kind_of(folder) == "tokens":
        tokens = verify_tokens(folder, pair or Path(), pair is not None, workers, report)
        return f"{counted(tokens.samples, 'sample')} in {counted(len(tokens.shards), 'shard')}"
    verified = verify_images(folder, arguments.decode, workers, report)
    for line in verified.left_out.lines():
        print(line)
    for line in verified.bad[:_SHOWN]:
        print(f"bad image, known since it was indexed: {line}")
    images, bad = verified.manifest, len(verified.bad)
    seen = f"{counted(images.samples, 'sample')} in {counted(len(images.shards), 'shard')}"
    known = f", {bad} of them known not to decode since they were indexed ({folder / REJECTED} lists them)"
    return seen + (known if bad else "")
