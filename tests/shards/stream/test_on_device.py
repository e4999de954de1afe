"""Pixels made where a batch is used: the bits of a worker's, but for what a GPU's decoder makes otherwise."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitforge.pipeline.data import batches
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.stages import pretrain
from beitforge.shards.decode import gpu, jpeg
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_JPEG
from beitforge.shards.stream import fixed_point
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Stream, cut_into
from beitforge.shards.stream.on_device import OnDevice
from tests.shards.stream.test_stream import split, stream_rows, tiny_config

CPU = torch.device("cpu")
SIZES = ((224, 224), (112, 112), (17, 41), (40, 9), (3, 2))


@pytest.fixture
def gpu_config(tiny, monkeypatch):
    """A config whose images are decoded on a device, which here is the processor."""
    monkeypatch.setattr(batches, "_on_device", lambda stream: OnDevice(stream, CPU))
    return tiny_config(tiny, "loader.decoder=gpu")


@pytest.mark.parametrize("resample", [fixed_point.TORCH, fixed_point.TORCH_LANCZOS, "bicubic", "lanczos"])
def test_many_are_resized_to_the_bits_of_one(resample):
    """Of photographs and of black and white noise, where sums overshoot; wide, tall, enlarged and shrunk."""
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (*rng.integers(1, 300, 2), 3), dtype=np.uint8) for _ in range(12)]
    images += [np.where(image > 127, np.uint8(255), np.uint8(0)) for image in images[:6]]
    images += [np.full((90, 5, 3), 255, np.uint8), images[0][:1], images[0][:, :1]]
    for size in SIZES:
        able = [image for image in images if fixed_point.resizes(image.shape[:2], size, resample)]
        found = fixed_point.resize([torch.from_numpy(image) for image in able], size, resample)
        for image, mine in zip(able, found, strict=True):
            expected = torch.empty((3, *size), dtype=torch.uint8)
            cut_into(expected, image, False, [0, 255], resample)
            assert torch.equal(mine, expected), (image.shape, size)


def test_a_pixel_of_too_many_is_left_to_others():
    """Sums would leave what float32 holds."""
    assert fixed_point.resizes((3000, 4000), (224, 224), "lanczos")
    assert not fixed_point.resizes((3000, 20_000), (224, 224), "lanczos")


@pytest.mark.parametrize("online", [False, True])
def test_a_batch_is_finished_to_the_same_bits(tiny, online):
    """With a tokenizer's pixels, too."""
    changes = ["data.tokens=online"] if online else []
    stream = pretraining(tiny_config(tiny, *changes)).stream
    samples = np.arange(40, dtype=np.int64)
    expected = stream.batch(samples)
    begun = dataclasses.replace(stream, decoder="gpu", defer=True).batch(samples)
    assert {one.row for one in begun.deferred} == set(range(40)) - _rows_of_others(stream, samples)
    found = OnDevice(stream, CPU).finish(begun)
    assert not found.deferred
    assert split(found) == split(expected)
    assert torch.equal(found.tokenizer_pixels, expected.tokenizer_pixels)
    assert expected.tokenizer_pixels.numel() > 0 or not online


def _rows_of_others(stream: Stream, samples: np.ndarray) -> set[int]:
    """Places of images that are no JPEGs in RGB."""
    _, shards, rows = stream.places.locate(samples)
    known = [stream.images.row(*place) for place in zip(shards.tolist(), rows.tolist(), strict=True)]
    return {i for i, row in enumerate(known) if not row.flags & FLAG_JPEG or row.flags & 16}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_same_sequence_for_any_ranks_and_workers(tiny, gpu_config):
    exact = tiny_config(tiny)
    expected = stream_rows(exact, pretraining(exact), 0, 3, ranks=1, workers=0)
    for ranks, workers in ((1, 0), (2, 1)):
        assert stream_rows(gpu_config, pretraining(gpu_config), 0, 3, ranks, workers) == expected


def test_an_image_that_does_not_decode_is_substituted(tiny, monkeypatch):
    """As in a worker: the same stand-in, with its tokens and its record, and it is counted."""
    stream = pretraining(tiny_config(tiny)).stream
    samples = np.arange(12, dtype=np.int64)
    broken = stream.batch(samples[5:6])
    read = ImageSet.read_row

    def damaged(images, shard, row, known):
        data = read(images, shard, row, known)
        return data[:300] if known.key_hash == victim.key_hash else data

    _, shards, rows = stream.places.locate(samples[5:6])
    victim = stream.images.row(int(shards[0]), int(rows[0]))
    monkeypatch.setattr(ImageSet, "read_row", damaged)
    expected = stream.batch(samples)
    found = OnDevice(stream, CPU).finish(dataclasses.replace(stream, decoder="gpu", defer=True).batch(samples))
    assert [bad.sample for bad in expected.bad] == [5]
    assert [(bad.sample, bad.key, bad.substitute) for bad in found.bad] == [
        (bad.sample, bad.key, bad.substitute) for bad in expected.bad
    ]
    assert split(found) == split(expected)
    assert not torch.equal(found.pixels[5], broken.pixels[0])


def test_boxes_of_many_images_are_those_of_one(tmp_path: Path):
    """Again and again into the same memory, larger and smaller ones by turns; what is no JPEG gives nothing."""
    many, one = gpu.BatchDecoder(None), jpeg.decoder("pillow")
    rng = np.random.default_rng(2)
    for _ in range(6):
        asked, expected = [], []
        for _ in range(int(rng.integers(1, 6))):
            height, width = rng.integers(8, 90, 2).tolist()
            file = tmp_path / "image.jpg"
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, quality=80)
            box = [int(rng.integers(width // 2)), int(rng.integers(height // 2)), width // 2, height // 2]
            asked.append((file.read_bytes(), box))
            with Image.open(file) as image:
                expected.append(np.asarray(image)[box[1] : box[1] + box[3], box[0] : box[0] + box[2]])
        asked.insert(1, (b"no image", [0, 0, 4, 4]))
        found = many.boxes(asked)
        assert found.pop(1) is None
        assert all(np.array_equal(pixels.array(), right) for pixels, right in zip(found, expected, strict=True))
    assert one.whole is None


def test_without_a_gpu_it_says_so(tiny):
    assert not torch.cuda.is_available()
    config = tiny_config(tiny, "loader.decoder=gpu")
    with pytest.raises(ConfigError, match=r"loader\.decoder is gpu, .* no GPU: set loader\.decoder=auto"):
        stream_rows(config, pretraining(config), 0, 1, ranks=1, workers=0)
    with pytest.raises(ConfigError, match=r"loader\.decoder is gpu, .* no GPU"):
        pretrain._opened(config)  # before anything is started


def test_a_host_without_nvjpeg_says_what_to_install(monkeypatch):
    def broken():
        raise ImportError("no module")

    monkeypatch.setattr(jpeg, "nvimgcodec", broken)
    with pytest.raises(ShardError, match=r"nvJPEG does not start.*no module.*pip install"):
        gpu.BatchDecoder(0)


def test_what_decodes_is_named_with_its_distance(tiny, monkeypatch):
    """From Pillow's pixels, as a run's first line has it."""
    made = OnDevice(pretraining(tiny_config(tiny)).stream, CPU)
    assert made.describe().endswith("(Pillow's pixels)")
    crops = made.crops
    monkeypatch.setattr(made, "crops", lambda deferred: [(crop ^ 2) for crop in crops(deferred)])
    assert made.describe().endswith("(up to 2 levels from Pillow's pixels of noise)")
