"""Colour jitter on the device against Pillow's, which BEiT used; normalisation and the tokenizer's range."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from beitforge.kernels.pixels.reference import ORDERS
from beitforge.pipeline.model.pixels import from_tokenizer, jitter, normalise, tokenizer_input
from beitforge.shards.decode.codec import greys
from beitforge.shards.format.levels import Greys, view_levels
from beitforge.shards.format.views import JITTER_ORDERS

OPERATIONS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
CROPS = [(0, 0, 256, 256), (50, 150, 100, 80), (0, 0, 45, 60), (175, 15, 75, 150)]  # top, left, height, width


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """A real one, u8 [256, 256, 3]: every second pixel of astronaut.png, which ships inside scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-image is not installed")
    with Image.open(Path(spec.origin).parent / "data" / "astronaut.png") as image:
        return np.ascontiguousarray(np.asarray(image.convert("RGB"))[::2, ::2])


def pillow(photograph: np.ndarray, factors: tuple[float, ...], order: int) -> np.ndarray:
    """torchvision's ColorJitter on a Pillow image: the three enhancements one after the other."""
    image = Image.fromarray(photograph)
    for operation in JITTER_ORDERS[order]:
        image = OPERATIONS[operation](image).enhance(factors[operation])
    return np.asarray(image)


def ours(photograph: np.ndarray, crop: tuple[int, int, int, int], factors: tuple[float, ...], order: int) -> np.ndarray:
    """The crop jittered, with the whole image's greys; float64 [H, W, 3] in 0-255."""
    pixels = torch.from_numpy(part(photograph, crop).copy()).permute(2, 0, 1)[None]
    jittered = jitter(
        pixels, torch.tensor([factors]), torch.tensor([order]), torch.tensor([pivot(photograph, factors, order)])
    )
    return jittered[0].permute(1, 2, 0).double().numpy() * 255


def pivot(photograph: np.ndarray, factors: tuple[float, ...], order: int) -> float:
    """What contrast blends with."""
    operations = JITTER_ORDERS[order]
    applied = np.array([[factors[operation] for operation in operations]], np.float32)
    mean, tones = greys(photograph)
    of_image = Greys(np.array([mean], np.float32), np.array([tones], np.uint16))
    return float(view_levels(applied, operations[None], of_image)[0, 2])


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / np.mean((ours - theirs.astype(float)) ** 2)))


def compared(photograph: np.ndarray, factors: tuple[float, ...], order: int) -> list[float]:
    """PSNR of each of CROPS, the first being the whole image."""
    theirs = pillow(photograph, factors, order)
    return [psnr(ours(photograph, crop, factors, order), part(theirs, crop)) for crop in CROPS]


def part(photograph: np.ndarray, crop: tuple[int, int, int, int]) -> np.ndarray:
    top, left, height, width = crop
    return photograph[top : top + height, left : left + width]


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("factors", [(0.6, 0.6, 0.6), (0.75, 0.8, 1.3), (0.7, 1.35, 0.65)])
def test_darker_images_are_pillows(photograph, factors, order):
    """Pillow's arithmetic: what differs is the contrast's grey by a level, where brightness came before it. A crop has
    the whole image's grey, so it is as good."""
    assert min(compared(photograph, factors, order)) > 50


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("factors", [(1.3, 0.7, 1.2), (1.4, 0.6, 1.4)])
def test_brighter_images_are_pillows_up_to_clipping(photograph, factors, order):
    """Pillow takes the mean grey of the brightened, clipped image; ours follows from its tone table, all but what a
    saturation before it clips. The astronaut is white on white: this is about the worst case."""
    turns = JITTER_ORDERS[order].tolist()
    assert min(compared(photograph, factors, order)) > (48 if turns.index(2) < turns.index(1) else 50)


def test_the_mean_grey_is_that_of_the_whole_image(photograph):
    """The grey of a bright crop instead would be visibly another contrast."""
    crop, factors = CROPS[1], (1.0, 0.6, 1.0)
    theirs = part(pillow(photograph, factors, 0), crop)
    alone = np.ascontiguousarray(part(photograph, crop))
    assert abs(greys(alone)[0] - greys(photograph)[0]) > 20
    assert psnr(ours(photograph, crop, factors, 0), theirs) > 48
    assert psnr(ours(alone, (0, 0, 100, 80), factors, 0), theirs) < 31


def batch(count: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, factors, orders (each once) and pivots."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 9, 11), dtype=torch.uint8, generator=generator)
    factors = 0.6 + 0.8 * torch.rand(count, 3, generator=generator)
    return images, factors, torch.arange(count) % 6, (60 + 130 * torch.rand(count, generator=generator)).round()


def plain_jitter(image: np.ndarray, factors: np.ndarray, order: int, grey: float) -> np.ndarray:
    """One image [3, H, W] in float64, step by step; whole numbers after each, as Pillow has them."""
    x = image.astype(np.float64)
    luma = np.array([0.299, 0.587, 0.114])
    for operation in JITTER_ORDERS[order]:
        if operation == 0:
            x = x * factors[0]
        elif operation == 1:
            x = grey + factors[1] * (x - grey)
        else:
            own = np.round(np.tensordot(luma, x, axes=1))
            x = own + factors[2] * (x - own)
        x = np.floor(np.clip(x, 0, 255))
    return x / 255


def test_equals_the_plain_definition():
    images, factors, orders, greys = batch(24)
    found = jitter(images, factors, orders, greys)
    assert found.dtype == torch.float32
    for i in range(24):
        expected = plain_jitter(images[i].numpy(), factors[i].double().numpy(), int(orders[i]), float(greys[i]))
        # in float32 a value may fall on the other side of a whole number
        levels = np.abs(found[i].numpy() - expected) * 255
        assert levels.max() < 1.001 and (levels > 0.001).mean() < 0.01


def test_each_image_is_jittered_alone():
    """Nothing of an image depends on its neighbours in the batch."""
    everything = batch()
    together = jitter(*everything)
    for i in range(6):
        assert torch.equal(jitter(*(tensor[i : i + 1] for tensor in everything))[0], together[i])
    backwards = jitter(*(tensor.flip(0) for tensor in everything))
    assert torch.equal(backwards.flip(0), together)


@pytest.mark.parametrize("order", range(6))
def test_factors_of_one_change_nothing(order):
    """Exactly, whatever the order and the mean grey."""
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(order))
    greys = torch.tensor([0.0, 101.0, 200.0, 255.0])
    assert torch.equal(jitter(images, torch.ones(4, 3), torch.full((4,), order), greys), images.float() / 255)


def test_results_stay_in_range():
    images, _, orders, greys = batch()
    for factor in (0.0, 3.0):
        jittered = jitter(images, torch.full((6, 3), factor), orders, greys)
        assert 0 <= jittered.min() <= jittered.max() <= 1


def test_orders_are_those_of_the_record():
    """Two tables, because pixels must not know shards: row n means the same in both."""
    assert [list(order) for order in ORDERS] == JITTER_ORDERS.tolist()


def test_normalise():
    values = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = normalise(values, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 2.0), strict=True)):
        torch.testing.assert_close(found[:, channel], (values[:, channel] - mean) / std)


def test_tokenizer_range():
    """docs/recipe.md: 0.8 x + 0.1; and back, clamped."""
    values = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    torch.testing.assert_close(tokenizer_input(values), torch.tensor([[[[0.1, 0.3, 0.9]]]]))
    torch.testing.assert_close(from_tokenizer(tokenizer_input(values)), values)
    assert from_tokenizer(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 1.0]
