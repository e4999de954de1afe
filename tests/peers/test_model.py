"""The encoder against transformers' and timm's BEiT: same weights, same image, same mask, same numbers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.model.resize import for_finetuning
from beitforge.pipeline.weights import export_formats
from beitforge.pipeline.weights.conversion import from_hf, from_unilm, to_hf, to_unilm

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

V = 64
BASE = Model(input_size=Size(32, 32), patch_size=8, layers=3, width=48, heads=3, drop_path=0.0)
LARGE = dataclasses.replace(BASE, input_size=Size(48, 48), layers=4, width=64, heads=4, layer_scale_init=1e-5)
MODES = ("absolute", "relative_shared", "relative")
CLOSE = 1e-5  # relative, float32


def randomised(model: Model) -> Beit:
    """Every parameter away from zero, so that each takes part."""
    beit = Beit(model, V, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in beit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return beit


def batch(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, masks of 5 patches, tokens of the masked patches in row order."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, *model.input_size, generator=generator)
    mask = torch.rand(2, model.num_patches, generator=generator).argsort(dim=1) < 5
    return pixels, mask, torch.randint(V, (10,), generator=generator)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).detach())


@pytest.mark.parametrize("layer_scale", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("model", [BASE, LARGE], ids=["base", "large"])
def test_logits_loss_and_every_gradient_are_transformers(tmp_path, model, positions, layer_scale):
    model = dataclasses.replace(model, positions=positions, layer_scale=layer_scale)
    beit = randomised(model)
    export_formats.write_hf(tmp_path, beit.state_dict(), model, V)
    from transformers import BeitForMaskedImageModeling

    peer = BeitForMaskedImageModeling.from_pretrained(tmp_path, attn_implementation="eager").train()
    pixels, mask, tokens = batch(model)
    theirs = peer(pixels, bool_masked_pos=mask, labels=tokens)
    logits, index, weight = beit(pixels, mask, 5)
    assert weight.all() and torch.equal(torch.zeros_like(mask).scatter(1, index, True), mask)
    assert apart(logits.flatten(0, 1), theirs.logits[mask]) < CLOSE
    loss = F.cross_entropy(logits.flatten(0, 1), tokens)
    assert abs(loss.item() / theirs.loss.item() - 1) < CLOSE
    loss.backward()
    theirs.loss.backward()
    ours = to_hf({name: parameter.grad for name, parameter in beit.named_parameters()}, model)
    found = published_names(peer, tmp_path, {name: parameter.grad for name, parameter in peer.named_parameters()})
    assert ours.keys() == found.keys()
    worst = {name: apart(ours[name], found[name]) for name in ours}
    assert max(worst.values()) < CLOSE, max(worst, key=worst.get)


def published_names(peer, folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers renames in memory and saves under the published names: its own save says which is which."""
    from safetensors.torch import load_file

    with torch.no_grad():
        for parameter, tensor in zip(peer.parameters(), tensors.values(), strict=True):
            parameter.copy_(tensor)
    peer.save_pretrained(folder / "renamed")
    return load_file(folder / "renamed" / "model.safetensors")


@pytest.mark.parametrize("size", [Size(32, 32), Size(40, 40), Size(32, 48), Size(56, 24)], ids=str)
@pytest.mark.parametrize("positions", MODES)
def test_features_are_timms_on_any_grid(tmp_path, positions, size):
    """timm takes images that are not square; transformers' interpolation is wrong for them, and write_hf says so."""
    model = dataclasses.replace(BASE, positions=positions, input_size=size)
    beit = randomised(model)
    export_formats.write_timm(tmp_path, beit.state_dict(), model, V)
    pixels, _, _ = batch(model)
    with torch.no_grad():
        assert apart(beit.all_logits(pixels, None), export_formats.timm_forward(tmp_path)(pixels, None)) < CLOSE


def test_transformers_is_not_given_what_it_gets_wrong(tmp_path):
    model = dataclasses.replace(BASE, input_size=Size(32, 48))
    with pytest.raises(ValueError, match="not square"):
        export_formats.write_hf(tmp_path, randomised(model).state_dict(), model, V)


@pytest.mark.parametrize("positions", MODES)
def test_names_go_there_and_back(positions):
    model = dataclasses.replace(BASE, positions=positions)
    weights = randomised(model).state_dict()
    for back in (from_hf(to_hf(weights, model)), from_unilm(to_unilm(weights, model))):
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("size", [Size(32, 32), Size(56, 56)], ids=str)
@pytest.mark.parametrize("positions", ["absolute", "relative_shared"])
@pytest.mark.parametrize("peer", ["hf", "timm"])
def test_the_fine_tuning_form_is_theirs(tmp_path, peer, positions, size):
    """Mean pooling, a table in every layer, tables and positions on another window."""
    model = dataclasses.replace(BASE, positions=positions)
    weights, target = for_finetuning(randomised(model).state_dict(), model, size)
    ours = Classifier(target, classes=0).eval()
    ours.load_state_dict(weights)
    write, forward = (
        (export_formats.write_hf, export_formats.hf_forward)
        if peer == "hf"
        else (export_formats.write_timm, export_formats.timm_forward)
    )
    write(tmp_path, weights, target, 0)
    pixels, _, _ = batch(target)
    with torch.no_grad():
        assert apart(ours(pixels), forward(tmp_path)(pixels, None)) < CLOSE


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((3, 5), (6, 4))], ids=str)
def test_a_resized_table_lies_where_timms_does(old, new):
    """timm has the released code's places, and lines between them where that and we take splines. What is linear in the
    places is the same by either; what is not, passes through the same points."""
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    from beitforge.pipeline.model.resize import _places, resize_table

    down, across = (torch.tensor(_places(2 * a - 1, 2 * b - 1)) for a, b in zip(old, new, strict=True))
    plane = 0.3 * down[:, None] - 0.7 * across[None, :]
    table = torch.cat([plane.reshape(-1, 1), torch.tensor([[5.0], [6.0], [7.0]])])
    rows = (2 * new[0] - 1) * (2 * new[1] - 1) + 3
    theirs = resize_rel_pos_bias_table(table, new, (rows, 1), old)
    torch.testing.assert_close(resize_table(table, old, new), theirs, rtol=1e-4, atol=1e-4)
    bent = torch.cat([plane.square().reshape(-1, 1), table[-3:]])
    middle = (rows - 3) // 2
    torch.testing.assert_close(resize_table(bent, old, new)[middle], bent[(len(bent) - 3) // 2])
