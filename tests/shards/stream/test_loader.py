"""How a worker cuts a view: crop, clamp, resize, flip."""

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image, ImageOps

from beitforge.shards.decode import codec
from beitforge.shards.format.levels import BRIGHTNESS, CONTRAST, SATURATION, view_levels, without_tones
from beitforge.shards.stream.loader import TORCH, TORCH_LANCZOS, cut_into
from tests.shards.made_images import photo

PHOTO = photo()
HEIGHT, WIDTH = PHOTO.shape[:2]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
EVERYTHING = [0, 255]
GOLDEN = {
    "torch bicubic": "adca3f3d081c9e12",
    "torch lanczos": "98044d5567b9e68b",
    "bicubic": "faa34d3afc1880f3",
    "lanczos": "3eb16358321525a8",
}


@pytest.mark.parametrize("limits", [EVERYTHING, [30, 180]], ids=str)
@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [[0, 0, WIDTH, HEIGHT], [5, 3, 30, 20], [WIDTH - 1, HEIGHT - 1, 1, 1]], ids=str)
def test_a_view_is_pillows_crop_resize_mirror(box, flip, resample, limits):
    """The official transform's order and filters, bit for bit."""
    x, y, width, height = box
    image = Image.fromarray(PHOTO.clip(*limits))
    expected = image.crop((x, y, x + width, y + height)).resize((14, 16), FILTERS[resample])
    expected = ImageOps.mirror(expected) if flip else expected
    before, view = PHOTO.copy(), torch.empty((3, 16, 14), dtype=torch.uint8)
    cut_into(view, codec.crop(PHOTO, box), flip, limits, resample)
    np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert np.array_equal(PHOTO, before), "other views are cut from the same image"


@pytest.mark.parametrize("flip", [False, True])
def test_torchs_bicubic_is_pillows_to_a_level(flip):
    ours, theirs = (torch.empty((3, 24, 20), dtype=torch.uint8) for _ in range(2))
    crop = codec.crop(PHOTO, [2, 1, 40, 28])
    cut_into(ours, crop, flip, EVERYTHING, TORCH)
    cut_into(theirs, crop, flip, EVERYTHING, "bicubic")
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("factors", "turns", "limits"),
    [
        ((1.0, 1.0, 1.0), (BRIGHTNESS, CONTRAST), [0, 255]),
        ((0.6, 1.0, 1.3), (BRIGHTNESS, CONTRAST), [0, 255]),
        ((1.25, 1.0, 1.0), (BRIGHTNESS, CONTRAST), [0, 204]),  # 255 / 1.25
        ((1.25, 1.0, 0.8), (SATURATION, BRIGHTNESS), [0, 255]),  # a colour drawn back first may not clip
        ((1.25, 1.0, 1.2), (SATURATION, BRIGHTNESS), [0, 204]),
        ((1.0, 1.5, 1.0), (CONTRAST, BRIGHTNESS), [33, 204]),  # 100 + 1.5 (x - 100) in [0, 255]: 33.3 … 203.3
        ((1.2, 1.5, 1.0), (CONTRAST, BRIGHTNESS), [33, 175]),  # 1.2 times that: 175
        ((1.2, 1.5, 1.0), (BRIGHTNESS, CONTRAST), [33, 175]),  # 1.2 x; 120 + 1.5 (1.2 x - 120)
        ((0.0, 1.0, 1.0), (BRIGHTNESS, CONTRAST), [0, 255]),
    ],
)
def test_limits_are_where_the_jitter_clips(factors, turns, limits):
    """An image of mean grey 100. Rounded outwards, so that nothing that would not clip is touched."""
    operations = np.array([[*turns, 3 - sum(turns)]])
    applied = np.array([[factors[operation] for operation in operations[0]]], np.float32)
    levels = view_levels(applied, operations, without_tones(np.array([100.0], np.float32)))
    assert levels[:, :2].tolist() == [limits]


def test_torchs_lanczos_is_pillows_to_the_noise():
    """Fixed point with weights of 16 bits where Pillow's have 22: a level at most, and 66 dB and more where it
    shrinks."""
    errors = []
    for box in ([7, 7, 9, 12], [5, 3, 30, 20], [2, 1, 40, 28], [0, 0, WIDTH, HEIGHT]):
        ours, theirs = (torch.empty((3, 16, 14), dtype=torch.uint8) for _ in range(2))
        cut_into(ours, codec.crop(PHOTO, box), True, EVERYTHING, TORCH_LANCZOS)
        cut_into(theirs, codec.crop(PHOTO, box), True, EVERYTHING, "lanczos")
        assert (ours.int() - theirs.int()).abs().max() <= 1
        errors.append((ours.double() - theirs.double()).square().mean())
    shrunk = torch.stack(errors[1:]).mean()
    assert shrunk > 0, "two arithmetics"
    assert 10 * torch.log10(255**2 / shrunk) > 66


def test_the_pixels_of_every_filter_are_what_they_were():
    """xxh3-64 of the view of box 5, 3, 30, 20: tokens were made of such pixels."""
    views = {}
    for name in (TORCH, TORCH_LANCZOS, "bicubic", "lanczos"):
        view = torch.empty((3, 16, 14), dtype=torch.uint8)
        cut_into(view, codec.crop(PHOTO, [5, 3, 30, 20]), False, [10, 240], name)
        views[name] = xxhash.xxh3_64_hexdigest(view.numpy().tobytes())
    assert views == GOLDEN
