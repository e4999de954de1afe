"""Images for the tests, made as cameras, scanners and accidents make them."""

import gc
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

ORIENTATION = 0x0112


def photo(width: int = 48, height: int = 32, seed: int = 0) -> np.ndarray:
    """A smooth image with some noise, uint8 [H, W, 3]: compresses like a photograph, no two seeds alike."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    phase, slope = rng.uniform(0, 6, 3), rng.uniform(0.05, 0.25, (3, 2))
    waves = np.sin(rows[..., None] * slope[:, 0] + columns[..., None] * slope[:, 1] + phase)
    return (127.5 + 90 * waves + rng.normal(0, 4, waves.shape)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, format: str, **options) -> bytes:
    """`pixels` (an array or a Pillow image) in Pillow's `format`."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(seed: int = 0, width: int = 48, height: int = 32, **options) -> bytes:
    return encoded(photo(width, height, seed), "JPEG", quality=90, **options)


def resampled_jpeg(sampling: int, width: int, height: int, seed: int = 0, **options) -> bytes:
    """A JPEG of sampling factors that Pillow does not write, 0x12 (4:4:0) or 0x41 (4:1:1): an image of others whose
    MCUs have the same blocks, read as one of these."""
    was, sides = {0x12: (0x21, (2 * width, -(-height // 2))), 0x41: (0x22, (-(-width // 2), 2 * height))}[sampling]
    data = jpeg(seed, *sides, subsampling=1 if was == 0x21 else 2, **options)
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == was
    told = (height << 16 | width).to_bytes(4, "big")
    return data[: frame + 5] + told + data[frame + 9 : frame + 11] + bytes([sampling]) + data[frame + 12 :]


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(rows: list[bytes], width: int, bits: int, colour: int) -> bytes:
    """A PNG from raw rows, for what Pillow does not write (16-bit colour); colour 0 is grey, 2 RGB, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def png_16_bit(values: np.ndarray) -> bytes:
    """uint16 [H, W] or [H, W, 3] as a 16-bit PNG."""
    colour = 0 if values.ndim == 2 else 2
    return png([row.astype(">u2").tobytes() for row in values], values.shape[1], 16, colour)


def bomb() -> bytes:
    """A true 1-bit PNG of 20000 x 20000 in 50 kB: 1.2 GB of RGB."""
    return png([bytes(2500)] * 20000, 20000, 1, 0)


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Write `files` (relative path: bytes) below `folder`; the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def two_classes(folder: Path, count: int) -> Path:
    """`count` JPEGs in each of cat and dog."""
    files = {f"{name}/{i}.jpg": jpeg(seed=100 * k + i) for k, name in enumerate(("cat", "dog")) for i in range(count)}
    return write_folder(folder, files)


def read_with_webdataset(*tars: Path) -> list[dict]:
    """The samples as webdataset itself reads them in its default form. It leaves files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
        gc.collect()
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of every entry: changed by any rewrite, even one with the same bytes."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def tiff(values: np.ndarray, bits: int, order: str = "<", deflate: bool = False, **tags: int) -> bytes:
    """uint [H, W] or [H, W, bands] of `bits` a sample as a TIFF of one strip, for what Pillow does not write.

    Tags by name: photometric (1), extra (ExtraSamples of one band), planes (1), format (SampleFormat), orientation.
    """
    rows = values if tags.get("planes", 1) == 1 else np.moveaxis(values, -1, 0)
    bands = values.shape[2] if values.ndim == 3 else 1
    rows = rows.reshape(-1, values.shape[1] * (bands if tags.get("planes", 1) == 1 else 1))
    digits = (rows[..., None].astype(np.int64) >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    packed = np.packbits(digits.reshape(len(rows), -1), axis=1)
    content = rows.astype(f"{order}u{bits // 8}").tobytes() if bits in (16, 32) else packed.tobytes()
    content = zlib.compress(content) if deflate else content
    entries = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 8 if deflate else 1, 262: 1, 273: 8}
    entries |= {277: bands, 278: values.shape[0], 279: len(content)}
    numbers = {"photometric": 262, "extra": 338, "planes": 284, "format": 339, "orientation": 274}
    entries |= {numbers[name]: value for name, value in tags.items()}
    directory = struct.pack(f"{order}H", len(entries))
    for number, value in sorted(entries.items()):
        directory += struct.pack(f"{order}HHII", number, 4, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(content)) + content + directory + bytes(4)
