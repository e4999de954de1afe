"""Every image file of Pillow's own tests, which are not in this repository: pip downloads them with its source."""

import collections
import io
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from beitforge.shards.decode import codec, extras
from beitforge.shards.decode.codec import ImageError
from beitforge.shards.decode.kinds import kind_of
from beitforge.shards.pack.encode import EncodeOptions, encode

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="a download: BEITFORGE_NIGHTLY=1")

READ = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic", "jxl")
FAILURES = (OSError, SyntaxError, ValueError, struct.error, IndexError, TypeError, EOFError, ArithmeticError)
# Refused though Pillow gives something for them, and why that is not what was stored.
TRUE_REASONS = {
    "10ct_32bit_128.tiff": "32-bit pixels",
    "16_bit_binary_pgm.tiff": "32-bit pixels",
    "16bit.s.tif": "with a sign",
    "8bit.s.tif": "with a sign",
    "separate_planar_extra_samples.tiff": "with a sign",
    "hopper_bad_exif.jpg": "is damaged",  # most of its restart intervals hold other blocks
}


def files(target: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file of Tests/images in the source of the Pillow that is installed, put into `target`."""
    wanted = f"pillow=={version('pillow')}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "pillow",
        "-d",
        str(target),
        wanted,
    ]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    (source,) = target.glob("*.tar.gz")
    with tarfile.open(source) as tar:
        for member in tar:
            _, _, name = member.name.partition("/Tests/images/")
            if name and member.isfile():
                yield name, tar.extractfile(member).read()


def meant(data: bytes, kind: str) -> np.ndarray:
    """What the documentation says an image becomes: upright by `exif_transpose`, then 8-bit RGB."""
    formats = (extras.open_format(kind),) if kind in ("avif", "heic", "jxl") else None
    with Image.open(io.BytesIO(data), formats=formats) as image:
        if image.width * image.height > codec.MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        tags = getattr(image, "tag_v2", {})
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
            bits = max(tags.get(258, (16,))) if image.format == "TIFF" else 16
            grey = np.asarray(upright).astype(np.int64) >> (bits - 8)
            grey = 255 - grey if image.format == "TIFF" and tags.get(262) == 0 else grey
            return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
        return np.asarray((upright.convert("LA") if upright.mode == "La" else upright).convert("RGB"))


def check(name: str, data: bytes) -> str:
    """What became of one file; raises AssertionError where it is neither what was meant nor refused for its reason."""
    kind = kind_of(data)
    try:
        wanted = meant(data, kind) if kind in READ else None
    except (*FAILURES, ImageError, Image.DecompressionBombError) as error:
        wanted = None
        assert kind in READ, error
    try:
        prepared = encode(data, EncodeOptions(to_rgb8=True))
    except ImageError as error:
        if kind not in READ:
            assert "not an image that is read here" in str(error) and (not kind or kind in str(error)), (name, error)
            return "another format"
        if wanted is None:
            assert not str(error).startswith("not an image"), (name, error)
            return "Pillow cannot either"
        assert name in TRUE_REASONS and TRUE_REASONS[name] in str(error), (name, error)
        return "refused"
    found = codec.decode(prepared.data)
    if wanted is None:  # a JPEG without its end
        assert any("cleaned" in one for one in prepared.conversions), name
        return "cleaned"
    assert found.shape == wanted.shape, name
    lossy = any("again as jpg" in one or "again as webp" in one for one in prepared.conversions)
    assert np.abs(found.astype(int) - wanted).mean() < 4 if lossy else np.array_equal(found, wanted), name
    asked(name, data, prepared.conversions)
    return "encoded again" if prepared.data != data else "kept"


def asked(name: str, data: bytes, conversions: tuple[str, ...]) -> None:
    """Without --to-rgb8 exactly what loses depth or channels is refused, with that name."""
    losses = [one for one in conversions if one.endswith(("to 8-bit", "CMYK to RGB", "dropped"))]
    try:
        encode(data, EncodeOptions())
        assert not losses, name
    except ImageError as error:
        assert losses and "--to-rgb8" in str(error) and all(one in str(error) for one in losses), (name, error)


@nightly
@pytest.mark.filterwarnings("ignore")  # Pillow's own, of which its tests have many
def test_every_file_is_kept_as_meant_or_refused_for_its_reason(tmp_path):
    """Hundreds of odd files, which nobody here made: no crash, no other pixels, no false reason."""
    pytest.importorskip("pillow_heif")
    found = collections.Counter()
    wrong = []
    for name, data in files(tmp_path):
        try:
            found[check(name, data)] += 1
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0] + f" {name}")
    print(dict(found))
    assert wrong == []
    assert found["kept"] > 300 and found["encoded again"] > 150 and found["refused"] == len(TRUE_REASONS)
