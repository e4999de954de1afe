"""Bytes to pixels and back: all that Pillow does here; shards.decode.jpeg has faster ways to the same pixels of a JPEG.

Pixels are uint8 [H, W, 3] RGB. Everyone who decodes an image decodes it here, so tokenizer and encoder see the same
values. What is not in the pixels is ignored: EXIF turns (packing applies them once), alpha (dropped, as
`convert("RGB")` does, not composited), colour profiles, every frame but the first.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from beitforge.shards.decode import conversions, extras, jpeg, jpeg_faults, regions, tiff
from beitforge.shards.decode.faults import DAMAGE, MAX_PIXELS, ImageError
from beitforge.shards.decode.kinds import HEAD_BYTES, kind_of
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import (
    FLAG_ANIMATED,
    FLAG_JPEG,
    FLAG_NOT_RGB,
    FLAG_PNG,
    FLAG_PROGRESSIVE,
    FLAG_REGIONS,
    FLAG_ROTATED,
    FLAG_WEBP,
)
from beitforge.shards.format.levels import tone_table

SUBSAMPLINGS = ("444", "422", "420")  # of JPEG's chroma, by Pillow's numbers

_REGION_SHARE = 0.9  # of an image; a larger crop is cut from the whole

# What a set may hold, by Pillow's plug-in for it, and no others: some of Pillow's run programs (EPS) or read what is no
# image. Packing reads those of `extras`, too.
_HELD = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
_READ_BY_PACK = ("avif", "heic", "jxl")
_ORIENTATION = 0x0112
# Pillow reads a PNG to its end to look for EXIF; one that holds none of these has none.
_PNG_EXIF_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")


@dataclass(frozen=True)
class Header:
    """What an image says of itself. Width and height are in pixels as decoded, before any turn still to apply.

    `format` is jpg, png, webp, or Pillow's name in lower case; `flags` are FLAG_* of shards.format.index; `orientation`
    is that turn, EXIF's 1-8; `bits` is 8, or the file's number where `decode` keeps the upper 8 of them.
    """

    format: str
    width: int
    height: int
    flags: int
    orientation: int
    bits: int


@dataclass(frozen=True)
class Source:
    """An image on its way into a set: its bytes, its header, its pixels u8 [H, W, 3], and by name what those have lost
    (`conversions.losses`) and left aside (`conversions.left_aside`)."""

    data: bytes
    header: Header
    pixels: np.ndarray
    losses: tuple[str, ...]
    left_aside: tuple[str, ...]


@contextmanager
def _opened(data: bytes, max_pixels: int, kind: str) -> Iterator[Image.Image]:
    """Open an image, refuse a bomb before any pixel is decoded, and turn every parser's complaint into ImageError.

    Sets two process-wide things, because Pillow offers no narrower way: its own bomb check is off (ours replaces it),
    and its warnings about odd metadata, which never change pixels, are silent.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    name = _HELD.get(kind) or extras.open_format(kind)
    try:
        _check_pixels(extras.size_before_opening(kind, data), max_pixels)
        with Image.open(io.BytesIO(data), formats=(name,)) as image:
            _check_pixels(image.size, max_pixels)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"a {kind.upper()} image whose header is damaged, or of a layout that is not read here"
        ) from error
    except DAMAGE as error:
        raise ImageError(f"does not decode: {str(error).strip() or type(error).__name__}") from error


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"{size[0]}x{size[1]} is more than {max_pixels} pixels (a decompression bomb?)")


def _kind(data: bytes, pack: bool) -> str:
    """The kind of an image that is read here. Raises ImageError for any other file."""
    if not data:
        raise ImageError("the file is empty (zero bytes)")
    kind = kind_of(data[:HEAD_BYTES])
    if kind in _HELD or (pack and kind in _READ_BY_PACK):
        return kind
    if kind in _READ_BY_PACK:
        raise ImageError(f"an image in a format that sets do not hold ({kind}): `pack` makes JPEG or PNG of it")
    held = "JPEG, PNG, WebP, GIF, BMP, TIFF" + (", AVIF, HEIC, JPEG XL" if pack else "")
    raise ImageError(f"not an image that is read here ({held}), {f'but {kind}' if kind else 'or damaged'}")


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF's orientation, 1 (upright) when there is none or the EXIF block is damaged: its pixels are still good."""
    if image.format == "PNG" and "exif" not in image.info and not any(mark in data for mark in _PNG_EXIF_MARKS):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except DAMAGE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _header(image: Image.Image, data: bytes) -> Header:
    """Of a loaded image: loading may change what it says of itself, as a TIFF's turn."""
    kind = {"JPEG": "jpg", "MPO": "jpg"}.get(image.format or "", (image.format or "").lower())
    flags = {"jpg": FLAG_JPEG, "png": FLAG_PNG, "webp": FLAG_WEBP}.get(kind, 0)
    bits = _bits(image, data)
    orientation = 1 if kind == "tiff" else _orientation(image, data)
    if image.format in ("AVIF", "HEIF", "JXL"):
        orientation = extras.orientation(image, data, orientation)
    # An MPO is a JPEG followed by others (a preview, the other eye); every JPEG decoder reads the first and stops.
    animated = image.format != "MPO" and getattr(image, "is_animated", False)
    for flag, holds in (
        (FLAG_PROGRESSIVE, bool(image.info.get("progressive"))),
        (FLAG_NOT_RGB, image.mode != "RGB" or bits != 8),
        (FLAG_ROTATED, orientation != 1),
        (FLAG_ANIMATED, animated),
        (FLAG_REGIONS, kind == "jpg" and regions.fits(data)),
    ):
        flags |= flag if holds else 0
    return Header(kind, image.width, image.height, flags, orientation, bits)


