"""What packing makes of every format, turn, depth and mode: the pixels that were meant, and what was lost, counted."""

import io
import itertools
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from beitforge.shards.decode import codec, conversions, extras, jpeg
from beitforge.shards.decode.codec import ImageError
from beitforge.shards.decode.kinds import kind_of
from beitforge.shards.pack.encode import EncodeOptions, Prepared, encode
from tests.shards.made_images import encoded, exif, photo, png_16_bit, tiff

PHOTO = photo()
IMAGE = Image.fromarray(PHOTO)
GREY = PHOTO[..., 0]
RGBA = np.dstack([PHOTO, GREY])
OPAQUE = np.dstack([PHOTO, np.full_like(GREY, 255)])
DEEP = (np.arange(32 * 48, dtype=np.uint16) * 42).reshape(32, 48)
TO_RGB8 = EncodeOptions(to_rgb8=True)


def packed(data: bytes) -> tuple[Prepared, np.ndarray]:
    prepared = encode(data, TO_RGB8)
    return prepared, codec.decode(prepared.data)


def transposed(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def xmp(orientation: int) -> bytes:
    tag = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
    rdf = f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{tag}</rdf:RDF>'
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{rdf}</x:xmpmeta>'.encode()


def png_with_xmp(orientation: int) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode())
    return encoded(IMAGE, "PNG", pnginfo=text)


def png_with_gamma(gamma: float) -> bytes:
    data = encoded(IMAGE, "PNG")
    chunk = b"gAMA" + int(gamma * 100_000).to_bytes(4, "big")
    return data[:33] + (4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]


TURNED = {
    "jpeg": lambda o: encoded(IMAGE, "JPEG", quality=95, exif=exif(o)),
    "mpo": lambda o: encoded(IMAGE, "MPO", quality=95, exif=exif(o), save_all=True, append_images=[IMAGE]),
    "jpeg-xmp": lambda o: encoded(IMAGE, "JPEG", quality=95, xmp=xmp(o)),
    "png": lambda o: encoded(IMAGE, "PNG", exif=exif(o)),
    "png-grey": lambda o: encoded(Image.fromarray(GREY), "PNG", exif=exif(o)),
    "png-palette": lambda o: encoded(IMAGE.quantize(9), "PNG", exif=exif(o)),
    "png-xmp": png_with_xmp,
    "webp": lambda o: encoded(IMAGE, "WEBP", lossless=True, exif=exif(o)),
    "avif": lambda o: encoded(IMAGE, "AVIF", exif=exif(o)),
    "avif-alpha": lambda o: encoded(Image.fromarray(RGBA), "AVIF", exif=exif(o)),
    "tiff-16": lambda o: tiff(np.dstack([DEEP, DEEP, ~DEEP]), 16, photometric=2, orientation=o),
    "tiff-grey": lambda o: tiff(GREY, 8, orientation=o),
    "tiff-white-is-zero": lambda o: tiff(GREY, 8, photometric=0, orientation=o),
    "tiff-big-endian": lambda o: tiff(PHOTO, 8, ">", photometric=2, orientation=o),
    "tiff-planes": lambda o: tiff(PHOTO, 8, photometric=2, planes=2, orientation=o),
    **{
        f"tiff-{compression}": lambda o, c=compression: encoded(IMAGE, "TIFF", compression=c, exif=exif(o))
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    },
    "tiff-1-bit": lambda o: encoded(IMAGE.convert("1"), "TIFF", compression="group4", exif=exif(o)),
    "tiff-pages": lambda o: encoded(IMAGE, "TIFF", exif=exif(o), save_all=True, append_images=[IMAGE]),
}


@pytest.mark.parametrize("kind", TURNED)
def test_every_format_is_turned_once(kind):
    """Pillow turns a TIFF while it loads it and nothing else; the decoders of AVIF leave the turn to the caller."""
    for orientation in range(1, 9):
        data = TURNED[kind](orientation)
        prepared, pixels = packed(data)
        wanted = transposed(data)
        assert pixels.shape == wanted.shape
        assert (prepared.facts.width, prepared.facts.height) == (wanted.shape[1], wanted.shape[0])
        lossy = prepared.extension == "jpg" and orientation != 1
        assert np.abs(pixels.astype(int) - wanted).mean() < (3 if lossy else 1e-9)
        assert codec.read_image(prepared.data)[0].orientation == 1


