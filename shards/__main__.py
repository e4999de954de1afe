"""`python -m shards VERB`: pack, index, verify, stats, simulate. Needs neither torch nor deepspeed."""

import argparse
import io
import json
import os
import sys
from pathlib import Path

from shards.errors import ShardError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_pack(verbs)
    index = verbs.add_parser("index", help="adopt foreign WebDataset tars in place: an index beside each, a manifest")
    index.add_argument("shards", type=Path, metavar="SHARDS", help="folder of *.tar; they are never rewritten")
    _add_workers(index)
    verify = verbs.add_parser("verify", help="check every digest of an image or token shard set, and their pairing")
    verify.add_argument("shards", type=Path, metavar="SHARDS", help="folder of an image or token shard set")
    verify.add_argument("--images", type=Path, help="for a token set: the image set it must belong to")
    verify.add_argument("--decode", action="store_true", help="for an image set: decode every picture as well")
    _add_workers(verify)
    stats = verbs.add_parser("stats", help="counts, sizes, classes, flags; of a token set, codebook use")
    stats.add_argument("shards", type=Path, metavar="SHARDS", help="folder of an image or token shard set")
    stats.add_argument("--json", action="store_true", help="print JSON")
    _add_simulate(verbs)
    return parser


def _add_simulate(verbs: argparse._SubParsersAction) -> None:
    simulate = verbs.add_parser(
        "simulate",
        help="walk the order of a set of any size without one: mixing, bytes a node reads, cache, memory",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, text in (
        ("samples", None, "pictures in the set; digits may be grouped, as 14_200_000"),
        ("samples-per-shard", 10_000, "pictures in a tar"),
        ("bytes-per-sample", 110_000, "mean size of a picture"),
        ("ranks", 1, "processes that train"),
        ("ranks-per-node", 8, "of them on one machine"),
        ("global-batch", 2048, "train.global_batch"),
        ("epoch", 0, "that is walked"),
        ("seed", 0, "data.seed"),
        ("chunk", 64, "loader.chunk"),
        ("window", 16, "loader.window"),
        ("lanes", 256, "loader.lanes"),
    ):
        simulate.add_argument(f"--{name}", type=int, default=default, required=default is None, metavar="N", help=text)
    simulate.add_argument("--all", action="store_true", help="walk every sample, also of more than 10^8")
    simulate.add_argument("--json", action="store_true", help="print JSON")


def _add_pack(verbs: argparse._SubParsersAction) -> None:
    pack = verbs.add_parser(
        "pack",
        help="pictures in, image shard set out; killed, the same command goes on",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    pack.add_argument("images", type=Path, metavar="IMAGES", help="folder of pictures, nested as they are")
    pack.add_argument("shards", type=Path, metavar="SHARDS", help="folder for the shard set")
    pack.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="pictures in a tar")
    pack.add_argument("--name", default="shard", help="tars are called NAME-000000.tar and so on")
    pack.add_argument(
        "--labels",
        choices=("auto", "folder", "none"),
        default="auto",
        help="folder: the first sub-folder is the class; auto: so if all pictures lie in sub-folders, at least two",
    )
    pack.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FRACTION",
        help="that share of the pictures goes to SHARDS/NAME and the rest to SHARDS/train; may be repeated",
    )
    pack.add_argument("--seed", type=int, default=0, help="of the shuffle and the split")
    pack.add_argument(
        "--max-side", type=int, default=0, metavar="PIXELS", help="shrink the longest side to this; 0: no"
    )
    pack.add_argument(
        "--short-side", type=int, default=0, metavar="PIXELS", help="shrink the shortest side to this; 0: no"
    )
    pack.add_argument("--quality", type=int, default=95, help="of JPEG and WebP where a picture is encoded anew")
    pack.add_argument(
        "--reencode",
        choices=("never", "jpg", "png", "webp"),
        default="never",
        help="encode every picture anew in this format; never: only those that must change",
    )
    pack.add_argument(
        "--max-rejected",
        default="1%",
        metavar="N|N%",
        help="stop past so many unusable pictures; of a share, 10 are always allowed",
    )
    _add_workers(pack)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cpus, metavar="N", help="processes; by default one per CPU")


