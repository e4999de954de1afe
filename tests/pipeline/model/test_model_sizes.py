"""The encoder's sizes, cost and initial weights are docs/recipe.md's."""

import math

import pytest
import torch

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model import beit as module
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.plan.costs import num_parameters, training_flops
from tests.conftest import ROOT

TINY = Model(input_size=Size(12, 12), patch_size=3, layers=3, width=24, heads=2)


def on_meta(model: Model, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> Beit:
    """An encoder of shapes without memory: nothing to initialise."""
    monkeypatch.setattr(module, "initialise", lambda *_: None)
    with torch.device("meta"):
        return Beit(model, vocabulary, seed=0)


LARGE = {"layers": 24, "width": 1024, "heads": 16, "layer_scale_init": 1e-5}
RECIPE_SIZES = [
    ({}, 91_965_776),
    ({"positions": "absolute", "layer_scale": False}, 92_089_856),
    (LARGE, 311_534_016),
    ({**LARGE, "positions": "absolute", "layer_scale": False}, 311_674_880),
]


def count(model: Model, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Trainable parameters of the module itself, which `plan` must count alike."""
    real = sum(parameter.numel() for parameter in on_meta(model, vocabulary, monkeypatch).parameters())
    assert num_parameters(model, vocabulary) == real
    return real


@pytest.mark.parametrize(("changes", "parameters"), RECIPE_SIZES)
def test_parameter_counts_are_recipes(changes, parameters, monkeypatch):
    assert count(Model(**changes), 8192, monkeypatch) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("beit_base", 91_965_776),
        ("beit_base_in22k", 91_965_776),
        ("beit_base_paper", 92_089_856),
        ("beit_large", 311_534_016),
        ("beit_large_in22k", 311_534_016),
    ],
)
def test_shipped_configs_have_recipes_sizes(name, parameters, monkeypatch):
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"), [])
    assert count(config.model, config.tokenizer.vocabulary, monkeypatch) == parameters


def test_an_own_table_in_every_layer_counts(monkeypatch):
    """`relative`: a table of 732 rows × heads a layer instead of one for all."""
    own = count(Model(positions="relative"), 8192, monkeypatch)
    assert own == 91_965_776 + 11 * 732 * 12


@pytest.mark.parametrize(("changes", "gigaflops"), [({}, 108), (LARGE, 373)])
def test_training_cost_is_recipes(changes, gigaflops):
    """docs/recipe.md, "Cost"."""
    assert training_flops(Model(**changes), 8192, 75) / 1e9 == pytest.approx(gigaflops, rel=0.01)


@pytest.fixture(scope="module")
def fresh() -> Beit:
    """As initialised: 4 layers of BEiT-Base's width would take seconds, this has enough numbers for statistics."""
    model = Model(input_size=Size(64, 64), patch_size=16, layers=3, width=192, heads=3)
    return Beit(model, 512, seed=0)


def test_every_parameter_is_initialised(fresh):
    """They are NaN until then."""
    assert all(bool(torch.isfinite(parameter).all()) for parameter in fresh.parameters())


def test_initial_weights_are_recipes(fresh):
    """Normal 0.02 truncated at one standard deviation; residual matrices divided by √(2 · layer); the rest constant."""
    # a normal distribution cut at ± one standard deviation has 0.5396 of its standard deviation
    spread = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))
    seen = set()
    for name, parameter in fresh.state_dict().items():
        last = name.rsplit(".", 1)[-1]
        if last in ("bias", "q_bias", "v_bias", "table"):
            assert (parameter == 0).all(), name
        elif last in ("gamma1", "gamma2"):
            assert (parameter == 0.1).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            scale = 1.0
            if name.endswith(("attention.out.weight", "fc2.weight")):
                scale = 1 / math.sqrt(2 * (int(name.split(".")[1]) + 1))
                seen.add(name)
            size = parameter.numel()
            assert parameter.abs().max() <= 0.02 * scale * 1.00001, name
            assert parameter.abs().max() > 0.02 * scale * (0.9 if size < 1000 else 0.99), name
            assert float(parameter.std()) == pytest.approx(spread * scale, rel=3 / math.sqrt(size)), name
            assert abs(float(parameter.mean())) < 5 * spread * scale / math.sqrt(size), name
    assert len(seen) == 6


def test_initial_weights_are_normal_where_they_are_not_cut(fresh):
    """Quantiles of the middle: of a normal distribution cut at one σ, 56 % lie within σ / 2."""
    values = torch.cat([block.fc1.weight.flatten() for block in fresh.blocks])
    inside = float((values.abs() < 0.01).float().mean())
    assert inside == pytest.approx(math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2)), abs=0.003)


def test_initial_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, again, other = (Beit(TINY, 40, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_fine_tuning_may_draw_its_weights_as_released():
    """timm 0.3.2's trunc_normal_(tensor, std=0.02), whose bounds are ±2 and not ±2 deviations, with the same numbers;
    cut at one deviation nothing changes."""

    def released(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        low, high = (math.erf(bound / 0.02 / math.sqrt(2)) for bound in (-2, 2))
        return tensor.uniform_(low, high, generator=generator).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)

    classifier, cut = Classifier(TINY, 10), Classifier(TINY, 10)
    module.initialise(classifier, 3, truncation=100)
    module.initialise(cut, 3)
    generator, drawn = torch.Generator().manual_seed(3), 0
    for name, parameter in classifier.named_parameters():
        if parameter.dim() == 1 or name.endswith("table"):
            assert torch.equal(parameter, cut.get_parameter(name)), name
            continue
        expected = released(torch.empty_like(parameter), generator)
        if name.endswith(("attention.out.weight", "fc2.weight")):
            expected.div_(math.sqrt(2 * (int(name.split(".")[1]) + 1)))
        assert torch.equal(parameter, expected), name
        drawn += parameter.numel()
    weights = torch.cat([block.fc1.weight.detach().flatten() for block in classifier.blocks])
    assert (
        drawn > 10_000 and float(weights.std()) == pytest.approx(0.02, rel=0.05) and float(weights.abs().max()) > 0.05
    )
    assert float(cut.head.weight.detach().abs().max()) <= 0.02 * 1.00001
