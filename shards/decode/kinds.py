"""Which image format a file is of, by its first bytes and never by its name. It knows no decoder, and needs none."""

import re

# A file's first bytes that `kind_of` looks at; more does no harm.
HEAD_BYTES = 256

# By the bytes that a format starts with. Those read here are named in shards.decode.codec; the others have names so
# that a person hears which they are.
_STARTS = (
    (b"\xff\xd8\xff", "jpeg"),  # MPO, too: a JPEG followed by others
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"8BPS\0", "psd"),
    (b"qoif", "qoi"),
    (b"DDS ", "dds"),
    (b"icns", "icns"),
    (b"\x76\x2f\x31\x01", "exr"),
    (b"#?RADIANCE", "hdr"),
    (b"FUJIFILMCCD-RAW", "raw"),
    (b"IIRO", "raw"),
    (b"IIU\0", "raw"),
)
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes; "BM" alone begins many a text
_PNM = re.compile(rb"P[1-7]\s+(#|[0-9]|WIDTH)")
_AVIF, _HEIC = {b"avif", b"avis"}, {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}


def kind_of(head: bytes) -> str:
    """The format of a file that begins with `head`: jpeg, png, webp, gif, bmp, tiff, avif, heic, jxl, or one that is
    not read here (jp2, psd, ico, …); "" where it is no image. What it says need not decode."""
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head.startswith(_TIFF):
        return "raw" if head[8:10] == b"CR" else "tiff"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if head.startswith(b"\0\0\1\0") and head[4:6] != b"\0\0" and head[9:10] == b"\0":
        return "ico"
    if _PNM.match(head):
        return "pnm"
    return _boxed(head) if head[4:8] == b"ftyp" else ""


def _boxed(head: bytes) -> str:
    """AVIF or HEIC by the brands that ISO 14496-12's first box names; "" for a film, which has others."""
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[at : at + 4] for at in (8, *range(16, size - 3, 4))}
    if brands & _AVIF:
        return "avif"
    return "heic" if brands & _HEIC else ""
