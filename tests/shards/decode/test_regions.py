"""A crop from an image with fast regions is that of the whole image, bit for bit, or the whole image is decoded."""

import io
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from beitforge.shards.decode import codec, jpeg, regions
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_JPEG, FLAG_REGIONS
from tests.shards.made_images import encoded, photo, resampled_jpeg

SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "4:4:0": 0, "grey": 0, "stored as RGB": 0}
SIZES = [(1, 1), (3, 5), (4, 16), (5, 33), (16, 16), (17, 15), (20, 100), (36, 31), (48, 32), (83, 67)]


def fast(sampling: str, width: int, height: int, **how) -> bytes:
    """An image with fast regions, as another writer of JPEGs may make them: by Pillow alone."""
    image = Image.fromarray(photo(width, height, seed=width * height))
    if sampling == "grey":
        image = image.convert("L")
    elif sampling == "stored as RGB":
        how["keep_rgb"] = True
    how = {"restart_marker_blocks": 1, **how}
    if sampling == "4:4:0":
        data = resampled_jpeg(0x12, width, height, **how)
    else:
        data = encoded(image, "JPEG", quality=88, subsampling=SAMPLINGS[sampling], **how)
    found = regions.with_table(data)
    assert found is not None
    return found


def boxes(width: int, height: int, count: int) -> list[list[int]]:
    """All of it, single pixels in the corners, a row and a column at every border, and any."""
    rng = np.random.default_rng(width * height)
    right, below = width - 1, height - 1
    found = [[0, 0, width, height], [0, 0, 1, 1], [right, 0, 1, 1], [0, below, 1, 1], [right, below, 1, 1]]
    found += [[0, 0, width, 1], [0, below, width, 1], [0, 0, 1, height], [right, 0, 1, height]]
    for _ in range(count):
        wide, high = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        found.append([int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1)), wide, high])
    return found


