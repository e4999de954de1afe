"""AVIF, HEIC and JPEG XL: what packing reads and sets do not hold. It alone knows the plug-ins for them."""

import functools
import importlib
import re

from PIL import Image, features

from beitforge.shards.decode.faults import ImageError

_HEAD = 1 << 16  # bytes in which each says how deep it is
_AV1C = re.compile(rb"av1C[\x81](.)(.)", re.DOTALL)
_CURE = "pip install '.[formats]'"


def open_format(kind: str) -> str:
    """Pillow's name of the format, after it was taught it. Raises ImageError naming what to install."""
    if reason := _missing(kind):
        raise ImageError(reason)
    return {"avif": "AVIF", "heic": "HEIF", "jxl": "JXL"}[kind]


@functools.cache
def _missing(kind: str) -> str:
    """Why a kind cannot be read here, or ""."""
    try:
        if kind == "heic":
            importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
        elif kind == "jxl":
            importlib.import_module("pillow_jxl")
        elif "avif" not in features.modules or not features.check("avif"):
            return "an AVIF image: reading it needs Pillow 11.3 or later with AVIF (pip install -U pillow)"
    except ImportError:
        name, package = {"heic": ("a HEIC", "pillow-heif"), "jxl": ("a JPEG XL", "pillow-jxl-plugin")}[kind]
        return f"{name} image: reading it needs {package} ({_CURE}, or pip install {package})"
    return ""


def bits(image: Image.Image, data: bytes) -> int:
    """Bits of a sample as the file has it, of which Pillow gives 8 (16 of grey JPEG XL)."""
    if image.format == "HEIF":
        return int(image.info.get("bit_depth") or 8)
    if image.format == "JXL":
        return JxlHeader(data).bits
    configurations = [match[2][0] for match in _AV1C.finditer(data[:_HEAD])]
    return max((8 + 2 * (byte >> 6 & 1) + 2 * (byte >> 6 & byte >> 5 & 1) for byte in configurations), default=8)


def animated(image: Image.Image, data: bytes) -> bool:
    """Whether there are frames after the first, of which the plug-in for JPEG XL says nothing."""
    return bool(getattr(image, "is_animated", False)) or (image.format == "JXL" and JxlHeader(data).animated)


def orientation(image: Image.Image, data: bytes, exif: int) -> int:
    """The turn still to apply. That of HEIC is applied by its decoder, and so is what JPEG XL's own header says; EXIF
    counts where that says nothing, and for a JPEG kept whole in JPEG XL, whose pixels are as stored."""
    if image.format == "AVIF" or getattr(image, "jpeg", False):
        return exif
    return exif if image.format == "JXL" and JxlHeader(data).orientation == 1 else 1


class JxlHeader:
    """What JPEG XL says of itself, which its plug-in decodes before it says anything (ISO/IEC 18181-1)."""

    def __init__(self, data: bytes):
        """Raises ImageError where no codestream begins."""
        stream = data if data.startswith(b"\xff\x0a") else _codestream(data[:_HEAD])
        self._bits, self._at = int.from_bytes(stream[2:66], "little"), 0
        if not stream.startswith(b"\xff\x0a"):
            raise ImageError("a JPEG XL image without a codestream in its first bytes")
        self.width, self.height = self._size()
        self.orientation, self.animated = 1, False
        self.bits = self._depth()

    def _take(self, count: int) -> int:
        found = self._bits >> self._at & ((1 << count) - 1)
        self._at += count
        return found

    def _size(self) -> tuple[int, int]:
        small = self._take(1)

        def side() -> int:
            return 8 * (1 + self._take(5)) if small else 1 + self._take((9, 13, 18, 30)[self._take(2)])

        height = side()
        over, under = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[self._take(3)]
        return (height * over // under if over else side()), height

    def _depth(self) -> int:
        if self._take(1):  # all as by default
            return 8
        if self._take(1):
            self.orientation = 1 + self._take(3)
            if self._take(1):
                self._size()
            preview, self.animated = self._take(1), bool(self._take(1))
            if preview or self.animated:  # what follows is no longer at a fixed place
                return 8
        if self._take(1):  # floats
            return 32
        choice = self._take(2)
        return (8, 10, 12)[choice] if choice < 3 else 1 + self._take(6)


def _codestream(head: bytes) -> bytes:
    """The codestream's first bytes out of a container's boxes."""
    at = 0
    while at + 8 <= len(head):
        size, name = int.from_bytes(head[at : at + 4], "big"), head[at + 4 : at + 8]
        if name in (b"jxlc", b"jxlp"):
            return head[at + (8 if name == b"jxlc" else 12) :]
        if size < 8:
            break
        at += size
    return b""


def size_before_opening(kind: str, data: bytes) -> tuple[int, int]:
    """Width and height of an image that opening decodes, JPEG XL; of any other (0, 0)."""
    if kind != "jxl":
        return 0, 0
    header = JxlHeader(data)
    return header.width, header.height
