"""JPEGs of which a crop is decoded alone: a restart marker behind every MCU, and a table of where they stand.

Behind a restart marker nothing depends on what stood before it (ITU-T T.81, E.1.4), so the MCUs under a box make a
smaller JPEG under the same tables, without one bit decoded. The table lies in APP10 segments, which decoders pass over:
their contents behind the name, put together, are a zlib stream of the lower bytes of the lengths of all MCUs, markers
included, and then of the upper bytes where any is not zero.
"""

import zlib
from dataclasses import dataclass

import numpy as np

_NAME = b"beitforge.mcus\0"
_SOI, _EOI, _EVERY_MCU = b"\xff\xd8", b"\xff\xd9", b"\xff\xdd\0\4\0\1"
_FRAMES, _SOS, _DRI, _DQT, _DHT, _COM = (0xC0, 0xC1), 0xDA, 0xDD, 0xDB, 0xC4, 0xFE
_APP0, _APP10, _ADOBE, _APP15 = 0xE0, 0xEA, 0xEE, 0xEF
_KEPT = (_APP0, _ADOBE, _DQT, _DHT, _DRI, *_FRAMES)
_SAMPLINGS = (0x11, 0x21, 0x12, 0x22)  # of luma; chroma has 0x11
_SCAN_ENDS = b"\0\x3f\0"
_MOST_SEGMENTS, _MOST_IN_SEGMENT = 1000, 65533 - len(_NAME)
_FANCY = 4  # pixels; libjpeg smooths chroma of half the width where the image is wider than this
_CYCLE = np.tile(np.arange(0xD0, 0xD8, dtype=np.uint8), 1024)  # restart markers as they follow one another


