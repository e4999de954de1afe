"""JPEGs that libjpeg warns of: taken where every pixel is whole, refused where one may not be."""

import collections
import io
import os
import random
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageFile

from beitforge.shards.decode import codec, conversions, jpeg, jpeg_faults
from beitforge.shards.decode.codec import ImageError
from beitforge.shards.pack.encode import EncodeOptions, encode
from tests.shards.made_images import encoded, photo

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="minutes: BEITFORGE_NIGHTLY=1")

TO_RGB8 = EncodeOptions(to_rgb8=True)
EOI, SOS = b"\xff\xd9", b"\xff\xda"


def stored(mode: str = "RGB", **how) -> bytes:
    return encoded(Image.fromarray(photo(160, 120)).convert(mode), "JPEG", **{"quality": 85, **how})


KINDS = {
    "4:2:0": stored(subsampling=2),
    "4:4:4": stored(subsampling=0, optimize=True),
    "grey": stored("L"),
    "fine": stored(quality=98),
    "stored as RGB": stored(keep_rgb=True),
    "cmyk": stored("CMYK"),
    "restart markers": stored(restart_marker_blocks=5),
    "restart rows": stored(restart_marker_rows=1, subsampling=1),
    "progressive": stored(progressive=True),
    "progressive grey": stored("L", progressive=True),
    "profile": stored(icc_profile=b"p" * 900),
}
PLAIN = KINDS["4:2:0"]


def pillow(data: bytes, without_end: bool = False) -> np.ndarray | None:
    """What Pillow decodes, or None."""
    ImageFile.LOAD_TRUNCATED_IMAGES = without_end
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, IndexError, TypeError, EOFError):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


WANTED = {kind: pillow(data) for kind, data in KINDS.items()}


def starts(data: bytes) -> list[int]:
    """Where each segment before the first scan begins, and that scan."""
    found = [2]
    while data[found[-1] + 1] != SOS[1]:
        found.append(found[-1] + 2 + int.from_bytes(data[found[-1] + 2 : found[-1] + 4], "big"))
    return found


def put(data: bytes, at: int, what: bytes) -> bytes:
    return data[:at] + what + data[at:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, len(body) + 2) + body


def before(marker: bytes, what: bytes, data: bytes = PLAIN) -> bytes:
    return put(data, data.index(marker), what)


def half_a_profile() -> bytes:
    return put(PLAIN, 2, segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(128)))


def odd_scan_parameters() -> bytes:
    at = PLAIN.index(SOS) + 4 + 1 + 6
    return PLAIN[:at] + bytes(3) + PLAIN[at + 3 :]


ODD = {
    "JFIF version": PLAIN[:11] + b"\2" + PLAIN[12:],
    "two bytes before a table": before(b"\xff\xdb", bytes(2)),
    "five bytes before a table": before(b"\xff\xdb", b"stray"),
    "zeros before codes": before(b"\xff\xc4", bytes(2)),
    "bytes before the scan": before(SOS, b"\1\2\3"),
    "part of a profile": half_a_profile(),
    "scan parameters": odd_scan_parameters(),
    "64 bytes before the end": put(PLAIN, -2, b"\x55" * 64),
    "zeros before the end": put(PLAIN, -2, bytes(300)),
    "text before the end": put(PLAIN, -2, b"{'made': 'by a telephone', 'at': 12}"),
    "zeros before the end of grey": put(KINDS["grey"], -2, bytes(300)),
    "zeros before the end of restarts": put(KINDS["restart markers"], -2, bytes(300)),
    "zeros before the end of a progressive": put(KINDS["progressive"], -2, bytes(300)),
    "no end": PLAIN[:-2],
    "half an end": PLAIN[:-1],
    "no end of grey": KINDS["grey"][:-2],
    "no end of CMYK": KINDS["cmyk"][:-2],
    "no end of a progressive": KINDS["progressive"][:-2],
    "several": put(before(b"\xff\xdb", bytes(2), half_a_profile()), -2, b"\x55" * 64)[:-2],
}


@pytest.mark.parametrize("kind", ODD)
def test_whole_pixels_come_in_and_every_decoder_takes_them(kind):
    """What is stored is what the undamaged file holds, without what libjpeg warned of."""
    data = ODD[kind]
    assert jpeg_faults.warning(data)
    wanted = pillow(data, without_end=True)
    prepared = encode(data, TO_RGB8)
    assert conversions.CLEANED in prepared.conversions and prepared.extension == "jpg"
    assert jpeg_faults.warning(prepared.data) == ""
    assert jpeg_faults.cleaned(prepared.data)[1] is prepared.data
    assert np.array_equal(pillow(prepared.data), wanted)
    for decoder in jpeg.EXACT:
        assert np.array_equal(codec.decode_whole(prepared.data, prepared.facts.flags, decoder), wanted)


