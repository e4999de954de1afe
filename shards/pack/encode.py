"""An image file as it goes into a tar: its own bytes where they will do, encoded anew where they will not."""

import errno
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards.decode import codec
from beitforge.shards.decode.codec import Header, ImageError
from beitforge.shards.decode.jpegtran import with_fast_regions
from beitforge.shards.format.index import FLAG_ANIMATED
from beitforge.shards.pack.listing.image_files import RAW_EXTENSIONS
from beitforge.shards.pack.tar_scan import IMAGE_EXTENSIONS, Facts, facts_of

_MAX_FILE_BYTES = 2**30
# The file's own fault; any other error is the disk's, and leaving images out would hide it.
_THIS_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What packing does to an image. Sides are in pixels, 0: no limit; an image is never enlarged.

    `max_side` bounds the longest side, `short_side` the shortest; with both, the smaller result. `reencode` is never,
    or the format (jpg, png, webp) every image is encoded in anew. `quality` is JPEG's and WebP's, 1-100. `to_rgb8`
    takes images that lose depth or channels as 8-bit RGB. `subsampling` is the chroma's of JPEGs that are encoded anew.
    `fast_regions` rewrites every JPEG as shards.decode.jpegtran does.
    """

    max_side: int = 0
    short_side: int = 0
    quality: int = 95
    reencode: str = "never"
    to_rgb8: bool = False
    subsampling: str = "444"
    fast_regions: bool = False


@dataclass(frozen=True)
class Prepared:
    """The bytes to store, the extension that names their format, their facts for the index, and by name what became of
    the image on the way (`codec.Source`, and how it was encoded again)."""

    data: bytes
    extension: str
    facts: Facts
    conversions: tuple[str, ...]


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises ImageError when this file cannot be read; OSError when the disk fails."""
    if path.suffix.lower() in RAW_EXTENSIONS:
        raise ImageError(
            "is what a camera's sensor gave, of which only a preview would be read: develop it, to TIFF say"
        )
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise ImageError(f"the file has {size} bytes, more than the {_MAX_FILE_BYTES} an image may have")
        return path.read_bytes()
    except OSError as error:
        if error.errno not in _THIS_FILE:
            raise
        raise ImageError(f"the file cannot be read ({error.strerror})") from error


def encode(data: bytes, options: EncodeOptions) -> Prepared:
    """`encode_pixels`, and then with fast regions where `options` ask for them."""
    prepared = encode_pixels(data, options)
    if not options.fast_regions:
        return prepared
    stored, header, kind = with_fast_regions(prepared.data, codec.read_header(prepared.data))
    facts = replace(prepared.facts, xxh3=xxhash.xxh3_64_intdigest(stored), flags=header.flags)
    return Prepared(stored, prepared.extension, facts, (*prepared.conversions, kind))


def encode_pixels(data: bytes, options: EncodeOptions) -> Prepared:
    """Bytes of an image file to bytes for the tar. Raises ImageError when it cannot be used, or would lose depth or
    channels that `options` do not give up.

    The bytes stay as they are if they are 8-bit JPEG, PNG or WebP with one frame, upright, within the side limits.
    Otherwise the image is turned upright, shrunk (Lanczos), and stored without metadata: JPEG as JPEG and lossy
    WebP as WebP at `quality`, all else as PNG, so that what had no loss gets none.
    """
    source = codec.read_source(data)
    data, header, pixels = source.data, source.header, source.pixels
    if source.losses and not options.to_rgb8:
        raise ImageError(f"8-bit RGB would not hold all of it ({', '.join(source.losses)}): allow that with --to-rgb8")
    named = (*source.losses, *source.left_aside)
    upright = _turn(pixels, header.orientation)
    size = shrunk_size(upright.shape[1], upright.shape[0], options)
    if _may_stay(header, options) and size == (upright.shape[1], upright.shape[0]):
        return Prepared(data, header.format, facts_of(xxhash.xxh3_64_intdigest(data), header, pixels), named)
    if size != (upright.shape[1], upright.shape[0]):
        upright = codec.resize(upright, (size[1], size[0]), "lanczos")
    extension = _new_format(data, header, options)
    stored = codec.encode(upright, extension, options.quality, options.subsampling)
    again = f"{header.format} encoded again as {extension}"
    return Prepared(stored, extension, _facts_of_stored(stored, extension, upright), (*named, again))


def _facts_of_stored(stored: bytes, extension: str, pixels: np.ndarray) -> Facts:
    """Of an image encoded from `pixels`, which lossy formats change."""
    header, pixels = (codec.read_header(stored), pixels) if extension == "png" else codec.read_image(stored)
    return facts_of(xxhash.xxh3_64_intdigest(stored), header, pixels)


def _may_stay(header: Header, options: EncodeOptions) -> bool:
    plain = header.format in IMAGE_EXTENSIONS and header.bits == 8 and header.orientation == 1
    return plain and not header.flags & FLAG_ANIMATED and options.reencode == "never"


def _new_format(data: bytes, header: Header, options: EncodeOptions) -> str:
    if options.reencode != "never":
        return options.reencode
    lossy_webp = header.format == "webp" and b"VP8L" not in data
    return header.format if header.format == "jpg" or lossy_webp else "png"


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF's orientation 1-8 (TIFF 6.0, tag 274): the stored row 0 and column 0 go where the tag says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def shrunk_size(width: int, height: int, options: EncodeOptions) -> tuple[int, int]:
    """Width and height within the side limits, aspect kept (rounded to whole pixels, at least 1), never larger."""
    limits = []
    if options.max_side:
        limits.append((options.max_side, max(width, height)))
    if options.short_side:
        limits.append((options.short_side, min(width, height)))
    new, old = min(limits, key=lambda limit: limit[0] / limit[1], default=(1, 1))
    if new >= old:
        return width, height
    return max(1, (2 * width * new + old) // (2 * old)), max(1, (2 * height * new + old) // (2 * old))
