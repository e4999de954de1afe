"""Every decoder of JPEGs gives Pillow's pixels, whole and in part, or leaves the image to Pillow."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from beitforge.pipeline.config.fields import find_rules
from beitforge.pipeline.config.run_settings import Loader
from beitforge.shards.decode import codec, jpeg
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_JPEG, FLAG_NOT_RGB
from tests.conftest import ROOT
from tests.shards.made_images import photo

FAST = ("nvimgcodec", "simplejpeg")
PHOTO = photo()
HEIGHT, WIDTH = PHOTO.shape[:2]
KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "stored as RGB": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 3},
    "coarse": {"quality": 5},
    "fine": {"quality": 100, "optimize": True},
}


def stored(image: Image.Image, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def boxes(seed: int, count: int) -> list[list[int]]:
    """All of it, single pixels in the corners, the outermost columns, and any."""
    rng = np.random.default_rng(seed)
    found = [[0, 0, WIDTH, HEIGHT], [0, 0, 1, 1], [WIDTH - 1, HEIGHT - 1, 1, 1]]
    found += [[0, 0, 1, HEIGHT], [0, HEIGHT - 1, 1, 1], [WIDTH - 1, 0, 1, HEIGHT]]
    for _ in range(count):
        width, height = int(rng.integers(1, WIDTH + 1)), int(rng.integers(1, HEIGHT + 1))
        found.append([int(rng.integers(WIDTH - width + 1)), int(rng.integers(HEIGHT - height + 1)), width, height])
    return found


@pytest.mark.parametrize("decoder", FAST)
def test_it_is_installed_here(decoder):
    """Else nothing below tests it; launch.sh installs both."""
    made = jpeg.decoder(decoder)
    assert made.name.startswith(decoder)
    assert made.whole is not None
    assert (made.region is not None) == (decoder == "nvimgcodec")


@pytest.mark.parametrize("decoder", jpeg.EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pixels(decoder, kind):
    data = stored(Image.fromarray(PHOTO), **KINDS[kind])
    expected = codec.decode(data)
    flags = codec.read_header(data).flags
    assert np.array_equal(codec.decode_whole(data, flags, decoder), expected)
    for box in boxes(len(kind), 30):
        x, y, width, height = box
        found = codec.decode_view(data, box, (WIDTH, HEIGHT), flags, decoder)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected[y : y + height, x : x + width])


@pytest.mark.parametrize("decoder", jpeg.EXACT)
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_pillows(decoder, mode):
    data = stored(Image.fromarray(PHOTO).convert(mode), quality=90)
    flags = codec.read_header(data).flags
    assert flags & FLAG_NOT_RGB
    found = codec.decode_view(data, [3, 2, 20, 11], (WIDTH, HEIGHT), flags, decoder)
    assert np.array_equal(found, codec.decode(data)[2:13, 3:23])


@pytest.mark.parametrize("decoder", FAST)
def test_a_turn_in_exif_stays_unapplied(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(Image.fromarray(PHOTO), exif=exif)
    flags = codec.read_header(data).flags
    assert np.array_equal(
        codec.decode_view(data, [0, 0, 9, 7], (WIDTH, HEIGHT), flags, decoder), codec.decode(data)[:7, :9]
    )


@pytest.mark.parametrize("decoder", FAST)
def test_damage_that_pillow_decodes_gives_the_same(decoder):
    """Bits flipped before a set was indexed: nobody knows, but tokenizer and encoder must see the same."""
    data, rng, seen = stored(Image.fromarray(PHOTO), quality=92), np.random.default_rng(1), 0
    for _ in range(300):
        broken = bytearray(data)
        broken[int(rng.integers(2, len(data)))] ^= 1 << int(rng.integers(8))
        try:
            expected = codec.decode(bytes(broken))
        except codec.ImageError:
            continue
        if expected.shape != PHOTO.shape:
            continue
        flags = codec.read_header(bytes(broken)).flags
        found = codec.decode_view(bytes(broken), [4, 6, 25, 17], (WIDTH, HEIGHT), flags, decoder)
        assert np.array_equal(found, expected[6:23, 4:29])
        seen += 1
    assert seen > 100


@pytest.mark.parametrize("decoder", jpeg.DECODERS)
def test_what_does_not_decode_is_a_image_error(decoder):
    data = stored(Image.fromarray(PHOTO), quality=92)
    with pytest.raises(codec.ImageError):
        codec.decode_whole(data[: len(data) // 2], FLAG_JPEG, decoder)
    with pytest.raises(codec.ImageError):
        codec.decode_view(b"no image", [0, 0, 1, 1], (WIDTH, HEIGHT), FLAG_JPEG, decoder)


@pytest.mark.parametrize("decoder", jpeg.DECODERS)
@pytest.mark.parametrize("box", [[0, 1, WIDTH, HEIGHT], [-1, 0, 4, 4], [0, 0, 0, 3]], ids=str)
def test_a_box_outside_the_image_is_refused(decoder, box):
    """A decoder of regions would fill what lies outside with black."""
    data = stored(Image.fromarray(PHOTO))
    with pytest.raises(ShardError, match=f"{WIDTH}x{HEIGHT}"):
        codec.decode_view(data, box, (WIDTH, HEIGHT), FLAG_JPEG, decoder)


def test_the_settings_know_the_same_decoders():
    assert find_rules(Loader)["decoder"].choices == jpeg.DECODERS


def test_one_with_other_pixels_is_passed_over(monkeypatch):
    """A build of the library that rounds differently, and one that does not start."""
    made = jpeg.decoder("simplejpeg")
    off = jpeg.JpegDecoder("simplejpeg", lambda data: made.whole(data) ^ 1)

    def broken() -> jpeg.JpegDecoder:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: off)
    monkeypatch.setattr(jpeg, "_nvimgcodec", broken)
    jpeg._decoder.cache_clear()
    try:
        assert jpeg.decoder("auto").name.startswith("pillow")
        for name, reason in (("simplejpeg", "other pixels"), ("nvimgcodec", r"libcuda.*pip install '\.\[fast\]'")):
            with pytest.raises(ShardError, match=reason):
                jpeg.decoder(name)
    finally:
        jpeg._decoder.cache_clear()


def test_it_starts_without_a_word():
    """The libraries complain on stderr of every GPU library that is not there."""
    code = "from beitforge.shards.decode import jpeg; print(jpeg.decoder('auto').name)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("nvimgcodec")


def test_decoding_does_not_leak():
    """nvImageCodec 0.9.0 leaks at every address it gives out: 32 bytes an image were a gigabyte a worker in a run."""
    code = """if True:
        import io
        import numpy as np
        from PIL import Image
        from beitforge.shards.decode import jpeg
        file = io.BytesIO()
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "JPEG")
        decoder, data = jpeg.decoder("auto"), file.getvalue()
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        def run(count):
            for i in range(count):
                assert decoder.region(data, [i % 30, 3, 20 + i % 13, 20 + i % 17]) is not None
                decoder.whole(data)
        run(5_000)
        before = resident()
        run(30_000)
        print(resident() - before)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 30_000
