"""Losses by hand: masked cross entropy, the dVAE's three terms, the temperature."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Config, Mask, Model, Tokenizer
from beitforge.pipeline.model.beit import Beit, Head
from beitforge.pipeline.model.pixels import jitter, normalise, tokenizer_input
from beitforge.pipeline.training.objectives import dvae_loss, dvae_temperature, encoder_input, masked_token_loss

V, M, N = 32, 5, 16
CONFIG = Config(
    model=Model(
        input_size=Size(16, 16), patch_size=4, layers=2, width=16, heads=2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    ),
    mask=Mask(num_patches=M, min_block=2),
    tokenizer=Tokenizer(input_size=Size(32, 32), vocabulary=V),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclasses.dataclass
class Views:
    """What objectives read of a batch."""

    samples: Tensor
    pixels: Tensor
    tokens: Tensor
    jitters: Tensor
    orders: Tensor
    pivots: Tensor
    draws: dict[str, Tensor]


def views(count: int = 4, side: int = 16, masked: int = M) -> Views:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(count, N, generator=generator).argsort(dim=1) < masked
    return Views(
        samples=torch.arange(count),
        pixels=torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator),
        tokens=torch.randint(0, V, (count, N), generator=generator),
        jitters=0.7 + 0.6 * torch.rand(count, 3, generator=generator),
        orders=torch.arange(count) % 6,
        pivots=torch.full((count,), 120.0),
        draws={"mask": mask},
    )


def beit() -> Beit:
    return Beit(CONFIG.model, V, seed=0)


def fixed(logits_BNV: Tensor) -> Callable:
    """A model whose logits are these, whatever it sees: the masked patches' in order, filled up with others."""
    head = Head(V, V).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(V))
        head.bias.zero_()

    def model(pixels: Tensor, mask: Tensor, masked: int, keep: Tensor | None, tokens: Tensor) -> tuple[Tensor, ...]:
        rows = []
        for row in mask:
            chosen = row.nonzero().flatten().tolist()
            rows.append((chosen + [i for i in range(N) if i not in chosen])[:masked])
        index = torch.tensor(rows)
        logits, counts = logits_BNV.gather(1, index[..., None].expand(-1, -1, V)), mask.gather(1, index).float()
        return *head(logits, tokens.gather(1, index), counts), counts.sum()

    return model


def test_encoder_input_is_jittered_then_normalised():
    batch = views()
    jittered = jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots)
    expected = normalise(jittered, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert torch.equal(encoder_input(CONFIG, batch), expected)


def test_the_loss_is_the_cross_entropy_of_the_masked_patches():
    """By hand: pick the masked patches of all images, compare with their tokens, take the mean."""
    batch = views()
    logits = torch.randn(4, N, V, generator=torch.Generator().manual_seed(3))
    mask = batch.draws["mask"]
    loss, measures = masked_token_loss(CONFIG, fixed(logits), batch, torch.float32)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits[mask], batch.tokens[mask])), rel=1e-6)
    right = (logits[mask].argmax(dim=1) == batch.tokens[mask]).float().mean()
    assert float(measures["masked_accuracy"]) == pytest.approx(float(right))


def test_a_perfect_model_has_no_loss():
    batch = views()
    logits = 100 * F.one_hot(batch.tokens, V).float()
    loss, measures = masked_token_loss(CONFIG, fixed(logits), batch, torch.float32)
    assert float(loss) < 1e-6
    assert float(measures["masked_accuracy"]) == 1
    wrong = 100 * F.one_hot((batch.tokens + 1) % V, V).float()
    loss, measures = masked_token_loss(CONFIG, fixed(wrong), batch, torch.float32)
    assert float(loss) == pytest.approx(100)
    assert float(measures["masked_accuracy"]) == 0


def test_visible_patches_count_for_nothing():
    batch = views()
    logits = torch.randn(4, N, V, generator=torch.Generator().manual_seed(3))
    visible = ~batch.draws["mask"]
    changed = torch.where(visible[..., None], -logits, logits)
    loss, _ = masked_token_loss(CONFIG, fixed(logits), batch, torch.float32)
    batch.tokens = torch.where(visible, (batch.tokens + 1) % V, batch.tokens)
    assert torch.equal(loss, masked_token_loss(CONFIG, fixed(changed), batch, torch.float32)[0])


def test_fewer_masked_patches_than_m():
    """The published mask masks at most M: the mean is over the patches that are masked, not over B · M."""
    batch = views()
    mask = batch.draws["mask"]
    mask[0] = False
    mask[1, mask[1].nonzero().flatten()[1:]] = False
    logits = torch.randn(4, N, V, generator=torch.Generator().manual_seed(3))
    loss, measures = masked_token_loss(CONFIG, fixed(logits), batch, torch.float32)
    assert int(mask.sum()) == 2 * M + 1
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits[mask], batch.tokens[mask])), rel=1e-6)
    right = (logits[mask].argmax(dim=1) == batch.tokens[mask]).float().mean()
    assert float(measures["masked_accuracy"]) == pytest.approx(float(right))
    mask[:] = False
    loss, measures = masked_token_loss(CONFIG, fixed(logits), batch, torch.float32)
    assert (float(loss), float(measures["masked_accuracy"])) == (0, 0)


