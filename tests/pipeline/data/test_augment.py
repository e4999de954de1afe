"""What fine-tuning does to images: timm's values where timm has them, and nothing that depends on who computes it."""

import random

import numpy as np
import pytest
import torch
import xxhash
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Config, Finetune, Model
from beitforge.pipeline.data.augment import RandAugment, erased_boxes, mixing, supervised_draws
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.torchvision_stub import install
from beitforge.pipeline.training.objectives import _smoothed, classified, erased, mixed
from beitforge.shards import counter_rng

install()
NEEDS_TIMM = pytest.mark.peers("timm")
WORDS = "rand-m9-mstd0.5-inc1"
MEAN = (0.5, 0.5, 0.5)


def sample_pixels(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@NEEDS_TIMM
def test_randaugment_is_the_samples_own():
    """The same sample, the same pixels, whatever was drawn before; others get others. Global generators are left."""
    augment = RandAugment(WORDS, (24, 32), MEAN, seed=3)
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).rand()
    first = {}
    for sample in (0, 5, 7, 9):
        first[sample] = sample_pixels()
        augment(sample, first[sample])
    assert (random.random(), np.random.rand()) == expected
    for sample in (9, 0, 7, 5):
        again = sample_pixels()
        RandAugment(WORDS, (24, 32), MEAN, seed=3)(sample, again)
        assert torch.equal(again, first[sample])
    assert len({tuple(pixels.flatten().tolist()) for pixels in first.values()}) > 1


@NEEDS_TIMM
def test_randaugment_is_timms():
    """Its operations with its generators at our seed give our pixels."""
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    augment, changed = RandAugment(WORDS, (24, 32), MEAN, seed=3), 0
    for sample in range(12):
        ours = sample_pixels()
        augment(sample, ours)
        number = int(counter_rng.bits(counter_rng.AUGMENT, 3, sample)[0])
        random.seed(number)
        np.random.seed([number & 0xFFFFFFFF, number >> 32])
        settings = {"translate_const": 10, "img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC}
        image = Image.fromarray(sample_pixels().permute(1, 2, 0).numpy())
        theirs = torch.from_numpy(np.array(rand_augment_transform(WORDS, settings)(image))).permute(2, 0, 1)
        assert torch.equal(ours, theirs)
        changed += not torch.equal(ours, sample_pixels())
    assert changed > 4


@NEEDS_TIMM
@pytest.mark.parametrize("words", ["m9", "rand-q9"])
def test_other_words_are_refused(words):
    with pytest.raises(ConfigError, match=rf"finetune.randaugment is '{words}'.*write it as rand-m9"):
        RandAugment(words, (24, 32), MEAN, seed=0)


@NEEDS_TIMM
@pytest.mark.parametrize("cut", [False, True])
def test_mixing_is_timms(cut, monkeypatch):
    """timm's Mixup of pairs, given our shares and middles of boxes, mixes pixels and labels as we do."""
    torch.manual_seed(0)
    pixels, labels, logits = torch.randn(6, 3, 24, 32), torch.tensor([0, 1, 2, 3, 4, 0]), torch.randn(6, 5)
    uniform = np.array([[0.2, 0.6, 0.9], [0.3, 0.95, 0.5], [0.9, 0.0, 0.5], [0.4, 0.99, 0.2]])
    drawn = mixing((24, 32), 0.0 if cut else 0.8, 1.0 if cut else 0.0, uniform)
    from timm.data.mixup import Mixup

    peer = Mixup(label_smoothing=0.1, num_classes=5, mode="pair")
    # cutmix's alpha is 1, whose share is the uniform number itself; it is then corrected to the box's area
    shares = uniform[1] if cut else drawn["share"]
    monkeypatch.setattr(peer, "_params_per_elem", lambda count: (shares.astype(np.float32), np.full(count, cut)))
    middles = iter([int(place * side) for pair in uniform[2:].T for place, side in zip(pair, (24, 32), strict=True)])
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(middles))
    theirs, targets = peer(pixels.clone(), labels)
    share, blend, box = (torch.from_numpy(np.concatenate([d, d[::-1]])) for d in drawn.values())
    torch.testing.assert_close(mixed(pixels, blend, box), theirs, rtol=0, atol=1e-6)
    config = Config(finetune=Finetune(smoothing=0.1))
    loss = share * _smoothed(config, logits, labels) + (1 - share) * _smoothed(config, logits, labels.flip(0))
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(1)).sum(1))


def test_shares_are_beta_distributed():
    """Mean and variance of Beta(0.8, 0.8); half of the pairs are cut where both are on."""
    uniform = counter_rng.uniform(counter_rng.MIX, 0, np.arange(4000), np.arange(4)[:, None])
    shares = mixing((24, 32), 0.8, 0.0, uniform)["share"]
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.05)
    assert np.mean(mixing((24, 32), 0.8, 1.0, uniform)["blend"] == 1.0) == pytest.approx(0.5, abs=0.03)
    assert (mixing((24, 32), 0.0, 1.0, uniform)["blend"] == 1.0).all()