OPTIONAL = {"heic": ("HEIF", {"quality": -1, "chroma": 444}), "jxl": ("JXL", {"lossless": True})}


@pytest.mark.parametrize("kind", OPTIONAL)
def test_heic_and_jpeg_xl_are_turned_once(kind):
    """The decoder of HEIC turns and takes the tag away; that of JPEG XL turns by its own header and leaves the tag."""
    pytest.importorskip({"heic": "pillow_heif", "jxl": "pillow_jxl"}[kind])
    format, options = OPTIONAL[kind][0], OPTIONAL[kind][1]
    extras.open_format(kind)
    for orientation in range(1, 9):
        data = encoded(IMAGE, format, exif=exif(orientation).tobytes(), **options)
        assert kind_of(data) == kind
        prepared, pixels = packed(data)
        assert np.array_equal(pixels, transposed(data))
        upright = transposed(encoded(IMAGE, "PNG", exif=exif(orientation)))
        assert pixels.shape == upright.shape and np.abs(pixels.astype(int) - upright).mean() < 2
        assert prepared.conversions[-1] == f"{format.lower()} encoded again as png"


def test_the_header_of_jpeg_xl_counts_before_exif():
    """A codestream that says 6 was turned by the decoder: EXIF's 6 beside it, which is usual, turns no more."""
    for orientation in range(1, 9):
        # small, 8x8, not all by default, extra fields, the orientation, nothing more, 16 bits a sample
        fields = ((1, 1), (0, 5), (1, 3), (0, 1), (1, 1), (orientation - 1, 3), (0, 1), (0, 2), (0, 1), (3, 2), (15, 6))
        number, at = 0, 0
        for value, bits in fields:
            number, at = number | value << at, at + bits
        header = extras.JxlHeader(b"\xff\x0a" + number.to_bytes(8, "little"))
        assert (header.width, header.height, header.orientation, header.bits) == (8, 8, orientation, 16)
        image = Image.new("RGB", (8, 8))
        image.format = "JXL"
        data = b"\xff\x0a" + number.to_bytes(8, "little")
        assert extras.orientation(image, data, 6) == (6 if orientation == 1 else 1)


def test_depth_of_heic_and_avif_is_the_files():
    """Pillow gives 8 bits of either and says nothing; 10 are asked for like any other depth."""
    heif = pytest.importorskip("pillow_heif")
    deep = heif.from_bytes(mode="RGB;16", size=(48, 32), data=(PHOTO.astype(np.uint16) * 257).tobytes())
    file = io.BytesIO()
    deep.save(file, quality=-1)
    with pytest.raises(ImageError, match=r"10-bit to 8-bit.*--to-rgb8"):
        encode(file.getvalue(), EncodeOptions())
    image = Image.open(io.BytesIO(encoded(IMAGE, "AVIF")))
    for byte, bits in ((0x0C, 8), (0x4C, 10), (0x6C, 12)):
        assert extras.bits(image, b"....av1C\x81\x00" + bytes([byte]) + b"\0") == bits


@pytest.mark.parametrize(("kind", "package"), [("heic", "pillow-heif"), ("jxl", "pillow-jxl-plugin")])
def test_a_format_whose_package_is_missing_says_so(kind, package, monkeypatch):
    """One line that names what to install; a set holds none of these, and says that, too."""
    head = {"heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "jxl": b"\xff\x0a" + bytes(60)}[kind]

    def missing(name):
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr("importlib.import_module", missing)
    extras._missing.cache_clear()
    try:
        with pytest.raises(ImageError, match=rf"pip install '\.\[formats\]', or pip install {package}"):
            encode(head, EncodeOptions())
    finally:
        extras._missing.cache_clear()
    with pytest.raises(ImageError, match=f"sets do not hold .{kind}"):
        codec.decode(head)


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))
GREYS = [
    (bits, white, order, deflate)
    for bits, white, order, deflate in itertools.product((1, 2, 4, 8, 12, 16), (False, True), "<>", (False, True))
    if (bits, white) != (12, True) and (bits, order) != (12, ">") and (bits, white, order) != (16, True, ">")
]