def test_the_loss_starts_at_the_logarithm_of_the_vocabulary():
    """docs/recipe.md: ln 8192 = 9.011."""
    batch = views()
    loss, _ = masked_token_loss(CONFIG, beit(), batch, torch.float32)
    assert loss.item() == pytest.approx(math.log(V), rel=0.01)
    batch.tokens = batch.tokens * 256
    model = Beit(CONFIG.model, 8192, seed=0)
    assert masked_token_loss(CONFIG, model, batch, torch.float32)[0].item() == pytest.approx(9.011, rel=0.001)


def test_drop_path_reaches_the_model():
    batch = views()
    plain, _ = masked_token_loss(CONFIG, beit(), batch, torch.float32)
    batch.draws["keep"] = torch.zeros(4, 2, 2, dtype=torch.bool)
    dropped, _ = masked_token_loss(CONFIG, beit(), batch, torch.float32)
    assert not torch.equal(plain, dropped)


def test_the_loss_of_a_bfloat16_model_is_float32():
    batch = views()
    loss, _ = masked_token_loss(CONFIG, beit().bfloat16(), batch, torch.bfloat16)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(V), rel=0.02)
    loss.backward()


def test_the_loss_reaches_every_parameter():
    model, batch = beit(), views()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    masked_token_loss(CONFIG, model, batch, torch.float32)[0].backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


SETTINGS = Tokenizer(input_size=Size(16, 16), vocabulary=6, kl_weight=0.3, usage_weight=0.7)


def test_dvae_loss_term_by_term():
    """Pixel errors summed over an 8 × 8 field of 3 channels, KL to the uniform prior place by place and of the mean."""
    batch = views(side=16)
    target = tokenizer_input(jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots))
    logits = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    asked: list[tuple] = []

    def model(pixels: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        asked.append((pixels, temperature, noise))
        return target + 0.1, logits

    loss, measures = dvae_loss(SETTINGS, model, batch, 10, 80, torch.Generator().manual_seed(4))
    pixels, temperature, noise = asked[0]
    assert torch.equal(pixels, target)
    assert temperature == dvae_temperature(SETTINGS, 10, 80)
    assert noise.shape == logits.shape
    q = logits.softmax(dim=1)
    kl = math.fsum(
        float(q[b, v, h, w] * (q[b, v, h, w] * 6).log())
        for b in range(4)
        for v in range(6)
        for h in range(2)
        for w in range(2)
    ) / (4 * 2 * 2)
    mean = q.permute(1, 0, 2, 3).reshape(6, -1).mean(dim=1)
    usage = float((mean * (mean * 6).log()).sum())
    assert float(measures["reconstruction_mse"]) == pytest.approx(0.01, rel=1e-4)
    assert float(measures["kl"]) == pytest.approx(kl)
    assert float(measures["usage_kl"]) == pytest.approx(usage)
    assert kl > usage > 0
    warm = 10 / (0.25 * 80)
    assert float(loss) == pytest.approx(0.01 * 192 + 0.3 * warm * kl + 0.7 * usage, rel=1e-4)


@pytest.mark.parametrize(("step", "warm"), [(0, 0.0), (5, 0.25), (20, 1.0), (79, 1.0)])
def test_the_kl_weight_is_warmed_up(step, warm):
    """Over the first quarter of training."""
    batch = views(side=16)
    logits = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(3))

    def model(pixels: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return pixels, logits

    settings = dataclasses.replace(SETTINGS, usage_weight=0.0)
    loss, measures = dvae_loss(settings, model, batch, step, 80, torch.Generator())
    assert float(loss) == pytest.approx(0.3 * warm * float(measures["kl"]))


def test_a_uniform_posterior_costs_nothing():
    batch = views(side=16)

    def model(pixels: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return pixels, torch.zeros(4, 6, 2, 2)

    loss, _ = dvae_loss(SETTINGS, model, batch, 80, 80, torch.Generator())
    assert abs(float(loss)) < 1e-6


def test_gumbel_noise_is_standard_and_comes_from_the_generator():
    """Mean 0.5772, variance π²/6, finite; the same for the same seed and no other state."""
    batch, drawn = views(count=16, side=64), []
    settings = dataclasses.replace(SETTINGS, input_size=Size(64, 64), vocabulary=32)

    def model(pixels: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append(noise)
        return pixels, noise

    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        dvae_loss(settings, model, batch, 0, 80, torch.Generator().manual_seed(seed))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.isfinite(drawn[0]).all()
    assert float(drawn[0].mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(drawn[0].var()) == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_temperature_end_points():
    """docs/recipe.md: from 1 to 1/16, exponentially over anneal_share of training, then constant."""
    settings = Tokenizer()
    assert dvae_temperature(settings, 0, 1000) == 1.0
    assert dvae_temperature(settings, 375, 1000) == pytest.approx(0.25)
    assert dvae_temperature(settings, 750, 1000) == dvae_temperature(settings, 999, 1000) == 0.0625
    falling = [dvae_temperature(settings, step, 1000) for step in range(751)]
    assert falling == sorted(falling, reverse=True)
    assert dvae_temperature(dataclasses.replace(settings, anneal_share=0.0), 1, 10) == 0.0625
