"""The codec: every kind of image gives the right pixels or an ImageError, and nothing else."""

import io
import random

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageStat, JpegImagePlugin

from beitforge.pipeline.data.demo_images import find_photographs
from beitforge.shards.decode import codec, jpeg_faults
from beitforge.shards.decode import jpeg as decoders
from beitforge.shards.decode.codec import ImageError
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import (
    FLAG_ANIMATED,
    FLAG_JPEG,
    FLAG_NOT_RGB,
    FLAG_PNG,
    FLAG_PROGRESSIVE,
    FLAG_ROTATED,
    FLAG_WEBP,
)
from beitforge.shards.format.levels import tone_table
from tests.shards.made_images import bomb, encoded, exif, jpeg, photo, png_16_bit

PHOTO = photo()
IMAGE = Image.fromarray(PHOTO)
GREY = IMAGE.convert("L")
PALETTE = IMAGE.quantize(17)
RGBA = np.dstack([PHOTO, photo(seed=5)[..., 0]])
DEEP = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 42


def grey3(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2)


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


LOSSLESS = {
    "png": (encoded(PHOTO, "PNG"), PHOTO),
    "png-rgba-drops-alpha": (encoded(RGBA, "PNG"), PHOTO),
    "png-grey": (encoded(GREY, "PNG"), grey3(np.asarray(GREY))),
    "png-grey-alpha": (encoded(GREY.convert("LA"), "PNG"), grey3(np.asarray(GREY))),
    "png-palette": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "png-palette-transparent": (encoded(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "png-1-bit": (encoded(GREY.convert("1"), "PNG"), grey3(np.asarray(GREY.convert("1")) * np.uint8(255))),
    "png-16-bit-grey": (png_16_bit(DEEP), grey3((DEEP >> 8).astype(np.uint8))),
    "png-16-bit-rgb": (png_16_bit(np.dstack([DEEP, DEEP, ~DEEP])), np.dstack([DEEP, DEEP, ~DEEP]).astype(">u2") >> 8),
    "png-animated": (encoded(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(180)]), PHOTO),
    "webp-lossless": (encoded(PHOTO, "WEBP", lossless=True), PHOTO),
    "gif": (encoded(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB"))),
    "gif-animated": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "bmp": (encoded(PHOTO, "BMP"), PHOTO),
    "tiff": (encoded(PHOTO, "TIFF"), PHOTO),
    "tiff-lzw": (encoded(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO),
    "tiff-16-bit": (encoded(Image.fromarray(DEEP), "TIFF"), grey3((DEEP >> 8).astype(np.uint8))),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_kinds_give_the_pixels_they_were_made_from(kind):
    """Palette, depth, alpha and greyscale are all brought to the same RGB, 16 bits scaled and not clipped."""
    data, expected = LOSSLESS[kind]
    np.testing.assert_array_equal(codec.decode(data), expected)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        jpeg(progressive=True),
        encoded(GREY, "JPEG"),
        encoded(IMAGE.convert("CMYK"), "JPEG"),
        encoded(PHOTO, "WEBP"),
        encoded(PHOTO, "JPEG", exif=exif(6)),
    ],
    ids=["jpg", "progressive", "grey", "cmyk", "webp", "turned"],
)
def test_lossy_kinds_decode_as_pillow_does_with_exif_ignored(data):
    """Tokenizer and trainer decode here and must agree with Pillow; a turn is packing's business alone."""
    np.testing.assert_array_equal(codec.decode(data), pillow(data))


def test_decoded_pixels_are_writable():
    """The loader hands them to torch without a copy, and torch warns about read-only memory."""
    assert codec.decode(jpeg()).flags.writeable


@pytest.mark.parametrize(
    ("data", "format", "flags", "bits"),
    [
        (jpeg(), "jpg", FLAG_JPEG, 8),
        (jpeg(progressive=True), "jpg", FLAG_JPEG | FLAG_PROGRESSIVE, 8),
        (encoded(GREY, "JPEG"), "jpg", FLAG_JPEG | FLAG_NOT_RGB, 8),
        (encoded(IMAGE.convert("CMYK"), "JPEG"), "jpg", FLAG_JPEG | FLAG_NOT_RGB, 8),
        (encoded(IMAGE, "MPO", save_all=True, append_images=[GREY]), "jpg", FLAG_JPEG, 8),
        (encoded(PHOTO, "JPEG", exif=exif(3)), "jpg", FLAG_JPEG | FLAG_ROTATED, 8),
        (encoded(PHOTO, "PNG", exif=exif(8)), "png", FLAG_PNG | FLAG_ROTATED, 8),
        (encoded(PALETTE, "PNG"), "png", FLAG_PNG | FLAG_NOT_RGB, 8),
        (png_16_bit(DEEP), "png", FLAG_PNG | FLAG_NOT_RGB, 16),
        (png_16_bit(np.dstack([DEEP] * 3)), "png", FLAG_PNG | FLAG_NOT_RGB, 16),
        (encoded(IMAGE, "WEBP", save_all=True, append_images=[GREY]), "webp", FLAG_WEBP | FLAG_ANIMATED, 8),
        (encoded(PHOTO, "BMP"), "bmp", 0, 8),
    ],
)
def test_header_says_what_the_bytes_are(data, format, flags, bits):
    """The content counts, never the file's name; packing and the index decide by these."""
    header = codec.read_header(data)
    assert (header.format, header.flags, header.bits) == (format, flags, bits)
    assert (header.width, header.height) == (48, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read(orientation):
    """Every turn EXIF knows is seen."""
    assert codec.read_header(encoded(PHOTO, "JPEG", exif=exif(orientation))).orientation == orientation


def test_damaged_exif_costs_no_image_and_no_warning():
    """Broken metadata is common and harmless; Pillow warns about it, and warnings are errors in this suite."""
    good = encoded(PHOTO, "JPEG", exif=exif(6))
    at = good.index(b"Exif\0\0")
    damaged = good[: at + 14] + b"\xff" * 8 + good[at + 22 :]
    assert codec.read_header(damaged).orientation == 1
    np.testing.assert_array_equal(codec.decode(damaged), pillow(encoded(PHOTO, "JPEG")))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>404</html>" * 50, "not an image"),
        (jpeg(width=200, height=200)[:-2000], "does not decode.*truncated"),
        (encoded(PHOTO, "PNG")[:-700], "does not decode"),
        (encoded(PHOTO, "WEBP")[:-100], "does not decode|not an image"),
        (encoded(PHOTO, "BMP")[:-100], "does not decode"),
        (encoded(Image.fromarray(PHOTO[..., 0].astype(np.float32)), "TIFF"), "no defined white"),
    ],
    ids=["empty", "html", "jpg-cut", "png-cut", "webp-cut", "bmp-cut", "float"],
)
def test_unusable_images_say_why(data, reason):
    """One exception type, with the reason a person needs; a truncated image is never half an image."""
    with pytest.raises(ImageError, match=reason):
        codec.decode(data)


def test_bomb_is_refused_by_its_header_alone(monkeypatch):
    """50 kB that become 1.2 GB must not be decoded, nor pass Pillow's warning on to the user."""

    def never(*_):
        raise AssertionError("decoded a bomb")

    monkeypatch.setattr(Image.Image, "convert", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    for read in (codec.decode, codec.read_header, codec.read_image):
        with pytest.raises(ImageError, match=r"20000x20000 is more than 134217728 pixels"):
            read(bomb())


def test_the_pixel_limit_is_exact():
    """48 x 32 pixels pass a limit of 1536 and no lower one."""
    assert codec.decode(jpeg(), max_pixels=48 * 32).shape == (32, 48, 3)
    with pytest.raises(ImageError, match="48x32"):
        codec.decode(jpeg(), max_pixels=48 * 32 - 1)


FUZZED = [LOSSLESS[kind][0] for kind in LOSSLESS] + [jpeg(exif=exif(6)), encoded(PHOTO, "WEBP", exif=exif(2))]


@pytest.mark.parametrize("seed", range(8))
def test_damage_never_raises_anything_else(seed):
    """Cuts and flipped bytes anywhere give pixels of the header's size or ImageError: no other error, no warning."""
    rng = random.Random(seed)
    outcomes = {"pixels": 0, "error": 0}
    for _ in range(150):
        data = bytearray(rng.choice(FUZZED))
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(min(len(data), rng.choice([64, 100_000])))] = rng.randrange(256)
        data = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data
        try:
            header, pixels = codec.read_image(bytes(data), max_pixels=10**6)
            assert pixels.shape == (header.height, header.width, 3)
            outcomes["pixels"] += 1
        except ImageError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 10, f"the damage is too mild or too wild to test anything: {outcomes}"


@pytest.mark.parametrize("seed", range(3))
def test_mean_grey_is_pillows(seed):
    """Contrast jitter uses this mean; it must be that of the transform it stands for."""
    pixels = photo(seed=seed)
    expected = ImageStat.Stat(Image.fromarray(pixels).convert("L")).mean[0]
    assert codec.greys(pixels)[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("box", [[0, 0, 49, 32], [0, 1, 48, 32], [-1, 0, 5, 5], [0, 0, 0, 5]])
def test_crop_refuses_a_box_outside_the_image(box):
    """NumPy would silently cut less, and tokens and pixels would no longer match."""
    with pytest.raises(ShardError, match="48x32"):
        codec.crop(PHOTO, box)


def test_png_is_lossless_and_jpeg_keeps_full_chroma():
    """What had no loss gets none; what is encoded anew loses no chroma resolution."""
    np.testing.assert_array_equal(codec.decode(codec.encode(PHOTO, "png", 95)), PHOTO)
    jpg = codec.encode(PHOTO, "jpg", 95)
    assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(jpg))) == 0
    assert codec.read_header(codec.encode(PHOTO, "webp", 95)).format == "webp"
    assert len(codec.encode(PHOTO, "jpg", 50)) < len(jpg)


def test_encode_names_a_size_the_format_cannot_hold():
    """WebP ends at 16383 pixels a side: a reason for the list of rejects, not a crash."""
    with pytest.raises(ImageError, match="16384x1 cannot be stored as webp"):
        codec.encode(np.zeros((1, 16384, 3), np.uint8), "webp", 90)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_damaged_before_it_comes_is_refused(mode):
    """No checksum can tell; libjpeg can, mostly, and Pillow does not ask it. What is whole passes."""
    data = encoded(Image.fromarray(photo(256, 320)).convert(mode), "JPEG", quality=90)
    codec.read_image(data)
    refused = 0
    for start in range(len(data) // 3, len(data) - 900, len(data) // 40):
        broken = data[:start] + bytes(800) + data[start + 800 :]
        codec.decode(broken)  # to something
        try:
            codec.read_image(broken)
        except ImageError as error:
            assert "is damaged: " in str(error)
            refused += 1
    assert refused >= 20


SOUND = {
    f"{mode} {subsampling} {'progressive' if progressive else 'baseline'} {width}x{height}": (
        Image.fromarray(photo(width, height, seed=width)).convert(mode),
        {"subsampling": subsampling, "progressive": progressive, "quality": 60 + width % 40},
    )
    for mode in ("RGB", "L")
    for subsampling in (0, 1, 2)
    for progressive in (False, True)
    for width, height in ((1, 1), (7, 9), (16, 16), (33, 17), (161, 120))
}


@pytest.mark.parametrize("kind", SOUND)
def test_one_strict_decoding_gives_pillows_pixels(kind, monkeypatch):
    """What packs and indexes asks libjpeg for its warnings and for the pixels at once. Those are Pillow's, and so are
    the greys of the index."""
    image, how = SOUND[kind]
    data = encoded(image, "JPEG", **how)
    expected, header = codec.decode(data), codec.read_header(data)
    luma = np.asarray(Image.fromarray(expected).convert("L"))
    greys = int(luma.sum(dtype=np.uint64)) / luma.size, tone_table(Image.fromarray(expected).histogram())
    calls, inner = [], simplejpeg.decode_jpeg
    decoders.decoder("simplejpeg")  # which tries itself first
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *words: calls.append(words) or inner(*words))
    monkeypatch.setattr(codec, "_pixels", lambda image: pytest.fail("Pillow decodes it, too"))
    source = codec.read_source(data)
    for found_header, found in (codec.read_image(data), (source.header, source.pixels)):
        assert np.array_equal(found, expected) and found_header == header
        assert codec.greys(found) == codec.greys(expected) == greys
    assert len(calls) == 2


@pytest.mark.parametrize("photograph", find_photographs(), ids=lambda path: path.stem)
def test_photographs_too(photograph):
    data = encoded(Image.fromarray(codec.decode(photograph.read_bytes())), "JPEG", quality=90)
    assert np.array_equal(codec.read_image(data)[1], codec.decode(data))


def test_a_decoder_of_other_pixels_is_not_asked(monkeypatch):
    """Then Pillow's count, as before."""

    def none(name):
        raise ShardError("gives other pixels than Pillow")

    monkeypatch.setattr(jpeg_faults, "sound", lambda data: pytest.fail("asked"))
    monkeypatch.setattr(decoders, "decoder", none)
    data = encoded(photo(), "JPEG")
    assert np.array_equal(codec.read_image(data)[1], codec.decode(data))
