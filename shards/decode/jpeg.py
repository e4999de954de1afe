"""JPEG by the fastest decoder installed, to the pixels Pillow gives. It alone knows nvImageCodec and simplejpeg.

All are libjpeg-turbo inside. nvImageCodec decodes no more than the rows and blocks a crop needs, on the CPU. A decoder
is taken only after it gave Pillow's pixels for a test image on this machine; what it will not decode, Pillow does.

Two give other pixels, and are taken by name alone: APPROXIMATE is libjpeg-turbo's fast DCT with plain upsampling of
chroma, and GPU (shards.decode.gpu) nvJPEG, whose worker processes decode as auto does what the GPU will not.
"""

import contextlib
import ctypes
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from beitforge.shards.errors import ShardError

EXACT, APPROXIMATE, GPU = ("auto", "nvimgcodec", "simplejpeg", "pillow"), "approximate", "gpu"
DECODERS = (*EXACT, APPROXIMATE, GPU)

_PACKAGES = {"nvimgcodec": ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"), "simplejpeg": ("simplejpeg",)}
_TEST_BOX = [5, 3, 41, 30]
_FAST = ":fast_idct=1 :fancy_upsampling=0"  # of nvImageCodec

Box = list[int]


@dataclass(frozen=True)
class JpegDecoder:
    """`region(data, box)`: u8 [height, width, 3] of the box x, y, width, height; `whole(data)`: u8 [H, W, 3]; None
    where it will not decode. Without both, everything is Pillow's."""

    name: str
    whole: Callable[[bytes], np.ndarray | None] | None = None
    region: Callable[[bytes, Box], np.ndarray | None] | None = None


def decoder(wanted: str) -> JpegDecoder:
    """The decoder of that name, for auto the first that works here; one of this process, made when first asked for.

    Raises ShardError when the one named does not work here.
    """
    return _decoder("auto" if wanted == GPU else wanted, os.getpid())


@functools.lru_cache(maxsize=8)
def _decoder(wanted: str, _: int) -> JpegDecoder:
    if wanted == APPROXIMATE:
        return _approximate()
    tried = []
    for name, make in (("nvimgcodec", _nvimgcodec), ("simplejpeg", _simplejpeg)):
        if wanted not in ("auto", name):
            continue
        try:
            made = make()
        except (ImportError, RuntimeError, OSError) as error:
            tried.append(f"{name} does not start ({(str(error).splitlines() or [type(error).__name__])[0]})")
            continue
        if _same_pixels(made, _by_pillow):
            return _with_faster_whole(made) if wanted == "auto" else made
        tried.append(f"{name} gives other pixels than Pillow")
    if wanted not in ("auto", "pillow"):
        raise ShardError(
            f"the JPEG decoder {wanted} cannot be used: {'; '.join(tried)}; install it (pip install '.[fast]'), or set "
            f"loader.decoder=auto"
        )
    return JpegDecoder(f"pillow {metadata.version('pillow')}")


def _with_faster_whole(made: JpegDecoder) -> JpegDecoder:
    """With simplejpeg for whole images, where it works: it is a seventh faster at them than nvImageCodec."""
    with contextlib.suppress(ShardError):
        other = decoder("simplejpeg")
        if made.region:
            return JpegDecoder(f"{made.name}, whole ones {other.name}", other.whole, made.region)
    return made


def version_of(name: str) -> str:
    """Name and version of what decodes."""
    for package in _PACKAGES[name]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(package)}"
    return name


def _approximate() -> JpegDecoder:
    """Fast DCT and plain upsampling: simplejpeg, for regions nvImageCodec where it works and gives the same pixels."""
    made = _simplejpeg(fast=True)
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        other = _nvimgcodec(_FAST)
        if made.whole and _same_pixels(other, made.whole):
            return JpegDecoder(f"{APPROXIMATE}, {other.name}, whole ones {made.name}", made.whole, other.region)
    return JpegDecoder(f"{APPROXIMATE}, {made.name}", made.whole)


def sample_jpeg() -> bytes:
    """An image of noise, 64 × 48, with halved chroma."""
    noise = (np.arange(64 * 48 * 3, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).reshape(48, 64, 3)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=80, subsampling=2)
    return file.getvalue()


def _by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def _same_pixels(made: JpegDecoder, reference: Callable[[bytes], np.ndarray | None]) -> bool:
    """Whether it decodes the test image as the reference does, whole and in part."""
    data = sample_jpeg()
    expected = reference(data)
    if expected is None:
        return False
    x, y, width, height = _TEST_BOX
    pairs = [(made.whole(data) if made.whole else None, expected)]
    if made.region:
        pairs.append((made.region(data, _TEST_BOX), expected[y : y + height, x : x + width]))
    return all(found is not None and np.array_equal(found, wanted) for found, wanted in pairs)


def _simplejpeg(fast: bool = False) -> JpegDecoder:
    def whole(data: bytes) -> np.ndarray | None:
        try:
            return simplejpeg.decode_jpeg(data, "RGB", fastdct=fast, fastupsample=fast)
        except ValueError:  # it refuses what libjpeg only warns of
            return None

    return JpegDecoder(version_of("simplejpeg"), whole)


def nvimgcodec() -> Any:
    """The library. Raises ImportError, OSError."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    return importlib.import_module("nvidia.nvimgcodec")


def _nvimgcodec(options: str = "") -> JpegDecoder:
    """On the CPU alone; EXIF turns and colour profiles stay unapplied, as everywhere here."""
    with silent():  # it names every GPU library that it does not find
        library = nvimgcodec()
        backend = library.Backend(library.BackendKind.CPU_ONLY)
        device = library.NVIMGCODEC_DEVICE_CPU_ONLY
        decode = library.Decoder(device, 1, [backend], options).decode
    params = library.DecodeParams(apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB)
    buffer = _Buffer()

    def pixels(stream: object) -> np.ndarray | None:
        return buffer.pixels(decode(stream, image=buffer.image, params=params))

    def whole(data: bytes) -> np.ndarray | None:
        return pixels(library.CodeStream(data))

    def region(data: bytes, box: Box) -> np.ndarray | None:
        x, y, width, height = box
        part = library.Region(y, x, y + height, x + width)
        return pixels(library.CodeStream(data).get_sub_code_stream(region=part))

    return JpegDecoder(version_of("nvimgcodec"), whole, region)


class _Buffer:
    """One image that nvImageCodec decodes into again and again. Every time one is asked for its address, 32 bytes leak
    (0.9.0), a gigabyte a worker in a long run; so it is asked when the buffer has grown, and no more."""

    def __init__(self) -> None:
        self.image: Any = None
        self.capacity = self.address = 0

    def pixels(self, image: Any) -> np.ndarray | None:
        """A copy of what was decoded, u8 [H, W, 3]; None where nothing was."""
        if image is None:
            return None
        if image is not self.image or image.capacity != self.capacity:
            self.image, self.capacity = image, image.capacity
            self.address = image.__array_interface__["data"][0]
        shape = (image.height, image.width, image.num_channels)
        if image.strides != (shape[1] * shape[2], shape[2], 1):
            return None
        found = np.empty(shape, np.uint8)
        ctypes.memmove(found.ctypes.data, self.address, found.nbytes)
        return found


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing reaches the process's stderr, not from C either."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