def _workers(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise ShardError(f"--workers is {arguments.workers}, it must be at least 1")
    return arguments.workers


def _splits(texts: list[str]) -> tuple[tuple[str, float], ...]:
    splits = []
    for text in texts:
        name, _, fraction = text.partition("=")
        try:
            splits.append((name, float(fraction)))
        except ValueError as error:
            raise ShardError(f"--split is {text!r}, it must be NAME=FRACTION such as val=0.02") from error
    return tuple(splits)


def _pack(arguments: argparse.Namespace) -> int:
    from shards.pack.encode import EncodeOptions
    from shards.pack.pack import REJECTED, pack
    from shards.pack.plan import PackOptions

    options = PackOptions(
        name=arguments.name,
        samples_per_shard=arguments.samples_per_shard,
        labels=arguments.labels,
        splits=_splits(arguments.split),
        seed=arguments.seed,
        picture=EncodeOptions(
            max_side=arguments.max_side,
            short_side=arguments.short_side,
            quality=arguments.quality,
            reencode=arguments.reencode,
        ),
    )
    packed = pack(arguments.images, arguments.shards, options, arguments.max_rejected, _workers(arguments))
    if packed.plan.pictures.others:
        print(f"files passed over, no pictures by their extension: {packed.plan.pictures.others}")
    if packed.rejected:
        print(f"pictures that cannot be used: {len(packed.rejected)}, with reasons in {arguments.shards / REJECTED}")
    for split, manifest in packed.manifests.items():
        size = sum(shard.bytes for shard in manifest.shards) / 1e6
        classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
        folder = packed.plan.folder(split)
        print(f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards, {size:.1f} MB{classes}")
    if packed.kept:
        finished = "all of them" if packed.kept == packed.shards else f"{packed.kept} of {packed.shards}"
        print(f"an earlier run had finished {finished}" + ("; nothing to do" if packed.kept == packed.shards else ""))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from shards.pack.adopt import adopt

    adopted = adopt(arguments.shards, _workers(arguments))
    shards = adopted.manifest.shards
    for name in adopted.empty:
        print(f"{name}.tar holds no sample: left out of the manifest")
    if adopted.num_bad:
        print(f"pictures that do not decode: {adopted.num_bad}; their rows are marked bad, a stream substitutes them")
    print(f"{arguments.shards}: {adopted.manifest.samples} samples in {len(shards)} shards", end="")
    print(f", {adopted.kept} of {len(shards) + len(adopted.empty)} tars were indexed already" if adopted.kept else "")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from shards.format.manifest import kind_of
    from shards.inspect.verify import verify_images
    from shards.inspect.verify_tokens import verify_tokens

    findings: list[str] = []

    def report(finding: str) -> None:
        findings.append(finding)
        print(finding, flush=True)

    workers = _workers(arguments)
    if kind_of(arguments.shards) == "tokens":
        paired = arguments.images is not None
        tokens = verify_tokens(arguments.shards, arguments.images or Path(), paired, workers, report)
        seen = f"{tokens.samples} samples in {len(tokens.shards)} shards"
    else:
        images = verify_images(arguments.shards, arguments.decode, workers, report)
        seen = f"{images.samples} samples in {len(images.shards)} shards"
    print(
        f"{arguments.shards}: {len(findings)} findings in {seen}" if findings else f"{arguments.shards}: {seen}, clean"
    )
    return 2 if findings else 0


def _stats(arguments: argparse.Namespace) -> int:
    from shards.format.manifest import kind_of
    from shards.inspect.stats import image_stats, table, token_stats

    stats = (token_stats if kind_of(arguments.shards) == "tokens" else image_stats)(arguments.shards)
    print(json.dumps(stats, indent=1) if arguments.json else table(stats))
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from shards.inspect.simulate import Simulated, simulate
    from shards.inspect.stats import table
    from shards.stream.order import OrderPolicy

    policy = {name: getattr(arguments, name) for name in ("seed", "chunk", "window", "lanes")}
    if min(policy["chunk"], policy["window"], policy["lanes"]) < 1:
        raise ShardError("--chunk, --window and --lanes must be at least 1")
    names = ("samples", "samples_per_shard", "bytes_per_sample", "ranks", "ranks_per_node", "global_batch", "epoch")
    asked = Simulated(**{name: getattr(arguments, name) for name in names}, order=OrderPolicy(**policy))
    found = simulate(asked, arguments.all)
    print(json.dumps(found, indent=1) if arguments.json else table(found))
    return 0


def parsed(words: list[str]) -> argparse.Namespace:
    """A command line as it will be taken; a wrong one ends the process with argparse's usage and code 2."""
    return _parser().parse_args(words)


def main(words: list[str]) -> int:
    """Run one verb; the exit code. What a user or a disk can cause is one line on stderr and code 2."""
    for word in (word for word in words if "://" in word):
        print(f"error: {word} is a URL: this verb reads folders of this machine alone", file=sys.stderr)
        return 2
    arguments = parsed(words)
    verb = {"pack": _pack, "index": _index, "verify": _verify, "stats": _stats, "simulate": _simulate}[arguments.verb]
    try:
        return verb(arguments)
    except (ShardError, OSError) as error:
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    sys.exit(main(sys.argv[1:]))
