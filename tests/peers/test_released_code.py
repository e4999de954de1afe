"""Exports for the released code load there strictly: every name, shape and index buffer, none missing and none more.

Its names are written out here from microsoft/unilm, beit/modeling_pretrain.py and beit/modeling_finetune.py. With
BEITFORGE_UNILM=FOLDER, a checkout of that repository, its own models load the exports, too, and are imported.
"""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model.beit import Classifier
from beitforge.pipeline.model.resize import for_finetuning
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.stages import export, import_encoder
from beitforge.pipeline.weights.classifier import load_classifier, save_classifier
from beitforge.pipeline.weights.encoder import load_encoder
from beitforge.pipeline.weights.export_formats import UNILM_FILE
from tests.peers.test_exchange import MODES, made

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.meshgrid")
UNILM = os.environ.get("BEITFORGE_UNILM", "")
CLASSES = 5
Layout = dict[str, tuple[int, ...]]


def layout(model: Model, head: str, outputs: int, norm: str) -> Layout:
    """The released state_dict: norm and head by their names there."""
    width, hidden, patch = model.width, int(model.width * model.mlp_ratio), model.patch_size
    rows, columns = model.grid
    table = ((2 * rows - 1) * (2 * columns - 1) + 3, model.heads)
    index = (rows * columns + 1, rows * columns + 1)
    names: Layout = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    names |= {"patch_embed.proj.bias": (width,), f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    if outputs:
        names |= {f"{head}.weight": (outputs, width), f"{head}.bias": (outputs,)}
    if head == "lm_head":
        names |= {"mask_token": (1, 1, width)}
    if model.positions == "absolute":
        names |= {"pos_embed": (1, rows * columns + 1, width)}
    if model.positions == "relative_shared":
        names |= {"rel_pos_bias.relative_position_bias_table": table, "rel_pos_bias.relative_position_index": index}
    for layer in range(model.layers):
        block = f"blocks.{layer}."
        names |= {f"{block}{name}": (width,) for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")}
        names |= {f"{block}{name}.{part}": (width,) for name in ("norm1", "norm2") for part in ("weight", "bias")}
        names |= {f"{block}attn.qkv.weight": (3 * width, width), f"{block}attn.proj.weight": (width, width)}
        names |= {f"{block}attn.proj.bias": (width,), f"{block}mlp.fc2.bias": (width,)}
        names |= {f"{block}mlp.fc1.weight": (hidden, width), f"{block}mlp.fc1.bias": (hidden,)}
        names |= {f"{block}mlp.fc2.weight": (width, hidden)}
        if model.positions == "relative":
            names |= {f"{block}attn.relative_position_bias_table": table}
            names |= {f"{block}attn.relative_position_index": index}
    return names


def classifier(tiny, folder: Path, pooling: str) -> Path:
    """A folder of a classifier, as a fine-tuning's export and an import write it."""
    beit, config = load_encoder(made(tiny, folder.with_name("base")))
    weights, target = for_finetuning(beit.state_dict(), config.model, config.model.input_size, pooling)
    generator = torch.Generator().manual_seed(8)
    weights |= {
        "head.weight": torch.randn(CLASSES, target.width, generator=generator),
        "head.bias": torch.ones(CLASSES),
    }
    settings = [f"finetune.input_size={target.input_size}", f"finetune.pooling={pooling}", "model.positions=relative"]
    state = State(step=7, samples_seen=56, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    names = tuple(f"class {number}" for number in range(CLASSES))
    save_classifier(folder, weights, load_config(str(tiny.config), settings), names, state)
    return folder


def written(source: Path, folder: Path, finetune: bool = False) -> tuple[dict[str, Tensor], Path]:
    """What `export --to unilm` saves, read as the released code reads it, and its file."""
    assert export.run(source, folder, "unilm", finetune=finetune) == 0
    return torch.load(folder / UNILM_FILE, weights_only=True)["model"], folder / UNILM_FILE


def shapes(weights: dict[str, Tensor]) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("positions", MODES)
def test_a_pretraining_has_every_name_of_the_released_model(tiny, tmp_path, positions):
    source = made(tiny, tmp_path / "encoder", f"model.positions={positions}")
    _, config = load_encoder(source)
    weights, _ = written(source, tmp_path / "out")
    assert shapes(weights) == layout(config.model, "lm_head", config.tokenizer.vocabulary, "norm")
    assert {w.dtype for name, w in weights.items() if name.endswith("index")} <= {torch.int64}
    ready, target = for_finetuning(load_encoder(source)[0].state_dict(), config.model, config.model.input_size)
    assert "norm.weight" in ready
    weights, _ = written(source, tmp_path / "tuned", finetune=True)
    assert shapes(weights) == layout(target, "head", 0, "fc_norm")


@torch.no_grad()
@pytest.mark.parametrize(("pooling", "norm"), [("mean", "fc_norm"), ("cls", "norm")])
def test_a_classifier_goes_out_and_comes_in(tiny, tmp_path, capfd, pooling, norm):
    """Nothing need be assumed: mean, heads, names and the central view are beside the weights."""
    source = classifier(tiny, tmp_path / "classifier", pooling)
    weights, file = written(source, tmp_path / "out")
    held = load_classifier(source)
    ours, config, names = held.classifier, held.config, held.names
    assert shapes(weights) == layout(config.model, "head", CLASSES, norm)
    assert import_encoder.run(file, tmp_path / "back", []) == 0
    held = load_classifier(tmp_path / "back")
    again, config_again, names_again = held.classifier, held.config, held.names
    assert names == names_again and len(names) == CLASSES
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert config_again.model == config.model and config_again.finetune.pooling == pooling
    assert "assumed" not in capfd.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "encoder alone"])
def test_a_classifier_of_ours_is_imported(tiny, tmp_path, whole):
    source = classifier(tiny, tmp_path / "classifier", "mean")
    held = load_classifier(source)
    ours, config, names = held.classifier, held.config, held.names
    assert import_encoder.run(source, tmp_path / "copy", [], encoder_alone=not whole) == 0
    if whole:
        again = load_classifier(tmp_path / "copy")
        assert names == again.names
        assert all(
            torch.equal(tensor, again.classifier.state_dict()[name]) for name, tensor in ours.state_dict().items()
        )
        return
    encoder, config_again = load_encoder(tmp_path / "copy")
    states = (each.hidden(pixels(config.model), None)[-1] for each in (ours, encoder))
    assert torch.equal(*states) and config_again.model.positions == "relative"


@pytest.fixture(params=["beit", "beit2"])
def code(request, monkeypatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Modules of the released code: of pretraining and of fine-tuning."""
    names = ("modeling_finetune", "modeling_pretrain")
    registry = importlib.import_module("timm.models.registry")
    monkeypatch.setattr(registry, "register_model", lambda function: function)  # timm's own keep their names
    sys.path.insert(0, str(Path(UNILM) / request.param))
    finetuning, pretraining = (importlib.import_module(name) for name in names)
    yield pretraining, finetuning
    sys.path.pop(0)
    for name in names:
        del sys.modules[name]


def released(kind: type, model: Model, **settings) -> nn.Module:
    bias = {"use_rel_pos_bias": model.positions == "relative"}
    bias |= {"use_shared_rel_pos_bias": model.positions == "relative_shared"}
    bias |= {"use_abs_pos_emb": model.positions == "absolute"}
    shape = {"img_size": model.input_size, "patch_size": model.patch_size, "embed_dim": model.width}
    shape |= {"depth": model.layers, "num_heads": model.heads, "mlp_ratio": model.mlp_ratio, "init_values": 0.1}
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return kind(**{**shape, **bias, "norm_layer": norm, "qkv_bias": True, **settings}).eval()


def pixels(model: Model) -> Tensor:
    return torch.randn(2, 3, *model.input_size, generator=torch.Generator().manual_seed(3))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < 1e-5 * theirs.abs().max())


if UNILM:

    @torch.no_grad()
    @pytest.mark.parametrize("positions", MODES)
    def test_the_released_pretraining_model_loads_it_strictly(code, tiny, tmp_path, positions):
        source = made(tiny, tmp_path / "encoder", f"model.positions={positions}")
        ours, config = load_encoder(source)
        weights, _ = written(source, tmp_path / "out")
        peer = released(code[0].VisionTransformerForMaskedImageModeling, config.model, vocab_size=64)
        peer.load_state_dict(weights, strict=True)
        mask = torch.rand(2, config.model.num_patches) < 0.4
        theirs = peer(pixels(config.model), mask, return_all_tokens=True)
        assert close(ours.all_logits(pixels(config.model), mask), theirs)
        tuned, _ = written(source, tmp_path / "tuned", finetune=True)
        _, target = for_finetuning(ours.state_dict(), config.model, config.model.input_size)
        released(code[1].VisionTransformer, target, num_classes=0).load_state_dict(tuned, strict=True)

    @torch.no_grad()
    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_the_released_fine_tuning_model_loads_it_strictly(code, tiny, tmp_path, pooling):
        source = classifier(tiny, tmp_path / "classifier", pooling)
        held = load_classifier(source)
        ours, config = held.classifier, held.config
        weights, _ = written(source, tmp_path / "out")
        mean = pooling == "mean"
        peer = released(code[1].VisionTransformer, config.model, num_classes=CLASSES, use_mean_pooling=mean)
        peer.load_state_dict(weights, strict=True)
        assert isinstance(ours, Classifier)
        assert close(ours(pixels(config.model)), peer(pixels(config.model)))

    @torch.no_grad()
    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_the_released_fine_tuning_is_imported(code, tiny, tmp_path, pooling):
        model = load_config(str(tiny.config), ["model.positions=relative"]).model
        mean = pooling == "mean"
        peer = released(code[1].VisionTransformer, model, num_classes=CLASSES, use_mean_pooling=mean)
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        arguments = argparse.Namespace(use_mean_pooling=mean, nb_classes=CLASSES, rel_pos_bias=True, abs_pos_emb=False)
        torch.save({"model": peer.state_dict(), "args": arguments, "epoch": 29}, tmp_path / "checkpoint-29.pth")
        assert import_encoder.run(tmp_path / "checkpoint-29.pth", tmp_path / "out", []) == 0
        ours = load_classifier(tmp_path / "out").classifier
        assert close(ours(pixels(model)), peer(pixels(model)))

    @torch.no_grad()
    @pytest.mark.parametrize("shared", [True, False])
    def test_the_released_second_version_is_imported(code, tiny, tmp_path, shared):
        if not hasattr(code[0], "VisionTransformerForMaskedImageModelingCLS"):
            return  # the first version has none
        model = load_config(str(tiny.config), []).model
        second = {"early_layers": 1, "head_layers": 2, "shared_lm_head": shared, "vocab_size": 64}
        peer = released(code[0].VisionTransformerForMaskedImageModelingCLS, model, **second)
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        torch.save({"model": peer.state_dict()}, tmp_path / "v2.pth")
        assert import_encoder.run(tmp_path / "v2.pth", tmp_path / "out", []) == 0
        ours, _ = load_encoder(tmp_path / "out")
        mask = torch.rand(2, model.num_patches) < 0.4
        assert close(ours.all_logits(pixels(model), mask), peer(pixels(model), mask, return_all_tokens=True)[0])