@dataclass(frozen=True)
class _Layout:
    """What the segments before the coded data say. `head`: those that a decoder needs, with SOI and SOS; `frame_at`:
    where in it the frame's segment begins; `scan_at`, `coded_at`: where in the JPEG SOS and the coded data begin;
    `tables`: from where to where the segments of the table go."""

    head: bytes
    frame_at: int
    scan_at: int
    coded_at: int
    table: bytes
    tables: list[tuple[int, int]]
    width: int
    height: int
    horizontal: int
    vertical: int

    @property
    def columns(self) -> int:
        """MCUs in a row."""
        return -(-self.width // (8 * self.horizontal))

    @property
    def count(self) -> int:
        return self.columns * -(-self.height // (8 * self.vertical))


def _layout(data: bytes) -> _Layout | None:
    """None of a JPEG that is no 8-bit sequential one of a single scan, with a restart marker at every MCU."""
    kept, table, tables, frame, frame_at, restarts = [_SOI], [], [], b"", 0, False
    at, end = 2, len(data)
    for _ in range(_MOST_SEGMENTS):
        if at + 4 > end or data[at] != 0xFF:
            return None
        marker, stop = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == _APP10 and data.startswith(_NAME, at + 4):
            table.append(data[at + 4 + len(_NAME) : stop])
            tables.append((at, stop))
        elif marker in _KEPT:
            segment = data[at:stop]
            if marker == _DRI:
                restarts = segment == _EVERY_MCU
            elif marker in _FRAMES:
                if frame:
                    return None
                frame, frame_at = segment, sum(map(len, kept))
            kept.append(segment)
        elif marker == _SOS:
            sampling = _sampling(frame, data[at:stop])
            if not (sampling and restarts):
                return None
            head, lead = b"".join([*kept, data[at:stop]]), int.from_bytes(frame[5:9], "big")
            sides = lead & 0xFFFF, lead >> 16
            return _Layout(head, frame_at, at, stop, b"".join(table), tables, *sides, sampling >> 4, sampling & 15)
        elif not (_APP0 <= marker <= _APP15 or marker == _COM):
            return None
        at = stop
    return None


def _sampling(frame: bytes, scan: bytes) -> int:
    """The sampling factors that a frame and its only scan have in an MCU, 0 where they are none of those known here."""
    components = frame[9] if len(frame) > 9 else 0
    if components not in (1, 3) or len(frame) != 10 + 3 * components or frame[4] != 8:
        return 0
    if not (any(frame[5:7]) and any(frame[7:9])):
        return 0
    if len(scan) != 8 + 2 * components or scan[4] != components or not scan.endswith(_SCAN_ENDS):
        return 0
    if frame[11] not in _SAMPLINGS or (components == 3 and not frame[14] == frame[17] == 0x11):
        return 0
    return frame[11] if components == 3 else 0x11  # of a single component an MCU is one block (T.81, A.2.2)


def _scanned(data: bytes, layout: _Layout) -> np.ndarray | None:
    """i64 [count + 1]: where each MCU begins and the last one's end of image ends, by the markers themselves; None
    where these are not all there in their order."""
    coded = np.frombuffer(data, np.uint8)[layout.coded_at :]
    if layout.count * 2 > len(coded):
        return None
    marks = np.flatnonzero((coded[:-1] == 0xFF) & (coded[1:] != 0))[: layout.count]
    numbers = np.resize(_CYCLE, layout.count)
    numbers[-1] = _EOI[1]
    if not np.array_equal(coded[marks + 1], numbers):
        return None
    return np.concatenate([[0], marks + 2]) + layout.coded_at


def _told(data: bytes, layout: _Layout) -> np.ndarray | None:
    """What `_scanned` finds, as the table says it, if it can be so: no place beyond the data."""
    count = layout.count
    if count * 2 > len(data):
        return None
    try:
        raw = zlib.decompressobj().decompress(layout.table, 2 * count + 1)
    except zlib.error:
        return None
    if len(raw) not in (count, 2 * count):
        return None
    places = np.empty(count + 1, np.int64)
    places[0] = layout.coded_at
    bytes_of = np.frombuffer(raw, np.uint8)
    np.cumsum(bytes_of[:count], out=places[1:])
    if len(raw) > count:
        places[1:] += bytes_of[count:].cumsum(dtype=np.int64) << 8
    places[1:] += layout.coded_at
    return places if places[-1] <= len(data) else None


def with_table(data: bytes) -> bytes | None:
    """The JPEG with the table of its MCUs, in the place of one that other tools have carried along; None of one that is
    not as `splice` needs it."""
    layout = _layout(data)
    places = _scanned(data, layout) if layout else None
    if layout is None or places is None:
        return None
    lengths = np.diff(places)
    if lengths.max() > 0xFFFF:
        return None
    planes = [(lengths & 0xFF).astype(np.uint8).tobytes(), (lengths >> 8).astype(np.uint8).tobytes()]
    table = zlib.compress(planes[0] + (planes[1] if any(planes[1]) else b""))
    parts = [table[at : at + _MOST_IN_SEGMENT] for at in range(0, len(table), _MOST_IN_SEGMENT)]
    segments = [b"\xff%c" % _APP10 + (2 + len(_NAME + part)).to_bytes(2, "big") + _NAME + part for part in parts]
    ends = [0, *(at for span in layout.tables for at in span), layout.scan_at]
    others = [data[start:stop] for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    return b"".join([*others, *segments, data[layout.scan_at :]])


def fits(data: bytes) -> bool:
    """Whether the JPEG has a table, and it is true."""
    layout = _layout(data)
    if layout is None or not layout.table:
        return False
    told, found = _told(data, layout), _scanned(data, layout)
    return told is not None and found is not None and np.array_equal(told, found)


def splice(data: bytes, box: list[int], size: tuple[int, int]) -> tuple[bytearray, int, int] | None:
    """A JPEG of the MCUs that decide the pixels in a box x, y, width, height within an image of `size` (width, height),
    and where in it the box begins; None where the JPEG is not as `with_table` makes it.

    Where chroma is halved, decoders smooth it with that of the next MCU: so there is a pixel more on each side.
    """
    layout = _layout(data)
    if layout is None or (layout.width, layout.height) != size or (places := _told(data, layout)) is None:
        return None
    high, wide, columns = 8 * layout.vertical, 8 * layout.horizontal, layout.columns
    x0, x1 = _span(box[0], box[2], size[0], wide)
    y0, y1 = _span(box[1], box[3], size[1], high)
    right, below = _end(box[0], box[2], size[0], wide), _end(box[1], box[3], size[1], high)
    if wide > 8 and right - x0 * wide <= _FANCY:
        right = min(x0 * wide + _FANCY + 1, size[0])
        x0 -= bool(x0) and right - x0 * wide <= _FANCY
    starts, stops = (places[y0 * columns + x : (y1 - 1) * columns + x + 1 : columns] for x in (x0, x1))
    before = starts[int(x0 == y0 == 0) :] - 2  # of each row's first MCU, where a marker has to be
    if not (np.frombuffer(data, np.uint8)[before] == 0xFF).all():
        return None
    parts = [data[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    found = bytearray().join([layout.head, *parts])
    moved = (stops - starts).cumsum() - stops + (len(layout.head) - 1)
    ends = (places[1:].reshape(-1, columns)[y0:y1, x0:x1] + moved[:, None]).ravel()  # each MCU's last byte
    coded = np.frombuffer(found, np.uint8)
    if not (coded[ends - 1] == 0xFF).all():
        return None
    coded[ends] = _CYCLE[: len(ends)] if len(ends) <= len(_CYCLE) else np.resize(_CYCLE, len(ends))
    found[-2:] = _EOI
    sides = below - y0 * high << 16 | right - x0 * wide
    found[layout.frame_at + 5 : layout.frame_at + 9] = sides.to_bytes(4, "big")
    return found, box[0] - x0 * wide, box[1] - y0 * high


def _span(start: int, length: int, side: int, unit: int) -> tuple[int, int]:
    """The first MCU, of `unit` pixels, that decides those pixels of a side, and the one behind the last."""
    return max(start - (unit > 8), 0) // unit, -(-_end(start, length, side, unit) // unit)


def _end(start: int, length: int, side: int, unit: int) -> int:
    """Behind the last pixel that decides those, so that no more are made of the last MCUs than are needed."""
    return min(start + length + (unit > 8), side)
