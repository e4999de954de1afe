"""The approximate decoder: the same pixels whatever is installed, near the exact ones, and never taken by itself."""

import numpy as np
import pytest
from PIL import Image

from beitforge.pipeline.config.run_settings import Loader
from beitforge.shards.decode import codec, jpeg
from beitforge.shards.format.index import FLAG_JPEG
from tests.shards.decode.test_jpeg import HEIGHT, KINDS, PHOTO, WIDTH, boxes, stored


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_those_of_the_whole_image(kind):
    """So that pixels depend neither on nvImageCodec nor on the size of the crop."""
    data = stored(Image.fromarray(PHOTO), **KINDS[kind])
    whole = codec.decode_whole(data, FLAG_JPEG, jpeg.APPROXIMATE)
    for box in boxes(3, 12):
        x, y, width, height = box
        found = codec.decode_view(data, box, (WIDTH, HEIGHT), FLAG_JPEG, jpeg.APPROXIMATE)
        assert np.array_equal(found, whole[y : y + height, x : x + width]), box


@pytest.mark.parametrize(("kind", "most"), [("4:4:4", 4), ("4:2:0", 100)])  # squared levels, of an image of noise
def test_it_is_near_the_exact_pixels_and_not_they(kind, most):
    data = stored(Image.fromarray(PHOTO), **KINDS[kind])
    error = codec.decode_whole(data, FLAG_JPEG, jpeg.APPROXIMATE) - codec.decode(data).astype(float)
    assert 0 < np.mean(error**2) < most
    assert jpeg.decoder("approximate").name.startswith("approximate")


def test_no_other_name_takes_it():
    assert not any(jpeg.decoder(name).name.startswith("approximate") for name in jpeg.EXACT)
    assert Loader().decoder in jpeg.EXACT