@NEEDS_TIMM
def test_rectangles_are_timms():
    """How often one is erased, and the share of the image that goes, as timm's RandomErasing has them."""
    from timm.data.random_erasing import RandomErasing

    samples = np.arange(3000)
    boxes = erased_boxes(
        (32, 48), 0.25, lambda what, attempt: counter_rng.uniform(counter_rng.ERASE, 1, samples, what, attempt)
    )
    tall, wide = boxes[:, 2], boxes[:, 3]
    assert (tall < 32).all() and (wide < 48).all() and (boxes[:, 0] + tall <= 32).all()
    assert (boxes[:, 1] + wide <= 48).all() and (boxes[:, :2] >= 0).all()
    assert (tall > 0).mean() == pytest.approx(0.25, abs=0.03)
    random.seed(0)
    peer = RandomErasing(1.0, mode="const", device="cpu")
    theirs = [float((peer(torch.ones(1, 32, 48)) == 0).float().mean()) for _ in range(1000)]
    ours = (tall * wide)[tall > 0] / (32 * 48)
    assert ours.mean() == pytest.approx(np.mean(theirs), rel=0.08)
    assert ours.max() < 0.36


def test_noise_is_normal_and_the_samples_own():
    """Standard normal inside the box, nothing changed outside; the same in another batch."""
    pixels = torch.zeros(3, 3, 64, 64)
    boxes = torch.tensor([[0, 0, 64, 64], [8, 4, 20, 30], [0, 0, 0, 0]])
    noise = erased(pixels, boxes, torch.tensor([11, 12, 13]))
    assert noise[0].mean().item() == pytest.approx(0.0, abs=0.03)
    assert noise[0].std().item() == pytest.approx(1.0, abs=0.03) and torch.isfinite(noise).all()
    assert (noise[1, :, 8:28, 4:34] != 0).all() and int((noise[1] != 0).sum()) == 3 * 20 * 30
    assert not noise[2].any()
    alone = erased(pixels[1:2], boxes[1:2], torch.tensor([12]))
    assert torch.equal(alone[0], noise[1])
    neighbours = noise[0, 0, :, 1:].flatten(), noise[0, 0, :, :-1].flatten()
    assert abs(torch.corrcoef(torch.stack(neighbours))[0, 1].item()) < 0.05


def test_draws_follow_the_sample_not_the_batch():
    """Drop path, rectangles and noise; how a pair is mixed follows its first sample."""
    tune = Finetune(input_size=Size(32, 32), drop_path=0.5)
    whole = supervised_draws(tune, 4, 7, np.arange(8))
    part = supervised_draws(tune, 4, 7, np.array([2, 5]))
    for name in ("keep", "erase", "noise"):
        np.testing.assert_array_equal(part[name], whole[name][[2, 5]])
    assert whole["keep"].shape == (8, 4, 2) and whole["keep"][:, 0].all()
    pair = supervised_draws(tune, 4, 7, np.array([1, 6]))
    for name in ("share", "blend", "box"):
        np.testing.assert_array_equal(pair[name], whole[name][[1, 6]])
        np.testing.assert_array_equal(whole[name], whole[name][::-1])
    assert len(set(whole["share"].tolist())) == 4
    nothing = Finetune(drop_path=0, erase=0, mixup=0, cutmix=0)
    assert supervised_draws(nothing, Model().layers, 7, np.arange(8)) == {}


def test_golden_draws():
    """xxh3 of what a thousand samples draw, 500 from 0 on and their partners far away."""
    samples = np.concatenate([np.arange(500), 2**40 + 3 * np.arange(500)])
    drawn = supervised_draws(Finetune(erase=1.0, dropout=0.1), 12, 5, samples)
    assert {name: xxhash.xxh3_64_hexdigest(value.tobytes()) for name, value in drawn.items()} == {
        "keep": "2c9118f2862e99aa",
        "dropout": "973c7b411ba267d4",
        "erase": "93f5d6ce8da8a270",
        "noise": "4d1ea08e016b6648",
        "share": "8746cd0c0f028908",
        "blend": "0384fc86f15610ab",
        "box": "a800bf3338af4608",
    }


def test_a_padded_sample_counts_nothing():
    """Whatever its logits are, not finite ones, too."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [float("nan")] * 3])
    found = classified(logits, torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 0.0]))
    expected = F.cross_entropy(logits[:2].double(), torch.tensor([0, 0]), reduction="sum")
    assert found.tolist() == pytest.approx([float(expected), 1.0, 2.0, 2.0])