@pytest.mark.parametrize(("bits", "white", "order", "deflate"), GREYS)
def test_grey_tiffs_of_any_depth_have_their_own_black(bits, white, order, deflate):
    """Black is 0 and white 255, whatever number a file gives them; within the step of its depth."""
    values = np.round(RAMP * (2**bits - 1)).astype(np.uint32)
    data = tiff((2**bits - 1 - values) if white else values, bits, order, deflate, photometric=int(not white))
    prepared, pixels = packed(data)
    wanted = values >> (bits - 8) if bits > 8 else np.round(values * (255 / (2**bits - 1)))
    assert np.array_equal(pixels[..., 0], wanted) and np.array_equal(pixels[..., 1], pixels[..., 2])
    assert (conversions.depth(bits) in prepared.conversions) == (bits > 8)
    if bits > 8:
        with pytest.raises(ImageError, match=rf"{bits}-bit to 8-bit.*--to-rgb8"):
            encode(data, EncodeOptions())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(DEEP, 16, format=2), "16-bit pixels with a sign"),
        (tiff(GREY, 8, format=2), "8-bit pixels with a sign"),
        (tiff(DEEP, 32), "32-bit pixels have no defined white"),
        (tiff(DEEP, 32, format=2), "32-bit pixels with a sign"),
        (tiff(DEEP, 16, format=3), "layout that is not read"),
        (tiff(DEEP >> 4, 12, photometric=0), "layout that is not read"),
        (tiff(DEEP, 16, ">", photometric=0), "layout that is not read"),
        (tiff(DEEP >> 6, 10), "layout that is not read"),
        (tiff(np.dstack([DEEP] * 3), 16, photometric=2, planes=2), "separate planes"),
        (tiff(PHOTO, 8, photometric=6), "fewer samples of chroma"),
        (tiff(PHOTO, 8, photometric=9), "layout that is not read"),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "no defined white"),
    ],
)
def test_what_pillow_would_decode_to_other_values_is_refused(data, reason):
    """With its true reason; none of them may come in as noise, or nearly black."""
    with pytest.raises(ImageError, match=reason):
        encode(data, TO_RGB8)


