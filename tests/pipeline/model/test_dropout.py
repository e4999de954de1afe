"""Dropout: the right share, at the right scale, and a function of sample, place and layer alone."""

import dataclasses

import numpy as np
import pytest
import torch

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Finetune, Model
from beitforge.pipeline.data.augment import supervised_draws
from beitforge.pipeline.model.beit import Classifier, initialise
from beitforge.pipeline.model.dropout import Dropout, dropped

MODEL = Model(input_size=Size(12, 12), patch_size=3, layers=3, width=24, heads=2, positions="relative", drop_path=0.2)
SEEDS = torch.tensor([5, 0, 2**32 - 1, 77])

pytestmark = pytest.mark.usefixtures("one_thread")


def classifier(**changes) -> Classifier:
    made = Classifier(dataclasses.replace(MODEL, **changes), 10)
    initialise(made, 1, truncation=100)
    made.dropout, made.attention_dropout = 0.1, 0.2
    return made


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 3, 12, 12, generator=generator), torch.rand(4, 3, 2, generator=generator) > 0.1


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_and_the_scale_are_torchs(rate):
    """A number is 0 or divided by 1 - rate; so is its gradient."""
    x = torch.full((4, 100, 500), 3.0, requires_grad=True)
    y = dropped(x, rate, SEEDS, 3)
    kept = y != 0
    assert float((~kept).float().mean()) == pytest.approx(rate, abs=0.003)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 3 / (1 - rate)))
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    torch.testing.assert_close(x.grad[kept], y.detach()[kept] / 3)
    half = dropped(x.detach().bfloat16(), rate, SEEDS, 3)
    assert half.dtype == torch.bfloat16 and torch.equal(half != 0, kept)


def test_samples_layers_and_places_are_apart():
    """No two draws that a step makes agree more often than chance; nor do neighbours within one."""
    ones, found = torch.ones(1, 20_000), []
    for seed in range(6):
        drop = Dropout(0.5, 0.5, torch.tensor([seed]))
        for layer in range(3):
            here = dataclasses.replace(drop, layer=layer)
            found += [here.outputs(ones, where)[0] for where in (0, 2, 3)] + [here.probabilities(ones)[0]]
    draws = torch.stack(found) / 2
    apart = torch.corrcoef(draws) - torch.eye(len(draws))
    assert float(apart.abs().max()) < 0.04  # 4.5 deviations of 2,556 pairs
    for step in (1, 2, 24, 17 * 24):
        neighbours = torch.stack([draws[:, step:].flatten(), draws[:, :-step].flatten()])
        assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01


def test_golden_numbers():
    """dropped(torch.ones(2, 64), 0.5, torch.tensor([0, 123456789]), 7) != 0, packed. A change breaks resumed runs."""
    kept = dropped(torch.ones(2, 64), 0.5, torch.tensor([0, 123456789]), 7) != 0
    weights = 2 ** torch.arange(32)
    assert (kept.view(2, 2, 32) * weights).sum(dim=2).tolist() == [[3683762545, 3096492596], [4265213951, 1761749879]]


def test_a_sample_is_the_same_in_any_batch():
    """Alone, elsewhere in a batch, with activations computed again: its logits and what it gives to the gradient."""
    pixels, keep = inputs()
    whole = classifier()(pixels, keep, SEEDS)
    assert not torch.allclose(whole, classifier()(pixels, keep, None), atol=1e-3)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(classifier()(pixels[order], keep[order], SEEDS[order]), whole[order])
    torch.testing.assert_close(classifier()(pixels[1:2], keep[1:2], SEEDS[1:2]), whole[1:2])
    gradients = []
    for how in ("none", "full", "selective"):
        made = classifier()
        made.checkpointing = how
        made(pixels.clone().requires_grad_(), keep, SEEDS).square().sum().backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_kernels_agree_and_evaluation_drops_nothing():
    """Dropout of outputs alone leaves the choice of kernels; that of probabilities takes the reference."""
    pixels, keep = inputs()
    for attention_dropout in (0.0, 0.2):
        found = []
        for kernels in ("sdpa", "reference"):
            made = classifier(kernels=kernels)
            made.attention_dropout = attention_dropout
            found.append(made(pixels, keep, SEEDS))
        torch.testing.assert_close(found[0], found[1])
    made = classifier()
    plain = made(pixels)
    made.dropout = made.attention_dropout = 0.0
    assert torch.equal(made(pixels), plain) and torch.equal(made(pixels, None, SEEDS), plain)


def test_the_seeds_are_the_samples():
    """Of each sample its own, whatever the batch; none where nothing is dropped."""
    tune = Finetune(dropout=0.1, erase=0.0, mixup=0.0, cutmix=0.0)
    samples = np.array([0, 7, 2**40, 12])
    found = supervised_draws(tune, 3, 0, samples)["dropout"]
    assert np.array_equal(supervised_draws(tune, 3, 0, samples[::-1])["dropout"][::-1], found)
    assert len(set(found.tolist())) == 4 and found.min() >= 0 and found.max() < 2**32
    assert "dropout" not in supervised_draws(dataclasses.replace(tune, dropout=0.0), 3, 0, samples)
    assert "dropout" in supervised_draws(dataclasses.replace(tune, dropout=0.0, attention_dropout=0.1), 3, 0, samples)
