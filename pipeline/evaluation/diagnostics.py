"""What evaluations measure besides losses: predictions, attention distance, and k-NN on labels.

Everything comes out of the engine's own forward pass, with hooks on the encoder's modules for as long as that takes: so
ZeRO-3 has gathered a module's weights when they are read, and a compiled model need only be told to run eagerly. All
ranks take part, with the same number of forward passes each. Must not know stages.

Shape letters as in pipeline.model.beit.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.data.batches import even_batches
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.distributed.collectives import all_gather_rows, all_sum
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.evaluation.probe import feature_depth, knn_accuracy, standardised
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.model.blocks import Attention
from beitforge.pipeline.tokenizers.storage import codebook_use
from beitforge.pipeline.training.objectives import encoder_input
from beitforge.shards.stream.loader import Batch

_AT_ONCE = 16  # images whose logits or attention are in memory
_PREDICTED = 1024  # images whose predictions are looked at
_ATTENDED = 64  # images whose attention is

Prepare = Callable[[Batch], Batch]  # to the device, with tokens


@torch.no_grad()
def measure(config: Config, engine: Engine, source: DataSource, samples: int, prepare: Prepare) -> dict[str, float]:
    """Of the first `samples` of a set with masks, 1024 at most: the mean entropy of the predictions at masked patches
    (nats) and the use of the codebook by the likeliest tokens there; of the first 64, unmasked, how far the patches of
    each block attend (pixels; Dosovitskiy et al. 2020, arXiv 2010.11929, figure 7)."""
    world, module = engine.world, engine.module
    assert isinstance(module, Beit), "an encoder is looked at"
    counts_V = torch.zeros(config.tokenizer.vocabulary, dtype=torch.float64, device=world.device)
    entropy = torch.zeros((), dtype=torch.float64, device=world.device)
    distances_L = torch.zeros(config.model.layers, dtype=torch.float64, device=world.device)
    micro, samples = min(_AT_ONCE, engine.setup.micro_batch), min(samples, _PREDICTED)
    attended = min(samples, _ATTENDED)
    batches = even_batches(config, source, samples=samples, micro=micro, rank=world.rank, world=world.size)
    for number, (batch, weight_B) in enumerate(batches):
        batch, weight_B = prepare(batch), weight_B.to(world.device)
        pixels_BCHW = encoder_input(config, batch, engine.dtype)
        mask_BN = batch.draws["mask"] & (weight_B > 0)[:, None]
        logits_BMV, _, counts_BM = engine.model(pixels_BCHW, mask_BN, config.mask.num_patches)
        log_p = logits_BMV[counts_BM].float().log_softmax(dim=-1)
        entropy -= (log_p.exp() * log_p).sum().double()
        counts_V += torch.bincount(log_p.argmax(dim=-1), minlength=len(counts_V))
        if number * micro * world.size < attended:  # on every rank the same
            counting_B = weight_B * (batch.samples < attended)
            distances_L += _attention_distances(config.model, engine, module, pixels_BCHW, counting_B)
    counts_V, entropy, distances_L = all_sum(counts_V), all_sum(entropy), all_sum(distances_L)
    use = codebook_use(counts_V)
    found = {"entropy": float(entropy / counts_V.sum())}
    found |= {f"predicted_{name}": float(use[name]) for name in ("used", "perplexity")}
    return found | {f"attention_distance_{n}": d / attended for n, d in enumerate(distances_L.tolist(), start=1)}


def _attention_distances(model: Model, engine: Engine, module: Beit, pixels_BCHW: Tensor, counting_B: Tensor) -> Tensor:
    """Of each block the sum over images, times counting_B, of the mean distance in pixels between a patch and those
    that it attends to, over patches and heads: [L]. [S] is left out, and the rest renormalised."""
    distance_NN = _patch_distances(model).to(pixels_BCHW.device)
    totals_L = torch.zeros(model.layers, dtype=torch.float64, device=pixels_BCHW.device)

    def seen(layer: int, logits_BANN: Tensor) -> None:
        mean_B = (logits_BANN.softmax(dim=-1) * distance_NN).sum(dim=-1).mean(dim=(1, 2))
        totals_L[layer] += (mean_B * counting_B).sum().double()

    with _hooked(*(handle for n, block in enumerate(module.blocks) for handle in _watched(n, block, seen))):
        _whole(engine, model, pixels_BCHW)
    return totals_L


def _watched(layer: int, block: nn.Module, seen: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
    """Hooks that give `seen` the layer and the logits [B, A, N, N], float32, of its attention between patches."""
    attention = block.attention
    assert isinstance(attention, Attention), "blocks have attention"
    products: list[Tensor] = []

    def before(_: Attention, inputs: tuple) -> None:
        x_BSD, bias_ASS = inputs[0], inputs[1]
        product_BANN = _products(attention, x_BSD[:, 1:])
        if attention.own_bias is not None:
            products.append(product_BANN)
        else:
            seen(layer, product_BANN if bias_ASS is None else product_BANN + bias_ASS[:, 1:, 1:])

    def after(_: nn.Module, __: tuple, bias_ASS: Tensor) -> None:
        seen(layer, products.pop() + bias_ASS[:, 1:, 1:])

    hooks = [attention.register_forward_pre_hook(before)]
    if attention.own_bias is not None:
        hooks.append(attention.own_bias.register_forward_hook(after))
    return hooks


def _products(attention: Attention, x_BND: Tensor) -> Tensor:
    """q·kᵀ / √K [B, A, N, N] in float32."""
    q_BANK, k_BANK, _ = attention.project(x_BND).float().permute(2, 0, 3, 1, 4)
    return q_BANK @ k_BANK.transpose(-1, -2) * q_BANK.shape[-1] ** -0.5


def _patch_distances(model: Model) -> Tensor:
    """Between the centres of any two patches, in pixels, f32 [N, N]."""
    rows, columns = model.grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places_N2 = torch.stack([row.flatten(), column.flatten()], dim=-1).float() * model.patch_size
    return (places_N2[:, None] - places_N2[None]).square().sum(dim=-1).sqrt()


@torch.no_grad()
def knn(config: Config, engine: Engine, choose: DataSource, test: DataSource | None) -> dict[str, float]:
    """k-NN accuracy on `test`, or on a fifth of `choose`, among the images of `choose` (pipeline.data.labelled)."""
    world = engine.world
    features_nD, labels_n = _features(config, engine, choose)
    if test is None:
        part = torch.arange(len(labels_n), device=world.device) % 5 == 4
        tests_mD, answers_m = features_nD[part], labels_n[part]
        features_nD, labels_n = features_nD[~part], labels_n[~part]
    else:
        tests_mD, answers_m = _features(config, engine, test)
    tests_mD = standardised(features_nD, tests_mD)[world.rank :: world.size]
    mine = answers_m[world.rank :: world.size]
    right = torch.zeros((), dtype=torch.float64, device=world.device)
    if len(mine):
        classes = int(torch.cat([labels_n, answers_m]).max()) + 1
        scaled_nD = standardised(features_nD, features_nD)
        right += knn_accuracy(scaled_nD, labels_n, tests_mD, mine, classes) * len(mine)
    return {"knn": float(all_sum(right)) / len(answers_m), "knn_samples": float(len(answers_m))}


def _features(config: Config, engine: Engine, source: DataSource) -> tuple[Tensor, Tensor]:
    """The mean over patches of the hidden states at feature_depth, f32 [n, D], and labels i64 [n] of all samples of a
    set; every rank has them all, in their order."""
    world, module, micro = engine.world, engine.module, engine.setup.micro_batch
    assert isinstance(module, Beit), "an encoder has features"
    means: list[Tensor] = []
    facts: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple) -> None:
        means.append(inputs[0][:, 1:].float().mean(dim=1)[own_B])

    batches = even_batches(config, source, samples=source.samples, micro=micro, rank=world.rank, world=world.size)
    with _hooked(module.blocks[feature_depth(config.model.layers)].register_forward_pre_hook(keep)):
        for batch, weight_B in batches:
            batch, own_B = batch.to(world.device), weight_B.to(world.device) > 0
            _whole(engine, config.model, encoder_input(config, batch, engine.dtype))
            facts.append(torch.stack([batch.samples, batch.labels], dim=-1)[own_B])
    numbers_n2 = all_gather_rows(torch.cat(facts), world)
    turn = numbers_n2[:, 0].argsort()
    return all_gather_rows(torch.cat(means), world)[turn], numbers_n2[turn, 1]


def _whole(engine: Engine, model: Model, pixels_BCHW: Tensor) -> None:
    """A forward pass of images without a mask, for its hooks; the head computes one patch of each."""
    nothing_BN = torch.zeros(len(pixels_BCHW), model.num_patches, dtype=torch.bool, device=pixels_BCHW.device)
    engine.model(pixels_BCHW, nothing_BN, 1)


@contextlib.contextmanager
def _hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove hooks when the block is done."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