def _bits(image: Image.Image, data: bytes) -> int:
    if image.format in ("AVIF", "HEIF", "JXL"):
        return max(8, extras.bits(image, data))
    if image.format == "TIFF":
        return max(8, tiff.bits(image))
    return 16 if image.format == "PNG" and data[24:25] == b"\x10" else 8


def _pixels(image: Image.Image) -> np.ndarray:
    """Decode. Grey of more than 8 bits keeps the upper 8, as Pillow does for colour; its own convert clips."""
    if image.format == "TIFF":
        tiff.load(image)
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        deep = np.asarray(image).astype(np.int64) >> 8
        grey = tiff.upper_byte(image) if image.format == "TIFF" else deep.astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ImageError("32-bit pixels have no defined white: convert the image to 8 or 16 bits first")
    return np.array(image if image.mode == "RGB" else _straight(image).convert("RGB"))


def _straight(image: Image.Image) -> Image.Image:
    """With alpha that is not multiplied in, which Pillow drops from LA alone."""
    return image.convert("LA") if image.mode == "La" else image


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """What the image says of itself, without decoding it. Raises ImageError: empty, no image, too large."""
    with _opened(data, max_pixels, _kind(data, pack=False)) as image:
        return _header(image, data)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3] RGB, as stored (EXIF turn not applied), writable. Raises ImageError: read_header's, damaged."""
    with _opened(data, max_pixels, _kind(data, pack=False)) as image:
        return _pixels(image)


def decode_view(data: bytes, box: list[int], size: tuple[int, int], flags: int, decoder: str = "auto") -> np.ndarray:
    """uint8 [height, width, 3]: `decode` cut to a box x, y, width, height, by the decoder of that name (jpeg.DECODERS),
    which may decode no more than it needs. size (width, height) and flags: the image's in its index.

    Raises ImageError as `decode` does, ShardError when the box leaves the image.
    """
    check_box(box, size)
    fast = jpeg.decoder(decoder)
    exact = fast if is_plain_jpeg(flags) else jpeg.decoder("auto")  # grey is approximated by no decoder
    small = box[2] * box[3] < _REGION_SHARE * size[0] * size[1]
    if flags & FLAG_REGIONS and small and (found := _spliced(data, box, size, exact)) is not None:
        return found
    # nvImageCodec 0.9 does not smooth the chroma of a single column
    if fast.region and is_plain_jpeg(flags) and small and box[2] > 1:
        found = fast.region(data, box)
        if found is not None and found.shape == (box[3], box[2], 3):
            return found
    return crop(decode_whole(data, flags, decoder), box)


def _spliced(data: bytes, box: list[int], size: tuple[int, int], fast: jpeg.JpegDecoder) -> np.ndarray | None:
    """A box of an image with fast regions; None where that cannot be had from its MCUs alone."""
    part = regions.splice(data, box, size)
    if part is None:
        return None
    found, x, y = part
    pixels = fast.whole(bytes(found)) if fast.whole else None
    if pixels is None or pixels.ndim != 3:
        return None
    cut = pixels[y : y + box[3], x : x + box[2]]
    return cut if cut.shape == (box[3], box[2], 3) else None


def decode_whole(data: bytes, flags: int, decoder: str = "auto") -> np.ndarray:
    """`decode` by the decoder of that name."""
    fast = jpeg.decoder(decoder)
    found = fast.whole(data) if fast.whole and is_plain_jpeg(flags) else None
    return decode(data) if found is None else found


def is_plain_jpeg(flags: int) -> bool:
    """Whether an image of these flags is a JPEG that decoders other than Pillow may be given."""
    return bool(flags & FLAG_JPEG) and not flags & FLAG_NOT_RGB


def read_image(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Header, np.ndarray]:
    """`read_header` and `decode` of an image that is in a set: a JPEG whose pixels are damaged is refused, too, though
    it decodes to something."""
    with _opened(data, max_pixels, _kind(data, pack=False)) as image:
        found = _sound(image, data)
        pixels = _pixels(image) if found is None else found
        header = _header(image, data)
        if found is None and header.format == "jpg" and (fault := jpeg_faults.cleaned(data)[0]):
            raise ImageError(f"is damaged: {fault}")
        return header, pixels


