"""What an image loses on its way to uint8 RGB: depth, channels, transparency, colours that its numbers do not say.

Palettes, greyscale and fewer than 8 bits lose nothing, and are not named; nor is what is a tag and no more: a colour
profile whose pixels are sRGB's within rounding.
"""

import functools
import io
import re

import numpy as np
from PIL import Image, ImageCms

from beitforge.shards.decode import extras, tiff
from beitforge.shards.decode.faults import DAMAGE

CMYK = "CMYK to RGB"
TRANSPARENCY = "transparency dropped"
BANDS = "extra bands dropped"
PROFILE = "colour profile left aside"
GAMMA = "gamma left aside"
LAB = "Lab to RGB"
FRAMES = "frames after the first left out"
CLEANED = "JPEG cleaned, pixels unchanged"

_SRGB_GAMMA, _GAMMA_ROUNDING = 0.45455, 0.005  # of PNG's gAMA
_ROUNDING = 4  # levels of 255 by which profiles called sRGB differ
_HEAD = 1 << 16  # bytes in which AVIF and HEIC say what they hold
_NCLX = re.compile(rb"colrnclx(..)(..)", re.DOTALL)
_SRGB_PRIMARIES, _SRGB_TRANSFERS = (1, 2), (1, 2, 6, 13)  # ITU-T H.273; 2: not said


def depth(bits: int) -> str:
    """The name of a loss of depth."""
    return f"{bits}-bit to 8-bit"


def losses(image: Image.Image, bits: int) -> tuple[str, ...]:
    """Names of the depth and the channels that a loaded image loses; transparency counts where a pixel has some."""
    found = [depth(bits)] if bits > 8 else []
    if image.mode == "CMYK":
        found.append(CMYK)
    if image.format == "TIFF" and tiff.samples(image) > len(image.getbands()):
        found.append(BANDS)
    if _transparent(image):
        found.append(TRANSPARENCY)
    return tuple(found)


def left_aside(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """Names of what a loaded image says that its pixels as uint8 RGB do not, depth and channels apart."""
    found = [LAB] if image.mode == "LAB" else []
    profile = image.info.get("icc_profile")
    if profile:
        found += [] if is_srgb(bytes(profile)) else [PROFILE]
    elif image.format in ("AVIF", "HEIF"):
        found += [] if _nclx_is_srgb(data[:_HEAD]) else [PROFILE]
    elif image.format == "PNG" and "srgb" not in image.info:
        gamma = image.info.get("gamma") or _SRGB_GAMMA
        found += [GAMMA] if abs(gamma - _SRGB_GAMMA) > _GAMMA_ROUNDING else []
    if image.format != "MPO" and extras.animated(image, data):
        found.append(FRAMES)
    return tuple(found)


def _transparent(image: Image.Image) -> bool:
    bands = image.getbands()
    if bands[-1] in ("A", "a"):
        return image.getchannel(len(bands) - 1).getextrema()[0] < 255  # type: ignore[operator]
    key = image.info.get("transparency")
    if key is None:
        return False
    if image.mode.startswith("I"):
        return bool((np.asarray(image) == key).any())
    try:
        return image.convert("RGBA").getchannel("A").getextrema()[0] < 255  # type: ignore[operator]
    except DAMAGE:  # a key that no colour of this image can have
        return False


@functools.lru_cache(maxsize=16)
def is_srgb(profile: bytes) -> bool:
    """Whether pixels mean the same by this ICC profile as in sRGB, to within `_ROUNDING` levels. One that cannot be
    read does not."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L"}[theirs.profile.xcolor_space.strip()]
        steps = np.arange(0, 256, 17, np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        grey = steps.reshape(1, -1)
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        change = ImageCms.buildTransform(theirs, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
        changed = ImageCms.applyTransform(Image.fromarray(grid if mode == "RGB" else grey), change)
    except (*DAMAGE, KeyError, ImportError, ImageCms.PyCMSError):
        return False
    same = grid if mode == "RGB" else np.repeat(grey[..., None], 3, axis=2)
    return int(np.abs(np.asarray(changed).astype(np.int64) - same).max()) <= _ROUNDING


def _nclx_is_srgb(head: bytes) -> bool:
    """By the code points of the first `colr` box (ISO 14496-12, 12.1.5); where there is none, sRGB is meant."""
    match = _NCLX.search(head)
    if not match:
        return True
    primaries, transfer = (int.from_bytes(match[i], "big") for i in (1, 2))
    return primaries in _SRGB_PRIMARIES and transfer in _SRGB_TRANSFERS
