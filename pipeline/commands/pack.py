"""`pack IMAGES SHARDS`: a folder of images becomes an image shard set."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from beitforge.shards.errors import printable
from beitforge.shards.options import add_workers, local_folder, num_workers
from beitforge.shards.wording import counted

if TYPE_CHECKING:
    from beitforge.shards.pack.pack import Packed

_SHOWN = 5

HELP = "pack a folder of images into WebDataset shards; if interrupted, run it again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to pack and how."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("images", metavar="IMAGES", help="folder of images, nested in any way")
    parser.add_argument("shards", metavar="SHARDS", help="folder for the shard set")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="images in a tar")
    parser.add_argument("--name", default="shard", help="tars are called NAME-000000.tar and so on")
    text = "folder: the first sub-folder is the class; auto: so if each image lies in one of at least two sub-folders, "
    text += "and no folder has a number, a date or a part of a set for a name"
    parser.add_argument("--labels", choices=("auto", "folder", "none"), default="auto", help=text)
    text = "put this share of the images into SHARDS/NAME and the rest into SHARDS/train, copies of one into the same; "
    text += "may be repeated"
    parser.add_argument("--split", action="append", default=[], metavar="NAME=FRACTION", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle and the split")
    text = "shrink the longest side to this many pixels; 0: no"
    parser.add_argument("--max-side", type=int, default=0, metavar="PIXELS", help=text)
    text = "shrink the shortest side to this many pixels; 0: no"
    parser.add_argument("--short-side", type=int, default=0, metavar="PIXELS", help=text)
    text = "of JPEG and WebP, 1 to 100, where an image is encoded again"
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help=text)
    text = "encode every image again in this format; never: only those that must change"
    parser.add_argument("--reencode", choices=("never", "jpg", "png", "webp"), default="never", help=text)
    text = "chroma of the JPEGs that are encoded again: whole (444), half (422) or a quarter (420). Photographs at "
    text += "--short-side 320: 420 takes 10%% fewer bytes than 444, is read 1.2 times as fast and loses 1 dB; with "
    text += "--quality 90 36%% fewer bytes, 1.4 times as fast, 4.7 dB less (`bench pack`)"
    parser.add_argument("--subsampling", choices=("444", "422", "420"), default="444", help=text)
    text = "take images of which 8-bit RGB holds only a part (16 bits, CMYK, transparency); else they are left out"
    parser.add_argument("--to-rgb8", action="store_true", help=text)
    text = "rewrite every JPEG without loss (by jpegtran) so that the stream decodes only the part that a crop needs: "
    text += "4 %% more bytes, 12 ms an image more to pack; progressive ones become baseline"
    parser.add_argument("--fast-regions", action="store_true", help=text)
    text = "stop after this many unusable images; for a share, 10 are always allowed"
    parser.add_argument("--max-rejected", default="1%", metavar="N|N%%", help=text)
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write SHARDS, and say what became of every image."""
    images, shards = local_folder(arguments.images), local_folder(arguments.shards)
    from beitforge.shards.pack.pack import REJECTED, pack
    from beitforge.shards.pack.plan import options_of

    packed = pack(images, shards, options_of(arguments), arguments.max_rejected, num_workers(arguments))
    for line in _told(packed, shards / REJECTED):
        print(printable(line))
    return 0


def _told(packed: "Packed", listed: Path) -> Iterator[str]:
    """What became of every file, and of the classes. listed: where what was left out is named."""
    from beitforge.shards.pack.listing.image_files import shown
    from beitforge.shards.pack.plan import FIRST_FORMAT

    plan, files = packed.plan, packed.plan.files
    if plan.format == FIRST_FORMAT:
        yield "begun by an earlier version, and ended by its rules: images by their extension, splits by name alone"
    else:
        yield f"labels: {plan.why_labels}"
    if files.others:
        yield f"files passed over, no images: {sum(one.files for one in files.others)} ({shown(files.others)})"
    if files.links:
        some = ", ".join(f"{link} → {taken}" for link, taken in files.links[:_SHOWN])
        yield f"links left out, what they lead to is taken already: {len(files.links)} ({some}{_more(files.links)})"
    if files.bare and plan.classes:
        some = ", ".join(files.bare[:_SHOWN]) + _more(files.bare)
        yield f"folders without an image, which are no classes: {len(files.bare)} ({some})"
    if packed.rejected:
        yield f"images that cannot be used: {len(packed.rejected)}, with reasons in {listed}"
    if packed.emptied:
        some = ", ".join(packed.emptied[:_SHOWN]) + _more(packed.emptied)
        yield f"classes none of whose images can be used, which keep their numbers: {len(packed.emptied)} ({some})"
    if packed.conversions:
        yield "converted: " + ", ".join(f"{kind} {count}" for kind, count in packed.conversions.items())
    for split, manifest in packed.manifests.items():
        size = manifest.column("bytes").sum() / 1e6
        classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
        counts = f"{counted(manifest.samples, 'sample')} in {counted(len(manifest.shards), 'shard')}"
        yield f"{plan.folder(split)}: {counts}, {size:.1f} MB{classes}"
    yield from (f"equal images: {line}" for line in packed.equal)
    if packed.kept:
        finished = "all of them" if packed.kept == packed.shards else f"{packed.kept} of {packed.shards}"
        yield f"an earlier run had finished {finished}" + ("; nothing to do" if packed.kept == packed.shards else "")
    if packed.rejected and packed.kept == packed.shards:
        yield f"to try the images that could not be used again, pack into another folder, or delete {listed.parent}"


def _more(names: Sequence[object]) -> str:
    return ", …" if len(names) > _SHOWN else ""
