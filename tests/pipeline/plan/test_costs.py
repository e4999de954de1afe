"""What `plan` counts against the real model: parameters, operations, and what autograd keeps."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config, Model, Tokenizer
from beitforge.pipeline.model import beit as model
from beitforge.pipeline.plan import costs
from beitforge.pipeline.plan.estimate import CHECKPOINTING
from beitforge.pipeline.plan.zero_model import Sharding, zero_settings
from beitforge.pipeline.tokenizers.dvae import Dvae
from beitforge.pipeline.training.optim import decays, is_matrix, muon_groups
from tests.conftest import ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))
SHAPES = {
    "relative": Model(positions="relative"),
    "absolute, no layer scale": Model(positions="absolute", layer_scale=False),
    "not square": Model(input_size=Size(64, 96), layers=2, width=48, heads=3, mlp_ratio=2.5),
    "huge": Model(patch_size=14, layers=32, width=1280, heads=16),
}


def bare(monkeypatch, shape: Model, vocabulary: int) -> model.Beit:
    """The real model without memory."""
    monkeypatch.setattr(model, "initialise", lambda *_: None)
    with torch.device("meta"):
        return model.Beit(shape, vocabulary, 0)


@pytest.mark.parametrize("positions", ["absolute", "relative_shared", "relative"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameters_of_every_config(monkeypatch, path, positions):
    """Name by name, in order, with their weight decay."""
    config = load_config(str(path), [f"model.positions={positions}"])
    beit = bare(monkeypatch, config.model, config.tokenizer.vocabulary)
    real = [
        costs.Parameter(name, p.numel(), decays(name, p), tuple(p.shape) if is_matrix(name, p) else None)
        for name, p in beit.named_parameters()
    ]
    assert costs.parameters(config.model, config.tokenizer.vocabulary) == real


def test_groups_are_the_optimizers(monkeypatch):
    """With Muon: each group's parameters in the order in which they lie end to end."""
    shape = SHAPES["not square"]
    beit = bare(monkeypatch, shape, 64)
    names = {id(parameter): name for name, parameter in beit.named_parameters()}
    sharding = Sharding(
        parameters=costs.parameters(shape, 64),
        stage=2,
        world=2,
        number=2,
        accumulation=1,
        offload=False,
        settings=zero_settings(Config(), 2),
        muon=True,
    )
    real = [[names[id(parameter)] for parameter in group["params"]] for group in muon_groups(beit, 0.05, 0.95)]
    assert [[each.name for each in group] for group in sharding.groups] == real


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_of_other_shapes(monkeypatch, shape):
    beit = bare(monkeypatch, shape, 100)
    assert costs.num_parameters(shape, 100) == sum(parameter.numel() for parameter in beit.parameters())


def test_published_sizes():
    """docs/recipe.md's numbers: parameters, and operations per image."""
    base, large = Model(), Model(layers=24, width=1024, heads=16)
    assert costs.num_parameters(base, 8192) == 91_965_776
    assert costs.num_parameters(large, 8192) == 311_534_016
    assert costs.training_flops(base, 8192, 75) == pytest.approx(108e9, rel=0.01)
    assert costs.training_flops(large, 8192, 75) == pytest.approx(373e9, rel=0.01)


def test_the_last_block_and_checkpointing():
    """Fewer operations for masked patches alone; full checkpointing adds the blocks' forward, a third of the rest,
    selective nothing."""
    shape = Model()
    plain, kept, again = (costs.computed_flops(shape, 8192, 75, kind) for kind in CHECKPOINTING)
    assert kept == plain
    attention = shape.layers * 4 * 197**2 * 768
    assert 0.95 < (plain - attention) / costs.training_flops(shape, 8192, 75) < 0.97
    assert 1.30 < again / plain < 1.34


class Storages(TorchDispatchMode):
    """Memory of whatever operators return, by address, for as long as anything holds it. known: what was there."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, tuple | list) else (given,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.found[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return given

    def held(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.found.values() if not storage.expired())


def kept(shape: Model, images: int, dtype: torch.dtype, checkpointing: str) -> int:
    """Bytes that are held between forward and backward, without parameters and inputs."""
    beit = model.Beit(shape, 64, 0).to(dtype)
    beit.checkpointing = checkpointing
    patches = shape.num_patches
    pixels = torch.randn(images, 3, *shape.input_size, dtype=dtype)
    mask = (torch.arange(patches) < 10).expand(images, -1).contiguous()
    tokens, keep = torch.zeros(images, patches, dtype=torch.int64), torch.ones(images, shape.layers, 2) > 0
    known = {t.untyped_storage().data_ptr() for t in (*beit.parameters(), *beit.buffers(), pixels, mask, tokens, keep)}
    with Storages(known) as storages:
        loss = beit(pixels, mask, 10, keep, tokens)
    size = storages.held()
    del loss
    assert storages.held() == 0
    return size


KEEPING = [
    (Model(input_size=Size(80, 80), layers=3, width=96, heads=3, kernels="reference"), "reference"),
    (
        Model(
            input_size=Size(80, 80),
            layers=3,
            width=96,
            heads=3,
            positions="absolute",
            layer_scale=False,
            kernels="sdpa",
        ),
        "sdpa",
    ),
    (Model(input_size=Size(64, 96), layers=2, width=64, heads=2, mlp_ratio=3.0, kernels="reference"), "reference"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "kernels"), KEEPING)
def test_activations_that_autograd_keeps(shape, kernels, dtype):
    """Per image, as the difference between eight and four of them; sdpa on a CPU keeps what fused attention does."""
    measured = (kept(shape, 8, dtype, "none") - kept(shape, 4, dtype, "none")) / 4
    expected = costs.activations(shape, 64, 10, dtype.itemsize, "none", kernels)
    assert expected.per_image == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "kernels"), KEEPING)
def test_activations_with_checkpointing(shape, kernels, dtype):
    """Full: each block's input and what stands outside the blocks; selective: what products and fused attention gave,
    too. A block is whole only while it is computed again."""
    found = []
    for kind in CHECKPOINTING:
        measured = (kept(shape, 8, dtype, kind) - kept(shape, 4, dtype, kind)) / 4
        found.append(costs.activations(shape, 64, 10, dtype.itemsize, kind, kernels))
        assert found[-1].per_image == pytest.approx(measured, rel=0.05), kind
    plain, selective, full = found
    assert full.per_image < selective.per_image < plain.per_image
    assert full.working > selective.working > plain.working


def test_operations_of_the_own_tokenizer():
    """Each convolution of the real encoder, by its output."""
    settings = Tokenizer(input_size=Size(64, 96), vocabulary=40, width=32, residual_blocks=2)
    macs = []

    def count(layer: torch.nn.Conv2d, _: object, output: Tensor) -> None:
        macs.append(output[0].numel() * layer.weight[0].numel())

    dvae = Dvae(settings, 0)
    for layer in dvae.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    dvae.logits(torch.zeros(1, 3, 64, 96))
    assert costs.tokenizer_macs(settings, False) == sum(macs)
    assert costs.tokenizer_macs(Tokenizer(), True) == 26.06e9
