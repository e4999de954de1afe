"""Whether the pixels of a JPEG are whole where libjpeg warns, and the same JPEG without what it warned of.

Damage is what changes pixels. Between segments, and behind the last bit of a scan, bytes may be odd and change none: an
unknown JFIF version, two bytes before a table, part of a colour profile, bytes before the end, no end at all. So the
JPEG is put together again from what decides pixels, tables and coded data; a warning that is left is damage, but for
one: data left over when a scan has all its blocks. Either they are not the scan's, or bytes before them were changed,
and the blocks that should have followed are left. An encoder fills a scan's last byte with ones, and blocks of changed
data end at any bit, so the bits in between tell; and what is left of a changed scan goes on as blocks, to its very end.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg

from beitforge.shards.decode.faults import MAX_PIXELS

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_DHT, _SOS, _DQT, _DNL, _DRI, _COM = 0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE
_APP0, _APP2, _ADOBE, _APP15 = 0xE0, 0xE2, 0xEE, 0xEF
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_NEXT_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # behind coded data, where stuffed zeros and restarts belong
# How libjpeg's warnings begin; what else it says are errors, with which it gives up.
_WARNINGS = ("Corrupt JPEG data", "Warning: unknown JFIF", "Invalid SOS", "Premature end", "Unknown Adobe")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_EXTRA = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_PREFETCH = 8  # bytes that libjpeg may have read ahead, and does not count among those left over
_MOST_SCANS, _MOST_PIXELS = 32, 2**25  # looked at one by one
_MOST_EXTRA = 1 << 16  # bytes; more are no accident at the end
_MOST_WALKED = 1 << 21  # bytes
_MOST_PUSHED = 16  # bytes behind a table of codes that cannot be those of another


def sound(data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG of which libjpeg warns of nothing, by the one decoding that asks it: u8 [H, W, 3], three of
    the four bytes that each pixel has in memory, as Pillow has them. None of any other."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return None if height * width > MAX_PIXELS else simplejpeg.decode_jpeg(data, "RGBX")[..., :3]
    except ValueError:
        return None


def warning(data: bytes) -> str:
    """What libjpeg says against a JPEG that decoders, Pillow's among them, decode to something all the same; empty
    where it says nothing. Of several things it says the first."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            return f"{width}x{height} are more pixels than are decoded"
        simplejpeg.decode_jpeg(data, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY")
    except ValueError as error:
        return str(error)
    return ""


def cleaned(data: bytes) -> tuple[str, bytes]:
    """What damages the pixels of a JPEG, or ""; and the JPEG without what libjpeg warned of and without loss, which is
    `data` itself where it warned of nothing."""
    complaint = warning(data)
    whole = _parts(data) if complaint.startswith(_WARNINGS) else None
    if whole is None or whole.moved or not all(_codes(whole).values()):
        return complaint, data
    plain = whole.without(lambda marker, _: _is_aside(marker))
    fault = warning(plain.joined())
    if fault:
        fault, scans = _without_extra(plain)
        if fault:
            return fault, data
        whole = replace(whole, scans=scans)
    if not (whole.ended and whole.kind in _SEQUENTIAL) and not _complete(whole):
        return f"{complaint}; scans are missing", data
    found = whole.joined()
    if "ICC" in warning(found):
        found = whole.without(lambda marker, one: marker == _APP2 and one[4:15] == b"ICC_PROFILE").joined()
    return warning(found), found


@dataclass(frozen=True)
class _Scan:
    """`before` counts the segments that stand before it; `head` is its own, `coded` the data that follow."""

    before: int
    head: bytes
    coded: bytes


@dataclass(frozen=True)
class _Jpeg:
    """Segments (marker, bytes with the marker) and scans; what follows the end; whether there is an end; and whether
    stray bytes say that the segment before them is damaged."""

    segments: list[tuple[int, bytes]]
    scans: list[_Scan]
    behind: bytes
    ended: bool
    moved: bool

    @property
    def frame(self) -> bytes:
        return next((one for marker, one in self.segments if marker in _FRAMES), b"")

    @property
    def kind(self) -> int:
        return self.frame[1] if self.frame else 0

    @property
    def components(self) -> int:
        return self.frame[9] if len(self.frame) > 9 else 0

    def without(self, aside: Callable[[int, bytes], bool]) -> "_Jpeg":
        """With the segments emptied of which that holds."""
        return replace(self, segments=[(one[0], b"" if aside(*one) else one[1]) for one in self.segments])

    def joined(self, count: int | None = None) -> bytes:
        """The JPEG, or the one that ends with the first `count` scans."""
        scans = self.scans[:count]
        found, at = [_SOI], 0
        for scan in scans:
            found += [one for _, one in self.segments[at : scan.before]]
            found += [scan.head, scan.coded]
            at = scan.before
        return b"".join([*found, _EOI, self.behind if count is None else b""])


def _parts(data: bytes) -> _Jpeg | None:
    """The JPEG as libjpeg reads it, with what it passes over left out and odd fields set to what it takes them for;
    None where it has no frame or no scan, or segments are cut."""
    segments: list[tuple[int, bytes]] = []
    scans: list[_Scan] = []
    at, end, moved, ended = 2, len(data), False, False
    while (start := data.find(b"\xff", at)) >= 0:
        moved |= start > at and bool(segments) and not scans and _is_moved(data, at - len(segments[-1][1]), at, start)
        at = start
        while at < end and data[at] == 0xFF:
            at += 1
        marker, at = data[at] if at < end else 0, at + 1
        if marker == 0xD9:
            ended = True
            break
        if marker <= 1 or 0xD0 <= marker <= 0xD7:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body, at = data[at : at + length], at + length
        if marker == 0xD8 or length < 2 or at > end:
            return None
        if marker != _SOS:
            segments.append((marker, b"\xff%c" % marker + body))
            continue
        match = _NEXT_MARKER.search(data, at)
        stop = match.start() if match else len(data.rstrip(b"\xff"))
        scans.append(_Scan(len(segments), b"\xff\xda" + body, data[at:stop]))
        at = stop
    found = _Jpeg(segments, scans, data[at:] if ended else b"", ended, moved)
    return _set_right(found) if found.frame and scans else None


def _is_moved(data: bytes, start: int, end: int, following: int) -> bool:
    """Whether the stray bytes between a segment and the one `following` may come of damage to the segment that changes
    pixels and no more: bytes put into quantization tables push others out, no zeros; and a chain of segments that
    begins in one, and meets a marker behind it, says that its length is wrong and that it covers others."""
    stray = data[end:following]
    if stray[0] >= 0xC0 and int.from_bytes(stray[1:3], "big") + 1 == len(stray):  # a segment that lost its first byte
        return True
    if not _is_aside(data[start + 1]) and any(stray) and (data[start + 1] == _DQT or len(stray) > _MOST_PUSHED):
        return True
    for match in re.finditer(rb"\xff[\xc0-\xcf\xdb-\xfe]", data[start + 4 : end]):
        at = start + 4 + match.start()
        while at < end and data[at] == 0xFF and data[at + 1] != _SOS:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if at > end and data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] >= b"\xc0":
            return True
    return False


