"""An image's format by its first bytes."""

import io

import pytest
from PIL import Image

from beitforge.shards.decode.kinds import HEAD_BYTES, kind_of
from tests.shards.made_images import encoded, photo

IMAGE = Image.fromarray(photo())


def box(*brands: bytes, size: int | None = None) -> bytes:
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(body) + 4 if size is None else size).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("JPEG", "jpeg"),
        ("MPO", "jpeg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
        ("AVIF", "avif"),
        ("JPEG2000", "jp2"),
        ("ICO", "ico"),
        ("PPM", "pnm"),
        ("ICNS", "icns"),
        ("DDS", "dds"),
        ("QOI", "qoi"),
    ],
)
def test_what_pillow_writes_has_its_kind(format, kind):
    data = encoded(IMAGE, format)
    assert kind_of(data) == kind == kind_of(data[:HEAD_BYTES])


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (box(b"heic", b"mif1", b"heic"), "heic"),
        (box(b"mif1", b"miaf", b"avif"), "avif"),
        (box(b"mif1", b"miaf"), "heic"),
        (box(b"avis"), "avif"),
        (box(b"isom", b"avc1", b"mp41"), ""),
        (box(b"heic", size=1 << 31), "heic"),
        (box(b"heic", size=0), "heic"),
        (b"\xff\x0a\x7f\x00", "jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "jxl"),
        (b"II+\0\x08\0\0\0", "tiff"),
        (b"II*\0\x10\0\0\0CR\x02\0", "raw"),
        (b"8BPS\0\1", "psd"),
        (b"BMW is a maker of cars", ""),
        (b"P3 is a class of people", ""),
        (b"<html>404</html>", ""),
        (b"\0\1\0\0\0\x0f", ""),
        (b"\xff\xd8", ""),
        (b"", ""),
    ],
)
def test_others_by_their_bytes(head, kind):
    """Brands beyond the first count; a film, a font and a text are no images."""
    assert kind_of(head) == kind


def test_every_start_of_an_image_is_taken():
    """Cut anywhere, a head gives a kind or none and raises nothing."""
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO"):
        file = io.BytesIO()
        IMAGE.save(file, format)
        for length in range(40):
            kind_of(file.getvalue()[:length])
