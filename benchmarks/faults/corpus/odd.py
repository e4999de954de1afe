"""Single images as accidents, scanners and mischief make them, each with what its pixels should be."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.faults.corpus.sets import saved, smooth

SIDE = 36


@dataclass(frozen=True)
class Odd:
    """`pixels`: what an accepted image must show, to a mean difference of `tolerance`; None: must not be accepted.

    `unknowable`: the bytes were damaged before anyone took their checksum, and a decoder may take them for an image.
    """

    data: bytes
    extension: str
    pixels: np.ndarray | None
    tolerance: float = 0.0
    unknowable: bool = False


def plain(rng: np.random.Generator) -> np.ndarray:
    """Some image."""
    return smooth(int(rng.integers(10**6)), SIDE, int(rng.integers(24, 40)))


def truncated_jpeg(rng: np.random.Generator) -> Odd:
    pixels = plain(rng)
    data = saved(pixels, "JPEG", quality=90, progressive=bool(rng.integers(2)))
    return Odd(data[: int(rng.integers(2, len(data)))], "jpg", pixels, 5)


def zeroed_jpeg(rng: np.random.Generator) -> Odd:
    """Zeros over some of its coded data: most decoders say nothing, some bytes later all pixels are other ones."""
    pixels = plain(rng)
    data = saved(pixels, "JPEG", quality=90)
    start = data.index(b"\xff\xda") + 14
    first = int(rng.integers(start, len(data) - 20))
    length = min(int(rng.integers(8, 400)), len(data) - 2 - first)
    return Odd(data[:first] + bytes(length) + data[first + length :], "jpg", pixels, 5, unknowable=True)


def zeroed_head(rng: np.random.Generator) -> Odd:
    """A file whose first or last blocks were never written."""
    data = saved(plain(rng), ("JPEG", "PNG", "WEBP")[int(rng.integers(3))])
    length = int(rng.integers(16, len(data) + 1))
    return Odd(bytes(length) + data[length:], "jpg", None)


def empty(rng: np.random.Generator) -> Odd:
    return Odd(b"", ("jpg", "png", "webp")[int(rng.integers(3))], None)


def mislabelled(rng: np.random.Generator) -> Odd:
    """PNG or WebP bytes named .jpg, GIF bytes named .png."""
    pixels, turn = plain(rng), int(rng.integers(3))
    if turn == 0:
        return Odd(saved(pixels, "PNG"), "jpg", pixels)
    if turn == 1:
        return Odd(saved(pixels, "WEBP", lossless=True), "jpg", pixels)
    shown = Image.fromarray(pixels).quantize(64)
    return Odd(saved(shown, "GIF"), "png", np.asarray(shown.convert("RGB")))


def cmyk_jpeg(rng: np.random.Generator) -> Odd:
    pixels = plain(rng)
    return Odd(saved(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95), "jpg", pixels, 5)


def grey(rng: np.random.Generator) -> Odd:
    shown = Image.fromarray(plain(rng)).convert("L")
    pixels = np.asarray(shown.convert("RGB"))
    if rng.integers(2):
        return Odd(saved(shown, "PNG"), "png", pixels)
    return Odd(saved(shown, "JPEG", quality=95), "jpg", pixels, 5)


def progressive_jpeg(rng: np.random.Generator) -> Odd:
    pixels = plain(rng)
    return Odd(saved(pixels, "JPEG", quality=95, progressive=True), "jpg", pixels, 5)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(rows)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def png_16_bit(rng: np.random.Generator) -> Odd:
    """Grey or colour; shown as the upper byte of each value."""
    pixels = plain(rng)[..., : 1 if rng.integers(2) else 3]
    values = (pixels.astype(np.uint16) << 8) | rng.integers(0, 256, pixels.shape).astype(np.uint16)
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = _png(width, height, 16, 0 if channels == 1 else 2, rows)
    return Odd(data, "png", np.broadcast_to(pixels, (height, width, 3)))


def animated_webp(rng: np.random.Generator) -> Odd:
    """Shown as its first frame."""
    pixels = plain(rng)
    more = [Image.fromarray(pixels[::-1].copy()), Image.fromarray(pixels[:, ::-1].copy())]
    return Odd(saved(pixels, "WEBP", save_all=True, append_images=more, lossless=True), "webp", pixels)


def bomb(rng: np.random.Generator) -> Odd:
    """A header of billions of pixels with little behind it, or a true bomb of zeros."""
    if rng.integers(2):
        return Odd(_png(60000, int(rng.integers(30000, 60000)), 8, 2, bytes(4000)), "png", None)
    data = bytearray(saved(plain(rng), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    return Odd(bytes(data), "jpg", None)


def text(rng: np.random.Generator) -> Odd:
    """A web server's apology saved as an image, or noise."""
    page = b"<!DOCTYPE html><html><title>404 Not Found</title></html>" * int(rng.integers(1, 9))
    return Odd(page if rng.integers(2) else rng.bytes(int(rng.integers(1, 3000))), "jpg", None)


ODD: tuple[tuple[str, Callable[[np.random.Generator], Odd]], ...] = (
    ("JPEG truncated", truncated_jpeg),
    ("JPEG zeroed in the middle", zeroed_jpeg),
    ("file zeroed from its start", zeroed_head),
    ("empty file", empty),
    ("mislabelled", mislabelled),
    ("CMYK JPEG", cmyk_jpeg),
    ("grey", grey),
    ("progressive JPEG", progressive_jpeg),
    ("16-bit PNG", png_16_bit),
    ("animated WebP", animated_webp),
    ("decompression bomb", bomb),
    ("text or noise named .jpg", text),
)