def _set_right(jpeg: _Jpeg) -> _Jpeg:
    """With the fields of headers that libjpeg warns of, and does not go by, as they should be."""
    segments = []
    for marker, one in jpeg.segments:
        if marker == _APP0 and one[4:9] == b"JFIF\0":
            one = one[:9] + b"\1" + one[10:]
        if marker == _ADOBE and one[4:9] == b"Adobe" and len(one) > 15 and one[15] > 2 and jpeg.components == 3:
            one = one[:15] + b"\1" + one[16:]
        segments.append((marker, one))
    heads = [scan.head[:-3] + b"\0\x3f\0" if jpeg.kind in _SEQUENTIAL else scan.head for scan in jpeg.scans]
    scans = [replace(scan, head=head) for scan, head in zip(jpeg.scans, heads, strict=True)]
    return replace(jpeg, segments=segments, scans=scans)


def _is_aside(marker: int) -> bool:
    """Whether a segment decides nothing that a scan is decoded by."""
    return _APP0 <= marker <= _APP15 or marker in (_COM, _DNL)


def _complete(jpeg: _Jpeg) -> bool:
    """Whether the scans there are say all of every component."""
    height, width = (int.from_bytes(jpeg.frame[i : i + 2], "big") for i in (5, 7))
    left = {jpeg.frame[10 + 3 * i]: np.full(64, 14) for i in range(jpeg.components)}
    for scan in jpeg.scans:
        count = scan.head[4]
        first, last, bits = scan.head[-3], scan.head[-2], scan.head[-1] & 15
        for i in range(count):
            left.get(scan.head[5 + 2 * i], np.zeros(64))[first : last + 1] = bits
    return bool(height and width) and not any(bits.any() for bits in left.values())


