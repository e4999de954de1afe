"""TIFF as Pillow reads it, and what Pillow leaves to others: bits of a sample, its sign, which end is white."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from beitforge.shards.decode.faults import DAMAGE, ImageError

_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _SUBSAMPLING, _SAMPLE_FORMAT = 258, 262, 277, 284, 530, 339
_WHITE_IS_ZERO, _YCBCR = 0, 6
_SIGNED, _FLOAT = 2, 3
_MOST_SAID = 1 << 14  # bytes kept of what libtiff prints about one image


def bits(image: Image.Image) -> int:
    """Bits of its widest sample."""
    return max(_values(image, _BITS, 1))


def samples(image: Image.Image) -> int:
    """Samples of a pixel, as stored."""
    return max(_values(image, _SAMPLES, len(image.getbands())))


def load(image: Image.Image) -> None:
    """Decode, and turn as its orientation says, which Pillow does for TIFF and for no other format. What libtiff prints
    on stderr, where it names no file, becomes the reason of a failure. Raises ImageError."""
    _check(image)
    said: list[str] = []
    try:
        with _captured_stderr(said):
            image.load()
    except DAMAGE as error:
        raise ImageError(
            f"does not decode: {'; '.join(said[:2]) or str(error).strip() or type(error).__name__}"
        ) from error


def upper_byte(image: Image.Image) -> np.ndarray:
    """u8 [H, W] of loaded grey of 9 to 16 bits, black 0 and white 255 whichever of them the file stores as zero."""
    depth = bits(image)
    grey = np.asarray(image).astype(np.int64) >> (depth - 8)
    if _values(image, _PHOTOMETRIC, _WHITE_IS_ZERO)[0] == _WHITE_IS_ZERO:
        grey = 255 - grey
    return grey.astype(np.uint8)


def _check(image: Image.Image) -> None:
    """Raise ImageError for samples that Pillow decodes to other values than they have."""
    depth = bits(image)
    formats = _values(image, _SAMPLE_FORMAT, 1)
    if _SIGNED in formats:
        raise ImageError(f"{depth}-bit pixels with a sign have no defined black: convert them to pixels without")
    if _FLOAT in formats or depth > 16:
        raise ImageError("32-bit pixels have no defined white: convert the image to 8 or 16 bits first")
    if image.info.get("compression") != "raw":
        return
    if depth > 8 and samples(image) > 1 and _values(image, _PLANAR, 1)[0] == 2:
        raise ImageError(
            f"{depth}-bit colours in separate planes are not read here: store them by pixel, or compress them"
        )
    if _values(image, _PHOTOMETRIC, 1)[0] == _YCBCR and tuple(_values(image, _SUBSAMPLING, 2)) not in ((1, 1), (1,)):
        raise ImageError("uncompressed YCbCr with fewer samples of chroma is not read here: store it as RGB")


def _values(image: Image.Image, tag: int, default: int) -> tuple[int, ...]:
    found = image.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    return found if isinstance(found, tuple) and found else (default if isinstance(found, tuple) else found,)


@contextmanager
def _captured_stderr(said: list[str]) -> Iterator[None]:
    """Keep what C code of this process prints on stderr; its lines are added to `said`."""
    try:
        before = os.dup(2)
    except OSError:  # closed: nothing can be printed there
        yield
        return
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(before, 2)
                file.seek(0)
                lines = file.read(_MOST_SAID).decode("utf-8", "replace").splitlines()
                said += [" ".join(line.split())[:200] for line in lines if line.strip()]
    finally:
        os.close(before)
