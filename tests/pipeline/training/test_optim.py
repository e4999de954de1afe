"""The learning rate of every step and what weight decay applies to, against the released code."""

import math

import numpy as np
import pytest
import torch

from beitforge.pipeline.config.fields import Duration, Size
from beitforge.pipeline.config.settings import Finetune, Model, Optimizer, Train
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.training.optim import cosine, learning_rate, parameter_groups


def released_schedule(base: float, final: float, steps: int, warmup: int) -> np.ndarray:
    """BEiT's utils.cosine_scheduler with start_warmup_value=0."""
    rates = [
        final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / (steps - warmup))) for i in range(steps - warmup)
    ]
    return np.concatenate([np.linspace(0, base, warmup), rates])


@pytest.mark.parametrize(("steps", "warmup"), [(500, 50), (1000, 2), (37, 36), (10, 0), (187_680, 6256)])
def test_learning_rate_is_the_released_schedule(steps, warmup):
    """Every step of it; the last is docs/recipe.md's 300 epochs of IN-1k with 10 of warm-up."""
    expected = released_schedule(1.5e-3, 1e-5, steps, warmup)
    chosen = range(steps) if steps < 2000 else [*range(0, steps, 997), warmup - 1, warmup, warmup + 1, steps - 1]
    found = [learning_rate(step, peak=1.5e-3, end=1e-5, warmup=warmup, steps=steps) for step in chosen]
    np.testing.assert_allclose(found, expected[list(chosen)], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(("start", "end", "steps"), [(0.05, 0.2, 500), (0.05, 0.0, 37), (0.3, 0.1, 187_500)])
def test_weight_decay_is_the_released_schedule(start, end, steps):
    """Every step of it, without warm-up; one that ends where it starts is the same number throughout."""
    chosen = range(steps) if steps < 2000 else [*range(0, steps, 997), steps - 1]
    found = [cosine(step, start=start, end=end, steps=steps) for step in chosen]
    np.testing.assert_allclose(found, released_schedule(start, end, steps, 0)[list(chosen)], rtol=1e-12)
    assert found[0] == pytest.approx(start, rel=1e-15) and abs(found[-1] - end) < 0.02 * abs(start - end)
    assert {cosine(step, start=start, end=start, steps=steps) for step in chosen} == {start}


@pytest.mark.parametrize(("images", "batch", "ranks"), [(1_281_167, 2048, 16), (1_281_167, 1024, 8), (4100, 2048, 2)])
def test_an_epoch_of_whole_batches_is_the_released_codes(images, batch, ranks):
    """len(dataset) // batch_size // num_tasks steps an epoch; the published 300 epochs are 187,500 steps."""
    per_epoch = images // (batch // ranks) // ranks
    for section in (Train(drop_last=True, global_batch=batch), Finetune(drop_last=True, global_batch=batch)):
        epoch = section.epoch_samples(images)
        assert Duration(300, "epochs").steps(epoch, batch) == 300 * per_epoch
        assert Duration(20, "epochs").steps(epoch, batch) == 20 * per_epoch
        assert Duration(7, "steps").steps(epoch, batch) == 7
    whole = Train(global_batch=batch)
    assert whole.epoch_samples(images) == images
    if batch == 2048 and ranks == 16:
        assert 300 * per_epoch == 187_500
        assert Duration(300, "epochs").steps(whole.epoch_samples(images), batch) == 187_671


def test_words_stand_for_numbers():
    """same: the decay itself; auto: the released code's crop, 224 / 256 below 384 pixels and 1 from there on."""
    assert Optimizer(weight_decay=0.3).last_weight_decay == Finetune(weight_decay=0.3).last_weight_decay == 0.3
    assert Optimizer(weight_decay_end=0.0).last_weight_decay == 0.0
    crops = {side: Finetune(input_size=Size(side, side)).test_share for side in (224, 368, 384, 512)}
    assert crops == {224: 224 / 256, 368: 224 / 256, 384: 1.0, 512: 1.0}
    assert Finetune(input_size=Size(384, 384), test_crop=0.9).test_share == 0.9


def test_first_peak_and_last():
    """0 at the first step, the peak at the last of the warm-up and at the first of the cosine, the end at the end."""

    def rate(step: int) -> float:
        return learning_rate(step, peak=2.0, end=0.5, warmup=10, steps=110)

    assert rate(0) == 0
    assert rate(9) == rate(10) == 2.0
    assert rate(60) == pytest.approx(1.25)
    assert rate(109) == pytest.approx(0.5, abs=1e-3)
    assert rate(109) > 0.5
    assert rate(110) == rate(500) == 0.5
    rates = [rate(step) for step in range(110)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_warm_up_of_one_step_or_none():
    """No step without a rate: a single warm-up step is at the peak (np.linspace would give it 0)."""
    assert learning_rate(0, peak=2.0, end=0.5, warmup=1, steps=10) == 2.0
    assert learning_rate(0, peak=2.0, end=0.5, warmup=0, steps=10) == 2.0


def names_by_decay(positions: str, layer_scale: bool) -> tuple[set[str], set[str]]:
    """Names of the parameters with and without weight decay, for one layer."""
    model = Model(
        input_size=Size(8, 8), patch_size=4, layers=1, width=8, heads=2, positions=positions, layer_scale=layer_scale
    )
    beit = Beit(model, 16, seed=0)
    names = {id(parameter): name for name, parameter in beit.named_parameters()}
    groups = parameter_groups(beit, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, kept = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert sorted(decayed + kept) == sorted(names.values())
    return set(decayed), set(kept)


WEIGHTS = {
    "patch_embedding.weight",
    "mask_embedding",
    "blocks.0.attention.qkv_weight",
    "blocks.0.attention.out.weight",
    "blocks.0.fc1.weight",
    "blocks.0.fc2.weight",
    "head.weight",
}
VECTORS = {
    "cls_embedding",
    "patch_embedding.bias",
    "blocks.0.norm1.weight",
    "blocks.0.norm1.bias",
    "blocks.0.attention.q_bias",
    "blocks.0.attention.v_bias",
    "blocks.0.attention.out.bias",
    "blocks.0.norm2.weight",
    "blocks.0.norm2.bias",
    "blocks.0.fc1.bias",
    "blocks.0.fc2.bias",
    "norm.weight",
    "norm.bias",
    "head.bias",
}
GAMMAS = {"blocks.0.gamma1", "blocks.0.gamma2"}


@pytest.mark.parametrize(
    ("positions", "layer_scale", "decayed", "kept"),
    [
        ("absolute", False, WEIGHTS, VECTORS | {"position_embedding"}),
        ("absolute", True, WEIGHTS, VECTORS | GAMMAS | {"position_embedding"}),
        ("relative_shared", True, WEIGHTS | {"shared_bias.table"}, VECTORS | GAMMAS),
        ("relative", True, WEIGHTS | {"blocks.0.attention.own_bias.table"}, VECTORS | GAMMAS),
    ],
)
def test_weight_decay_name_by_name(positions, layer_scale, decayed, kept):
    """docs/recipe.md: on the mask embedding and the relative table, not on 1-D parameters, positions and cls."""
    assert names_by_decay(positions, layer_scale) == (decayed, kept)


def test_groups_are_adamws():
    """torch's AdamW takes them as they are, and every parameter moves."""
    beit = Beit(Model(input_size=Size(8, 8), patch_size=4, layers=1, width=8, heads=2), 16, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in beit.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(beit, 0.05), lr=0.1)
    for parameter in beit.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in beit.named_parameters())