def cut_from_part(data: bytes, box: list[int], size: tuple[int, int]) -> np.ndarray:
    """The box, by the smaller JPEG alone."""
    found = regions.splice(data, box, size)
    assert found is not None
    part, x, y = found
    return simplejpeg.decode_jpeg(part, "RGB")[y : y + box[3], x : x + box[2]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_crop_is_the_whole_images(sampling, size):
    data = fast(sampling, *size)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(image.convert("RGB"))
    for box in boxes(*size, 100):
        x, y, width, height = box
        assert np.array_equal(cut_from_part(data, box, size), expected[y : y + height, x : x + width]), box


@pytest.mark.parametrize("decoder", jpeg.DECODERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_view_is_the_same_by_every_decoder(decoder, sampling):
    data, size = fast(sampling, 83, 67), (83, 67)
    flags = codec.read_header(data).flags
    assert flags & FLAG_REGIONS
    expected = codec.decode_whole(data, flags, decoder)
    assert np.array_equal(expected, codec.decode(data)) or decoder == jpeg.APPROXIMATE
    for box in boxes(*size, 20):
        x, y, width, height = box
        found = codec.decode_view(data, box, size, flags, decoder)
        assert np.array_equal(found, expected[y : y + height, x : x + width])


def test_a_view_is_decoded_from_its_part_alone(monkeypatch):
    """And a box that is nearly all of the image, whole."""
    data, size, seen = fast("4:2:0", 83, 67), (83, 67), []
    made = jpeg.JpegDecoder("spy", lambda part: seen.append(len(part)) or simplejpeg.decode_jpeg(part, "RGB"))
    monkeypatch.setattr(jpeg, "decoder", lambda _: made)
    flags = codec.read_header(data).flags
    codec.decode_view(data, [20, 20, 20, 20], size, flags)
    codec.decode_view(data, [0, 0, 83, 66], size, flags)
    codec.decode_view(data, [20, 20, 20, 20], size, FLAG_JPEG)
    assert seen[0] < len(data) / 2
    assert seen[1:] == [len(data)] * 2


def test_many_and_long_mcus():
    """Lengths above a byte, tables of several segments, more markers than are kept ready."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (720, 1000, 3)).astype(np.uint8)
    how = {"restart_marker_blocks": 1}
    long = regions.with_table(encoded(noise[:64, :80], "JPEG", quality=100, subsampling=2, **how))
    assert long is not None and len(long) > 255 * 20
    many = regions.with_table(encoded(noise, "JPEG", quality=70, subsampling=0, **how))
    assert many is not None
    for data, size, box in ((long, (80, 64), [17, 15, 40, 30]), (many, (1000, 720), [8, 9, 950, 650])):
        assert regions.fits(data)
        x, y, width, height = box
        assert np.array_equal(cut_from_part(data, box, size), codec.decode(data)[y : y + height, x : x + width])


def test_a_table_of_several_segments(monkeypatch):
    monkeypatch.setattr(regions, "_MOST_IN_SEGMENT", 10)
    data = fast("4:4:4", 83, 67)
    assert data.count(b"beitforge.mcus") > 2
    assert regions.fits(data)
    assert np.array_equal(cut_from_part(data, [30, 30, 9, 9], (83, 67)), codec.decode(data)[30:39, 30:39])


@pytest.mark.parametrize(
    "how",
    [
        {"restart_marker_blocks": 0},
        {"restart_marker_blocks": 2},
        {"restart_marker_rows": 1},
        {"progressive": True},
    ],
    ids=str,
)
def test_other_jpegs_have_no_fast_regions(how):
    data = encoded(photo(83, 67), "JPEG", **{"restart_marker_blocks": 1, **how})
    assert regions.with_table(data) is None
    assert regions.splice(data, [0, 0, 9, 9], (83, 67)) is None
    assert not codec.read_header(data).flags & FLAG_REGIONS


def test_other_samplings_and_colours_have_none():
    assert regions.with_table(resampled_jpeg(0x41, 83, 67, restart_marker_blocks=1)) is None
    assert (
        regions.with_table(encoded(Image.fromarray(photo()).convert("CMYK"), "JPEG", restart_marker_blocks=1)) is None
    )


def test_a_table_that_was_carried_along_is_replaced():
    """As by tools that keep what they do not know."""
    one, other = (encoded(photo(83, 67, seed), "JPEG", restart_marker_blocks=1) for seed in (1, 2))
    told, wanted = regions.with_table(other), regions.with_table(one)
    start, length = told.index(b"\xff\xea"), len(told) - len(other)
    old = told[start : start + length]
    scan = one.index(b"\xff\xda")
    for carried in (one[:2] + old + one[2:], one[:scan] + old + old + one[scan:], one[:2] + old + wanted[2:]):
        assert regions.with_table(carried) == wanted and not regions.fits(carried)
    assert regions.with_table(wanted) == wanted


def test_an_untrue_table_is_no_table():
    """A table of another image, of the same number of MCUs: the index does not call it one with fast regions."""
    one, other = (encoded(photo(83, 67, seed), "JPEG", restart_marker_blocks=1) for seed in (1, 2))
    told = regions.with_table(other)
    start, length = told.index(b"\xff\xea"), len(told) - len(other)
    scan = one.index(b"\xff\xda")
    forged = one[:scan] + told[start : start + length] + one[scan:]
    assert not regions.fits(forged)
    assert not codec.read_header(forged).flags & FLAG_REGIONS
    expected, flags = codec.decode(forged), FLAG_JPEG | FLAG_REGIONS  # by an index that says otherwise
    for box in boxes(83, 67, 30):
        x, y, width, height = box
        assert np.array_equal(codec.decode_view(forged, box, (83, 67), flags), expected[y : y + height, x : x + width])


def test_hostile_images_decode_or_are_refused():
    """Bytes changed before the coded data, where tables and sizes stand, put in, taken out: an array of the box's shape
    or ImageError, and no more memory than an image of those bytes may take."""
    data, size, rng = fast("4:2:0", 83, 67), (83, 67), np.random.default_rng(3)
    flags, start = FLAG_JPEG | FLAG_REGIONS, data.index(b"\xff\xda") + 14
    outcomes = {"array": 0, "refused": 0}
    for _ in range(1500):
        broken = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(2, start if rng.random() < 0.8 else len(broken)))
            kind = rng.integers(4)
            if kind == 0:
                broken[at] = int(rng.integers(256))
            elif kind == 1:
                broken[at] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                broken[at:at] = rng.bytes(int(rng.integers(1, 5)))
            else:
                del broken[at : at + int(rng.integers(1, 5))]
        box = boxes(83, 67, 1)[-1]
        try:
            found = codec.decode_view(bytes(broken), box, size, flags)
        except ShardError:
            outcomes["refused"] += 1
            continue
        assert found.dtype == np.uint8
        outcomes["array"] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize("table", [b"", b"\0" * 40, zlib.compress(b"\xff" * 5000), zlib.compress(b"\xff\xff" * 99)])
def test_a_table_of_nonsense_leads_to_the_whole_image(table):
    plain = encoded(photo(83, 67), "JPEG", restart_marker_blocks=1)
    scan, body = plain.index(b"\xff\xda"), b"beitforge.mcus\0" + table
    forged = plain[:scan] + b"\xff\xea" + (2 + len(body)).to_bytes(2, "big") + body + plain[scan:]
    assert regions.splice(forged, [5, 5, 9, 9], (83, 67)) is None
    found = codec.decode_view(forged, [5, 5, 9, 9], (83, 67), FLAG_JPEG | FLAG_REGIONS)
    assert np.array_equal(found, codec.decode(plain)[5:14, 5:14])


def test_a_bomb_of_a_table_is_not_unpacked():
    """No more is unpacked than MCUs can be in the file: the header of a large image does not make it so."""
    data = fast("4:4:4", 16, 16)
    frame = data.index(b"\xff\xc0")
    forged = data[: frame + 5] + b"\xff\xff\xff\xff" + data[frame + 9 :]
    assert regions.splice(forged, [0, 0, 9, 9], (65535, 65535)) is None