def read_source(data: bytes, max_pixels: int = MAX_PIXELS) -> Source:
    """`read_image` of a file to pack, which may be AVIF, HEIC or JPEG XL as well. A JPEG of which libjpeg warns though
    its pixels are whole is given without what it warns of, so that every decoder takes it.

    Raises ImageError as read_image does, and where a format needs a package that is not installed.
    """
    kind = _kind(data, pack=True)
    try:
        source, sound = _source(data, max_pixels, kind)
        fault, better = ("", data) if sound or kind != "jpeg" else jpeg_faults.cleaned(data)
    except ImageError:
        fault, better = jpeg_faults.cleaned(data) if kind == "jpeg" else ("", data)
        if fault or better is data:
            raise
        source, _ = _source(better, max_pixels, kind)
    if better is not data and not fault:
        found, _ = _source(better, max_pixels, kind)
        fault = "" if np.array_equal(found.pixels, source.pixels) else "decoders do not agree on its pixels"
        source = replace(found, left_aside=(*found.left_aside, conversions.CLEANED))
    if fault:
        raise ImageError(f"is damaged: {fault}")
    return source


def _source(data: bytes, max_pixels: int, kind: str) -> tuple[Source, bool]:
    """The image, and whether it is a JPEG that is known to be sound."""
    with _opened(data, max_pixels, kind) as image:
        found = _sound(image, data)
        pixels = _pixels(image) if found is None else found
        header = _header(image, data)
        lost = conversions.losses(image, header.bits)
        return Source(data, header, pixels, lost, conversions.left_aside(image, data)), found is not None


def _sound(image: Image.Image, data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG against which libjpeg has nothing to say, by one decoding that asks it; None of any other,
    and where no such decoder gives Pillow's pixels. The image is open, and stays unloaded."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        jpeg.decoder("simplejpeg")
    except ShardError:
        return None
    found = jpeg_faults.sound(data)
    return found if found is not None and found.shape == (image.height, image.width, 3) else None


def greys(pixels: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """Mean grey and tone table (shards.format.levels) of uint8 [H, W, 3]. The mean is that of ITU-R 601's luma (0-255)
    as Pillow's convert("L") rounds it for each pixel."""
    image = _image(pixels, shared=True)
    grey = np.asarray(image.convert("L"))
    mean = int(grey.sum(axis=1, dtype=np.uint32).sum(dtype=np.uint64)) / grey.size
    return mean, tone_table(image.histogram()[: 3 * 256])


def _image(pixels: np.ndarray, shared: bool = False) -> Image.Image:
    """Of uint8 [H, W, 3] an RGB image; or, if its memory may be shared and these are three of four bytes, RGBX."""
    height, width, _ = pixels.shape
    whole = pixels.base
    if isinstance(whole, np.ndarray) and whole.flags.c_contiguous:
        same = whole.ctypes.data == pixels.ctypes.data and whole.strides == pixels.strides
        if same and whole.shape == (height, width, 4):
            if shared:
                return Image.frombuffer("RGBX", (width, height), whole, "raw", "RGBX", 0, 1)
            return Image.frombytes("RGB", (width, height), whole, "raw", "RGBX", 0, 1)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _resample(name: str) -> Image.Resampling:
    assert name in ("bicubic", "lanczos"), f"resample is bicubic or lanczos, not {name}"
    return Image.Resampling.BICUBIC if name == "bicubic" else Image.Resampling.LANCZOS


def resize(pixels: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [h, w, 3], size = (h, w); Pillow's antialiased 'bicubic' or 'lanczos'."""
    image = _image(pixels)
    return np.array(image.resize((size[1], size[0]), _resample(resample)))


def crop(pixels: np.ndarray, box: list[int]) -> np.ndarray:
    """The part of u8 [H, W, 3] in a box x, y, width, height; not copied. Raises ShardError when the box leaves it."""
    check_box(box, (pixels.shape[1], pixels.shape[0]))
    x, y, width, height = box
    return pixels[y : y + height, x : x + width]


def check_box(box: list[int], size: tuple[int, int]) -> None:
    """Raise ShardError when a box x, y, width, height leaves an image of size (width, height)."""
    x, y, width, height = box
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size[0] or y + height > size[1]:
        raise ShardError(
            f"view box {tuple(box)} (x, y, width, height) leaves an image of {size[0]}x{size[1]}: view and image do "
            "not belong together; run `verify`"
        )


def encode(pixels: np.ndarray, format: str, quality: int, subsampling: str = "444") -> bytes:
    """Encode uint8 [H, W, 3] as jpg, png (lossless, `quality` unused) or webp. Raises ImageError: too large for it.

    subsampling: JPEG's chroma, one of SUBSAMPLINGS. 444 keeps it at full resolution: the image was decoded once
    already, and halving its chroma again would lose what a shrunk image still has.
    """
    file = io.BytesIO()
    image = _image(pixels)
    try:
        if format == "jpg":
            image.save(file, "JPEG", quality=quality, subsampling=SUBSAMPLINGS.index(subsampling))
        elif format == "webp":
            image.save(file, "WEBP", quality=quality, method=4)
        else:
            assert format == "png", f"format is jpg, png or webp, not {format}"
            image.save(file, "PNG")
    except (OSError, ValueError) as error:
        raise ImageError(f"{image.width}x{image.height} cannot be stored as {format}: {error}") from error
    return file.getvalue()