LOSSES = {
    "png-16-grey": (png_16_bit(DEEP), "16-bit to 8-bit"),
    "png-16-colour": (png_16_bit(np.dstack([DEEP] * 3)), "16-bit to 8-bit"),
    "tiff-16-colour": (tiff(np.dstack([DEEP] * 3), 16, photometric=2), "16-bit to 8-bit"),
    "jpeg-cmyk": (encoded(IMAGE.convert("CMYK"), "JPEG"), conversions.CMYK),
    "tiff-cmyk": (encoded(IMAGE.convert("CMYK"), "TIFF"), conversions.CMYK),
    "tiff-4-bands": (tiff(RGBA, 8, photometric=2, extra=0), conversions.BANDS),
    "tiff-grey-and-more": (tiff(RGBA[..., :2], 8, extra=0), conversions.BANDS),
    "tiff-alpha": (tiff(RGBA, 8, photometric=2, extra=2), conversions.TRANSPARENCY),
    "tiff-premultiplied": (tiff(RGBA[..., 2:], 8, extra=1), conversions.TRANSPARENCY),
    "png-alpha": (encoded(RGBA, "PNG"), conversions.TRANSPARENCY),
    "png-grey-alpha": (encoded(Image.fromarray(RGBA).convert("LA"), "PNG"), conversions.TRANSPARENCY),
    "png-palette": (encoded(IMAGE.quantize(9), "PNG", transparency=0), conversions.TRANSPARENCY),
    "png-colour-key": (encoded(IMAGE, "PNG", transparency=tuple(PHOTO[0, 0].tolist())), conversions.TRANSPARENCY),
    "gif": (encoded(IMAGE.quantize(9), "GIF", transparency=0), conversions.TRANSPARENCY),
    "webp": (encoded(RGBA, "WEBP", lossless=True), conversions.TRANSPARENCY),
    "webp-lossy": (encoded(RGBA, "WEBP"), conversions.TRANSPARENCY),
    "avif": (encoded(RGBA, "AVIF"), conversions.TRANSPARENCY),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_loses_depth_or_channels_asks_first(kind):
    """Refused with the option that allows it; allowed, it is counted, and every decoder sees the same pixels."""
    data, name = LOSSES[kind]
    with pytest.raises(ImageError, match=rf"{name}.*--to-rgb8"):
        encode(data, EncodeOptions())
    prepared, pixels = packed(data)
    assert name in prepared.conversions
    for decoder in jpeg.EXACT:
        assert np.array_equal(codec.decode_whole(prepared.data, prepared.facts.flags, decoder), pixels)


WHOLE = {
    "jpeg": encoded(IMAGE, "JPEG"),
    "jpeg-progressive": encoded(IMAGE, "JPEG", progressive=True),
    "jpeg-rgb": encoded(IMAGE, "JPEG", keep_rgb=True),
    "mpo": encoded(IMAGE, "MPO", save_all=True, append_images=[IMAGE.rotate(180)]),
    "jpeg-grey": encoded(IMAGE.convert("L"), "JPEG"),
    "png-opaque": encoded(OPAQUE, "PNG"),
    "png-palette": encoded(IMAGE.quantize(9), "PNG"),
    "png-unused-key": encoded(Image.fromarray(np.full((4, 4, 3), 9, np.uint8)), "PNG", transparency=(1, 2, 3)),
    "png-1-bit": encoded(IMAGE.convert("1"), "PNG"),
    "webp-opaque": encoded(OPAQUE, "WEBP", lossless=True),
    "png-gamma-of-srgb": png_with_gamma(0.45455),
    "png-srgb": encoded(IMAGE, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_loses_nothing_is_not_asked_and_not_counted(kind):
    """Palettes, grey, opaque alpha, and a profile that says sRGB."""
    prepared = encode(WHOLE[kind], EncodeOptions())
    assert prepared.data == WHOLE[kind] and prepared.conversions == ()
    wanted, size = codec.decode(prepared.data), (prepared.facts.width, prepared.facts.height)
    for decoder in jpeg.EXACT:
        assert np.array_equal(codec.decode_whole(prepared.data, prepared.facts.flags, decoder), wanted)
        found = codec.decode_view(prepared.data, [1, 1, 3, 2], size, prepared.facts.flags, decoder)
        assert np.array_equal(found, wanted[1:3, 1:4])


def linear() -> bytes:
    """A profile whose numbers are light, and so unlike sRGB's."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = profile.index(b"para")
    profile[at : at + 4] = b"curv"
    profile[at + 8 : at + 12] = bytes(4)  # no points: the identity
    return bytes(profile)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded(IMAGE, "JPEG", icc_profile=linear()), conversions.PROFILE),
        (encoded(IMAGE, "WEBP", icc_profile=linear()), conversions.PROFILE),
        (encoded(IMAGE, "PNG", icc_profile=b"no profile at all" * 9), conversions.PROFILE),
        (encoded(IMAGE.convert("L"), "TIFF", icc_profile=linear()), conversions.PROFILE),
        (encoded(IMAGE, "WEBP", save_all=True, append_images=[IMAGE.rotate(90)]), conversions.FRAMES),
        (encoded(IMAGE, "TIFF", save_all=True, append_images=[IMAGE]), conversions.FRAMES),
        (encoded(IMAGE.quantize(9), "GIF", save_all=True, append_images=[IMAGE.rotate(90)]), conversions.FRAMES),
        (encoded(IMAGE, "AVIF", save_all=True, append_images=[IMAGE.rotate(90)]), conversions.FRAMES),
        (encoded(IMAGE, "JPEG", exif=exif(6)), "jpg encoded again as jpg"),
        (encoded(IMAGE, "AVIF"), "avif encoded again as png"),
        (tiff(PHOTO, 8, photometric=8), conversions.LAB),
        (png_with_gamma(1.0), conversions.GAMMA),
        (encoded(IMAGE, "BMP"), "bmp encoded again as png"),
    ],
)
def test_what_is_left_aside_is_counted(data, name):
    """Nothing is lost unsaid, though these need no word from the user."""
    assert name in encode(data, EncodeOptions()).conversions