def _without_extra(plain: _Jpeg) -> tuple[str, list[_Scan]]:
    """What damages the scans, or "", and the scans without the bytes behind the last bit of each that are no part of
    it."""
    scans = list(plain.scans)
    size = int.from_bytes(plain.frame[5:7], "big") * int.from_bytes(plain.frame[7:9], "big")
    if len(scans) > 1 and (len(scans) > _MOST_SCANS or size > _MOST_PIXELS):
        return warning(plain.joined()), scans
    for i, scan in enumerate(scans):
        jpeg = replace(plain, scans=scans)
        if not (fault := warning(jpeg.joined(i + 1))):
            continue
        match = _EXTRA.search(fault)
        coded = _shortest(jpeg, i, int(match[1])) if match else b""
        if not coded or not _ends_by_itself(jpeg, i, coded):
            return fault, scans
        scans[i] = replace(scan, coded=coded)
    return "", scans


def _with(jpeg: _Jpeg, i: int, coded: bytes) -> bytes:
    """The JPEG that ends with scan i, of other data."""
    scans = [*jpeg.scans[:i], replace(jpeg.scans[i], coded=coded)]
    return replace(jpeg, scans=scans).joined(i + 1)


def _shortest(jpeg: _Jpeg, i: int, extra: int) -> bytes:
    """The fewest bytes of scan i that decode without a warning, where at least `extra` of them are left over."""
    coded = jpeg.scans[i].coded
    for cut in range(min(extra + _PREFETCH, len(coded) - 1), extra - 1, -1):
        short = coded[:-cut]
        if not short.endswith(b"\xff") and not warning(_with(jpeg, i, short)):
            return short
    return b""


def _ends_by_itself(jpeg: _Jpeg, i: int, coded: bytes) -> bool:
    """Whether scan i, of whose data `coded` are needed, was whole: its last byte is filled up with ones, and what is
    left over is not its own."""
    extra = jpeg.scans[i].coded[len(coded) :]
    if len(extra) > _MOST_EXTRA or _RESTART.search(extra) or coded.endswith(extra[:1] * 3):
        return False
    alone = len(jpeg.scans) == 1 and jpeg.scans[0].head[4] == jpeg.components
    if alone and jpeg.kind in _SEQUENTIAL and len(coded) <= _MOST_WALKED:
        rest = _rest(jpeg, coded)
        return rest is not None and "0" not in rest and not _goes_on(jpeg, rest, extra)
    # blocks of refinements cannot be told without all scans before
    unused = _unused_bits(lambda other: _with(jpeg, i, other), coded)
    last = coded[:-1][-1] if coded.endswith(b"\xff\0") else coded[-1]
    return last & (1 << unused) - 1 == (1 << unused) - 1 and len(set(extra)) == 1


def _unused_bits(made: Callable[[bytes], bytes], coded: bytes) -> int:
    """How many of the last bits of coded data nothing is decoded from."""
    wanted = _pixels(made(coded))
    at = len(coded) - (2 if coded.endswith(b"\xff\0") else 1)
    for bit in range(8):
        byte = bytes([coded[at] ^ 1 << bit])
        found = _pixels(made(coded[:at] + (b"\xff\0" if byte == b"\xff" else byte)))
        if found is None or wanted is None or not np.array_equal(found, wanted):
            return bit
    return 8


def _pixels(data: bytes) -> np.ndarray | None:
    try:
        return simplejpeg.decode_jpeg(data, "RGB" if simplejpeg.decode_jpeg_header(data)[2] != "CMYK" else "CMYK")
    except ValueError:
        return None


_Unit = list[tuple[dict[str, int], dict[str, int]]]


