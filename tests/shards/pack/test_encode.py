"""Preparing an image: bytes untouched where possible, turned exactly once, shrunk and encoded where asked."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from beitforge.shards.decode import codec
from beitforge.shards.decode.codec import ImageError
from beitforge.shards.format.index import FLAG_ANIMATED, FLAG_ROTATED
from beitforge.shards.pack.encode import EncodeOptions, encode, read_file, shrunk_size
from beitforge.shards.pack.tar_scan import describe
from tests.shards.made_images import encoded, exif, jpeg, photo, png_16_bit

PHOTO = photo()
IMAGE = Image.fromarray(PHOTO)
PLAIN = EncodeOptions()
TO_RGB8 = EncodeOptions(to_rgb8=True)


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (jpeg(), "jpg"),
        (jpeg(progressive=True, exif=exif(1)), "jpg"),
        (encoded(IMAGE.convert("CMYK"), "JPEG"), "jpg"),
        (encoded(IMAGE.quantize(9), "PNG"), "png"),
        (encoded(PHOTO, "WEBP"), "webp"),
    ],
)
def test_bytes_stay_where_nothing_must_change(data, extension):
    """Packing is lossless by default; the extension follows the content, so a PNG named .jpg becomes .png."""
    prepared = encode(data, TO_RGB8)
    assert prepared.data == data
    assert prepared.extension == extension


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turn_is_applied_exactly_once(orientation, format):
    """The stored image is upright, says so, and preparing it again changes nothing."""
    source = encoded(PHOTO, format, exif=exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(source))).convert("RGB"))
    prepared = encode(source, PLAIN)
    header, pixels = codec.read_image(prepared.data)
    assert header.orientation == 1 and not header.flags & FLAG_ROTATED
    assert (prepared.facts.height, prepared.facts.width) == upright.shape[:2] == pixels.shape[:2]
    difference = np.abs(pixels.astype(int) - upright).mean()
    assert difference == 0 if format == "PNG" else difference < 3
    assert encode(prepared.data, PLAIN).data == prepared.data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png_16_bit(np.full((32, 48), 40000, np.uint16)), np.full((32, 48, 3), 40000 >> 8, np.uint8)),
        (encoded(PHOTO, "BMP"), PHOTO),
        (encoded(PHOTO, "TIFF"), PHOTO),
        (encoded(PHOTO, "PNG", save_all=True, append_images=[IMAGE.rotate(180)]), PHOTO),
    ],
    ids=["16-bit", "bmp", "tiff", "animated"],
)
def test_what_must_change_becomes_a_lossless_8_bit_png(data, expected):
    """These had no loss, so they get none; and any reader downstream, not only ours, sees the same pixels."""
    prepared = encode(data, TO_RGB8)
    header, pixels = codec.read_image(prepared.data)
    assert (prepared.extension, header.format, header.bits) == ("png", "png", 8)
    assert not header.flags & FLAG_ANIMATED
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("reencode", ["never", "jpg", "png", "webp"])
@pytest.mark.parametrize("data", [jpeg(width=200, height=100), jpeg(width=200, height=100, exif=exif(3))])
def test_facts_describe_the_stored_bytes(reencode, data):
    """The index must speak of what is in the tar, not of the source file."""
    prepared = encode(data, EncodeOptions(max_side=50, reencode=reencode))
    assert prepared.facts == describe(prepared.data)
    assert (prepared.facts.width, prepared.facts.height) == (50, 25)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((400, 300), (0, 0), (400, 300)),
        ((400, 300), (200, 0), (200, 150)),
        ((300, 400), (200, 0), (150, 200)),
        ((400, 300), (0, 100), (133, 100)),
        ((300, 400), (0, 100), (100, 133)),
        ((400, 300), (1000, 0), (400, 300)),
        ((400, 300), (0, 300), (400, 300)),
        ((4000, 30), (400, 20), (400, 3)),
        ((4000, 1), (400, 0), (400, 1)),
    ],
)
def test_side_limits(size, limits, expected):
    """The limited side is hit to the pixel, aspect kept, nothing enlarged, no side vanishes."""
    assert shrunk_size(size[0], size[1], EncodeOptions(max_side=limits[0], short_side=limits[1])) == expected


def test_shrinking_is_lanczos_and_keeps_the_format():
    """A shrunk PNG is Pillow's Lanczos bit for bit; JPEG stays JPEG and WebP WebP, lossless WebP becomes PNG."""
    options = EncodeOptions(max_side=24)
    shrunk = encode(encoded(PHOTO, "PNG"), options)
    expected = np.asarray(IMAGE.resize((24, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(codec.decode(shrunk.data), expected)
    kinds = {"JPEG": "jpg", "WEBP": "webp", "PNG": "png", "BMP": "png"}
    assert {format: encode(encoded(PHOTO, format), options).extension for format in kinds} == kinds
    assert encode(encoded(PHOTO, "WEBP", lossless=True), options).extension == "png"


def test_turned_and_shrunk_image_meets_the_limits_as_seen():
    """Side limits apply to the upright image."""
    source = encoded(PHOTO, "JPEG", exif=exif(6))
    facts = encode(source, EncodeOptions(max_side=24)).facts
    assert (facts.width, facts.height) == (16, 24)


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_reencode_makes_every_image_that_format(format):
    """One decoder path for a whole set, if that is wanted; quality counts."""
    for data in (jpeg(), encoded(PHOTO, "PNG"), encoded(IMAGE, "GIF")):
        prepared = encode(data, EncodeOptions(reencode=format))
        assert (prepared.extension, codec.read_header(prepared.data).format) == (format, format)
    sizes = [len(encode(jpeg(), EncodeOptions(reencode=format, quality=quality)).data) for quality in (30, 95)]
    assert sizes[0] == sizes[1] if format == "png" else sizes[0] < sizes[1]


def test_files_that_cannot_be_read_are_images_that_cannot_be_used(tmp_path):
    """A dangling link is one reject, not the end of a packing of millions."""
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name in ("gone.jpg", "loop.jpg"):
        with pytest.raises(ImageError, match="cannot be read"):
            read_file(tmp_path / name)


def test_a_failing_disk_is_no_reject(tmp_path, monkeypatch):
    """An I/O error must stop the packing: skipping what a sick disk cannot read would hide it."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())

    def fail(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        read_file(path)
