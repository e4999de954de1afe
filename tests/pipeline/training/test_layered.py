"""Every layer learns at its own rate under every ZeRO stage, and a checkpoint of many groups resumes under any."""

import json

import pytest

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model.beit import Classifier
from beitforge.pipeline.training.optim import layer_groups
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What tests.pipeline.training.layered_stages finds with two processes."""
    done = run_ranks("tests.pipeline.training.layered_stages", tmp_path_factory.mktemp("layered"), processes=2)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_rates_and_weights_are_plain_adamws(found):
    """Losses, and weights after three steps; 0.5 to the fourth power for the embeddings, 1 for the head."""
    for finding in found:
        assert finding["rates"] == [0.0625, 0.125, 0.25, 0.5, 1.0], finding
        assert finding["losses"] == pytest.approx(finding["expected"], rel=2e-6), finding
        assert finding["apart"] < 1e-5, finding


def test_a_checkpoint_goes_on_under_the_next_stage(found):
    assert [finding["stage"] for finding in found] == [0, 1, 2, 3]
    for finding in found:
        assert not finding["differ"], finding
        assert finding["after_next"] == pytest.approx(finding["after"], rel=1e-6), finding


def test_groups_are_the_published_ones():
    """unilm's get_num_layer_for_vit: embeddings 0, block l from 1, norm and head one above the last block."""
    model = Model(input_size=Size(32, 32), layers=2, width=32, heads=2, positions="relative")
    module = Classifier(model, 3)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = layer_groups(module, 2, 0.05, 0.65)
    scale = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scale.keys() == set(names.values())
    assert scale["patch_embedding.weight"] == (0.65**3, 0.05) and scale["patch_embedding.bias"] == (0.65**3, 0.0)
    assert scale["cls_embedding"] == (0.65**3, 0.0)
    assert scale["blocks.0.attention.own_bias.table"] == (0.65**2, 0.05)
    assert scale["blocks.1.fc2.weight"] == (0.65, 0.05) and scale["blocks.1.gamma1"] == (0.65, 0.0)
    assert scale["norm.weight"] == (1.0, 0.0) and scale["head.weight"] == (1.0, 0.05)
