"""`verify SHARDS`: every digest of a shard set, and the pairing of tokens with images. `verify RUN`: every digest of a
run's checkpoints, and its logs. `verify WEIGHTS`: every digest of what `export` or an import wrote."""

import argparse
from collections.abc import Callable
from pathlib import Path

from beitforge.pipeline.errors import ConfigError
from beitforge.shards.errors import printable
from beitforge.shards.options import add_against, add_workers, local_folder, num_workers
from beitforge.shards.wording import counted

_SHOWN = 10
HELP = (
    "check every digest of an image or token shard set, and that tokens belong to their images; or of a run or weights"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, and what to hold it against."""
    what = "folder of an image or token shard set, of a run or one of its checkpoints, or of exported weights"
    parser.add_argument("folder", metavar="FOLDER", help=what)
    parser.add_argument("--images", metavar="SHARDS", help="for a token set: the image set it must belong to")
    add_against(parser)
    parser.add_argument("--decode", action="store_true", help="for an image set: also decode every image")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; exit code 2 if there is one."""
    folder = local_folder(arguments.folder)
    from beitforge.pipeline.runs.check import is_run, verify_run

    findings: list[str] = []

    def report(finding: str) -> None:
        findings.append(finding)
        print(printable(finding), flush=True)

    if is_run(folder):
        if arguments.images or arguments.decode or arguments.against:
            raise ConfigError(f"--against, --images and --decode are for shard sets, and {folder} is a run's")
        seen = verify_run(folder, print, report)
    elif (files := _check_made(folder, report)) is not None:
        seen = counted(files, "file")
    else:
        seen = _verify_set(folder, arguments, report)
    print(f"{folder}: {counted(len(findings), 'finding')} in {seen}" if findings else f"{folder}: {seen}, clean")
    return 2 if findings else 0


def _check_made(folder: Path, report: Callable[[str], None]) -> int | None:
    """How many files of weights or of a tokenizer were looked at; None where the folder holds neither."""
    from beitforge.shards.storage.staging import check_made

    return None if (folder / "manifest.json").exists() else check_made(folder, report)


def _verify_set(folder: Path, arguments: argparse.Namespace, report: Callable[[str], None]) -> str:
    """What of a shard set was looked at, in words."""
    pair = local_folder(arguments.images) if arguments.images else None
    from beitforge.shards.format.equal_images import equal_images
    from beitforge.shards.format.manifest import kind_of, unreadable
    from beitforge.shards.inspect.verify import verify_images
    from beitforge.shards.inspect.verify_tokens import verify_tokens
    from beitforge.shards.pack.pack import REJECTED

    workers = num_workers(arguments)
    if kind_of(folder) == "tokens":
        if arguments.against:
            raise ConfigError(f"--against is for image sets, and {folder} holds tokens")
        tokens = verify_tokens(folder, pair or Path(), pair is not None, workers, report)
        seen = f"{counted(tokens.samples, 'sample')} in {counted(len(tokens.shards), 'shard')}"
        missing = unreadable(tokens)
        return seen + (f", {missing} of them without tokens: `tokenize` could not read them" if missing else "")
    verified = verify_images(folder, arguments.decode, workers, report)
    for line in verified.left_out.lines():
        print(printable(line))
    for line in verified.bad[:_SHOWN]:
        print(printable(f"bad image, known since it was indexed: {line}"))
    images, bad = verified.manifest, len(verified.bad)
    for line in equal_images(folder, images, [local_folder(other) for other in arguments.against]):
        print(printable(f"equal images: {line}"))  # no finding: they are as they were packed
    seen = f"{counted(images.samples, 'sample')} in {counted(len(images.shards), 'shard')}"
    known = f", {bad} of them known not to decode since they were indexed ({folder / REJECTED} lists them)"
    return seen + (known if bad else "") + (f", {verified.regions} with fast regions" if verified.regions else "")