def test_a_jpeg_in_a_set_is_taken_as_it_is_where_pillow_decodes_it():
    """An adopted tar is not rewritten; without an end Pillow has nothing to give, and the image is bad."""
    for kind, data in ODD.items():
        if pillow(data) is None:
            with pytest.raises(ImageError, match="truncated"):
                codec.read_image(data)
        else:
            assert np.array_equal(codec.read_image(data)[1], pillow(data)), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_scan_is_damage(kind):
    """However little of its last bytes is missing, and with an end put behind what is left."""
    data = KINDS[kind]
    for missing in (3, 4, 10, 50, 400, len(data) // 3):
        for cut in (data[: -2 - missing], data[: -2 - missing] + EOI):
            with pytest.raises(ImageError, match=r"damaged|truncated"):
                encode(cut, TO_RGB8)


def test_missing_scans_and_restart_intervals_are_damage():
    """A progressive JPEG without its last scan decodes without a warning; without its end it must not pass as whole."""
    data = KINDS["progressive"]
    last = data.rindex(b"\xff\xc4")
    with pytest.raises(ImageError, match="truncated"):
        encode(data[:last], TO_RGB8)
    restarts = KINDS["restart markers"]
    marks = [i for i in range(len(restarts) - 1) if restarts[i] == 255 and 0xD0 <= restarts[i + 1] <= 0xD7]
    for first, count in ((0, 1), (2, 3), (1, 8), (len(marks) - 2, 1)):
        with pytest.raises(ImageError, match=r"damaged|truncated"):
            encode(restarts[: marks[first]] + restarts[marks[first + count] :], TO_RGB8)


def test_blocks_left_over_are_damage_whatever_their_number():
    """A frame said to be lower than it is: the scan goes on behind what is decoded, and no byte of it is stray."""
    at = PLAIN.index(b"\xff\xc0") + 5
    for height in (16, 64, 104, 112):
        with pytest.raises(ImageError, match="damaged"):
            encode(PLAIN[:at] + struct.pack(">H", height) + PLAIN[at + 2 :], TO_RGB8)


def harmed(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """One fault of a kind that disks, networks and programs make."""
    kind = rng.choice(
        ["bit", "byte", "zeros", "deleted", "inserted", "cut", "behind", "end", "head", "between", "swap"]
    )
    harm, size, scan = bytearray(data), len(data), data.rindex(SOS)
    some = rng.choice([1, 2, 8, 50, 400, 800])
    at = rng.randrange(2, size - 2)
    if kind == "bit":
        harm[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        harm[at] = rng.randrange(256)
    elif kind == "zeros":
        at = rng.randrange(scan, size - 3)
        harm[at : min(at + some, size - 2)] = bytes(min(some, size - 2 - at))
    elif kind == "deleted":
        del harm[at : at + some]
    elif kind == "inserted":
        harm[at:at] = rng.randbytes(min(some, 50))
    elif kind == "cut":
        del harm[rng.randrange(scan, size) :]
    elif kind == "behind":
        harm[-2:-2] = rng.choice([bytes, rng.randbytes, lambda n: b"\x55" * n, lambda n: b"\xff" * n])(some)
    elif kind == "end":
        del harm[-rng.choice([1, 2, 3, 4]) :]
    elif kind == "head":
        harm[rng.randrange(2, scan + 14)] ^= 1 << rng.randrange(8)
    elif kind == "between":
        at = rng.choice(starts(data))
        harm[at:at] = rng.choice([bytes, rng.randbytes])(rng.choice([1, 2, 5, 16]))
    else:
        at, some = rng.randrange(scan, size - 40), rng.randrange(1, 20)
        harm[at : at + 2 * some] = harm[at + some : at + 2 * some] + harm[at : at + some]
    return kind, bytes(harm)


def outcomes(seed: int, count: int) -> collections.Counter:
    """Of `count` single faults: (whether pixels are whole, whether libjpeg warns or Pillow fails, whether taken)."""
    rng, found = random.Random(seed), collections.Counter()
    for _ in range(count):
        kind = rng.choice(list(KINDS))
        data = harmed(rng, KINDS[kind])[1]
        suspect = pillow(data) is None or bool(jpeg_faults.warning(data))
        try:
            pixels, taken = pillow(codec.read_source(data, 10**7).data), True
        except ImageError:
            pixels, taken = pillow(data, without_end=True), False
        found[np.array_equal(pixels, WANTED[kind]), suspect, taken] += 1
    return found


def check(found: collections.Counter) -> None:
    whole, damaged = (found[same, True, True] + found[same, True, False] for same in (True, False))
    assert whole > 50 and damaged > 200
    assert found[False, True, True] <= 0.005 * damaged, found  # damage that libjpeg told of, and we took
    assert found[True, True, False] <= 0.25 * whole, found  # whole, told of, and refused
    assert found[True, False, False] == 0, found  # whole, and nothing told of it


def test_single_faults_are_told_apart():
    """Whatever libjpeg warned of was refused, whole or not; of what is whole most comes in now, of what is damaged next
    to nothing. What it does not warn of cannot be told and passes, as ever."""
    check(outcomes(0, 700))


@nightly
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_single_faults_are_told_apart(seed):
    found = outcomes(seed, 8000)
    print(dict(found))
    check(found)


@pytest.mark.parametrize("cut", [0, 1, 40], ids=["whole", "no end", "cut"])
def test_a_bomb_is_not_decoded_to_see_whether_it_is_whole(cut):
    """Its header claims four billion pixels; what refuses it takes no memory for them."""
    data = bytearray(stored())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="65000x65000 is more than"):
            codec.read_source(bytes(data[: len(data) - cut]))
        assert jpeg_faults.cleaned(bytes(data))[0]
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