def _unit(jpeg: _Jpeg) -> _Unit:
    """The codes, of the first coefficient and of the others, of every block of a unit of the only scan."""
    codes = _codes(jpeg)
    found: _Unit = []
    for i in range(jpeg.components):
        sampling, tables = jpeg.frame[11 + 3 * i], jpeg.scans[0].head[6 + 2 * i]
        blocks = (sampling >> 4) * (sampling & 15) if jpeg.components > 1 else 1
        found += [(codes.get(tables >> 4, {}), codes.get(16 | tables & 15, {}))] * blocks
    return found


def _rest(jpeg: _Jpeg, coded: bytes) -> str | None:
    """The bits, fewer than 8, behind all units of the only scan; None where these are not its blocks."""
    unit, high, wide = _unit(jpeg), 8, 8
    if jpeg.components > 1:
        wide = 8 * max(jpeg.frame[11 + 3 * i] >> 4 for i in range(jpeg.components))
        high = 8 * max(jpeg.frame[11 + 3 * i] & 15 for i in range(jpeg.components))
    height, width = (int.from_bytes(jpeg.frame[i : i + 2], "big") for i in (5, 7))
    left = -(-height // high) * -(-width // wide)
    interval = next((int.from_bytes(one[4:6], "big") for marker, one in jpeg.segments if marker == _DRI), 0) or left
    bits = ""
    for part in _RESTART.split(coded):
        bits, at = _bits(part), 0
        for _ in range(min(interval, left)):
            for codes in unit:
                at = _block_end(bits, at, *codes)
        left -= interval
        bits = bits[at:] if at <= len(bits) else "0" * 8
        if len(bits) > 7:
            return None
    return bits if left <= 0 else None


def _goes_on(jpeg: _Jpeg, bits: str, extra: bytes) -> bool:
    """Whether `bits` and the bytes that follow are further blocks of the scan: whole ones, from any of a unit on, to
    the end of a unit behind which the last byte is filled up with ones."""
    unit = _unit(jpeg)
    return any(_walks_to_end(bits + _bits(extra), unit, first) for first in range(len(unit)))


def _bits(coded: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in coded.replace(b"\xff\0", b"\xff"))


def _walks_to_end(bits: str, unit: _Unit, first: int) -> bool:
    at = 0
    while at < len(bits):
        for codes in unit[first:]:
            if (at := _block_end(bits, at, *codes)) > len(bits):
                return False
        first = 0
        if len(bits) - at < 8 and "0" not in bits[at:]:
            return True
    return False


def _block_end(bits: str, at: int, direct: dict[str, int], alternating: dict[str, int]) -> int:
    """Where a block that begins at a bit ends; behind all bits if none does (ITU-T T.81, F.2.2)."""
    place, codes = 0, direct
    while place < 64:
        length = next((n for n in range(1, 17) if bits[at : at + n] in codes), 0)
        if not length or at + length > len(bits):
            return len(bits) + 1
        symbol = codes[bits[at : at + length]]
        at += length + (symbol & 15 if place else symbol)
        if place and symbol == 0:
            break
        place += 1 + (symbol >> 4 if place else 0)
        codes = alternating
    return at if place <= 64 else len(bits) + 1


def _codes(jpeg: _Jpeg) -> dict[int, dict[str, int]]:
    """By class and number (0x00-0x13) the Huffman codes, as text of 0 and 1, and what they stand for (T.81, C.2). Of a
    table with what no encoder writes there are none."""
    found: dict[int, dict[str, int]] = {}
    for marker, segment in jpeg.segments:
        at = 4
        while marker == _DHT and at + 17 <= len(segment):
            counts, code, symbol = segment[at + 1 : at + 17], 0, at + 17
            table = found[segment[at]] = {}
            for length, count in enumerate(counts, 1):
                for value in segment[symbol : symbol + count]:
                    table[f"{code:0{length}b}"] = value
                    code += 1
                symbol, code = symbol + count, code << 1
            most = 10 if segment[at] & 16 else 11  # bits of a coefficient of 8-bit pixels (T.81, F.1.2)
            if len(set(table.values())) < len(table) or any(value & 15 > most for value in table.values()):
                table.clear()
            at = symbol
    return found
