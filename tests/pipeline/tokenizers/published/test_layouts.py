"""Foreign tokenizer files: what their publishers save is read, and another layout is refused in one line. That the
numbers are the publishers' is tests/peers' business; damaged and hostile files are test_refusals'.
"""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.dalle import Dalle, DalleShape, flava_name, read_dalle_pickles, read_flava_codebook
from beitforge.pipeline.tokenizers.vqkd import Vqkd, VqkdShape, published_name, read_vqkd
from tests.pipeline.tokenizers.published.conftest import FORMATS, SHAPE, encoder_of, filled, refusal

pytestmark = pytest.mark.usefixtures("one_thread")

VQKD = VqkdShape(vocabulary=10, code_size=4, layers=2, width=64, heads=1, input_size=16, patch_size=8)


@FORMATS
def test_dalle_is_read_without_its_classes(tmp_path, openai, monkeypatch, old):
    """Every weight as it was, with neither dall_e nor torch's own pickle functions at hand."""
    dalle = filled(Dalle(SHAPE))
    paths = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    for half, path in ((dalle.encoder, paths[0]), (dalle.decoder, paths[1])):
        torch.save(openai(half, path.stem), path, _use_new_zipfile_serialization=not old)
    for name in ("dall_e", "dall_e.encoder", "dall_e.decoder", "dall_e.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        monkeypatch.delattr(torch._utils, name)
    shape, weights = read_dalle_pickles(*paths)
    assert shape == SHAPE
    assert weights.keys() == dalle.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in dalle.state_dict().items())
    shape, weights = read_dalle_pickles(paths[0], None)
    assert not shape.has_decoder
    assert all(name.startswith("encoder.") for name in weights)


@pytest.mark.parametrize("make", [lambda: Dalle(SHAPE), lambda: Vqkd(VQKD)], ids=["dalle", "vqkd"])
def test_a_fresh_module_draws_nothing(make):
    """A forgotten weight shows as NaN, and torch's own generator is left as it was."""
    before = torch.random.get_rng_state()
    module = make()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.isnan().all() for parameter in module.parameters())
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in make().parameters())


def test_a_dalle_without_decoder_says_so(encoder_file):
    shape, weights = read_dalle_pickles(encoder_file, None)
    dalle = Dalle(shape)
    dalle.load_state_dict(weights)
    assert not dalle.decodes
    with pytest.raises(ConfigError, match=r"no decoder.*decoder\.pkl beside encoder\.pkl"):
        dalle.decode(torch.zeros(1, 1, dtype=torch.int64), (1, 1))


def test_halves_in_each_others_place(tmp_path, openai):
    torch.save(openai(Dalle(SHAPE).decoder, "decoder"), tmp_path / "encoder.pkl")
    assert "holds a dall_e.decoder.Decoder, not a dall_e.encoder.Encoder" in refusal(
        tmp_path / "encoder.pkl", encoder_of
    )


def test_halves_of_two_models(encoder_file, openai):
    other = encoder_file.with_name("decoder.pkl")
    torch.save(openai(filled(Dalle(DalleShape(vocabulary=21, hidden=8, has_decoder=True))).decoder, "decoder"), other)
    line = refusal(other, lambda path: read_dalle_pickles(encoder_file, path))
    assert "blocks.input.w is of shape [128, 21, 1, 1], expected [128, 20, 1, 1]" in line


@pytest.mark.parametrize("prefix", ["", "image_codebook."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_flava(tmp_path, prefix, file):
    """Alone, and within a whole FLAVA, whose other weights are left."""
    half = filled(Dalle(SHAPE)).encoder
    weights = {prefix + flava_name(name): tensor for name, tensor in half.state_dict().items()}
    if prefix:
        weights["flava.text_model.embeddings.word_embeddings.weight"] = torch.ones(3, 3)
    save_file(weights, tmp_path / file) if file.endswith("rs") else torch.save(weights, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"image_codebook_config": {"num_groups": 4}} if prefix else {}))
    shape, found = read_flava_codebook(tmp_path)
    assert (shape.vocabulary, shape.hidden, shape.blocks_per_group, shape.has_decoder) == (20, 8, 1, False)
    assert found.keys() == {f"encoder.{name}" for name in half.state_dict()}
    assert all(torch.equal(found[f"encoder.{name}"], tensor) for name, tensor in half.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"num_groups": 3}', "num_groups 3"),
        ('{"image_codebook_config": {"num_groups": 5}}', "num_groups 5"),
        ("{", "damaged"),
        ("[]", "damaged"),
    ],
)
def test_flava_of_other_groups(tmp_path, content, words):
    """The number of groups changes the gain of every block, and shows in no weight."""
    (tmp_path / "config.json").write_text(content)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert words in refusal(tmp_path / "config.json", lambda path: read_flava_codebook(path.parent))


def test_no_flava(tmp_path):
    assert "neither model.safetensors nor" in refusal(tmp_path, read_flava_codebook)
    (tmp_path / "model.safetensors").write_bytes(b"--2024-01-01-- https://huggingface.co/")
    assert "cannot be read" in refusal(tmp_path / "model.safetensors", read_flava_codebook)
    save_file({"text_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "blocks.output.conv.weight is missing" in refusal(tmp_path / "model.safetensors", read_flava_codebook)


def vqkd_weights() -> dict[str, torch.Tensor]:
    """As published, by name."""
    weights = {published_name(name): tensor for name, tensor in filled(Vqkd(VQKD)).state_dict().items()}
    weights["encoder.patch_embed.proj.weight"] = weights["encoder.patch_embed.proj.weight"].view(64, 3, 8, 8)
    return weights | {"decoder.cls_token": torch.ones(1, 1, 64), "quantize.embedding.initted": torch.ones(1)}


@FORMATS
@pytest.mark.parametrize("key", ["model", "state_dict", ""])
def test_vqkd(tmp_path, key, old):
    """Under the keys that the released code looks for; what its training leaves beside them is not run."""
    content = {key: vqkd_weights()} if key else vqkd_weights()
    if key:
        groups = [{"lr": np.float64(1e-3), "betas": (0.9, 0.99)}]
        content |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": groups}, "epoch": 99}
        content |= {"args": argparse.Namespace(process_type="default", device=torch.device("cpu"), opt_betas=[0.9])}
    torch.save(content, tmp_path / "vqkd.pth", _use_new_zipfile_serialization=not old)
    shape, weights = read_vqkd(tmp_path / "vqkd.pth")
    assert shape == VQKD
    expected = filled(Vqkd(VQKD)).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(tmp_path, kind):
    """And views of a larger storage are cut out of it."""
    weights = {name: tensor.to(kind) for name, tensor in vqkd_weights().items()}
    whole = torch.stack([weights["encoder.fc_norm.weight"]] * 2, dim=1)
    weights["encoder.fc_norm.weight"] = whole[:, 1]
    torch.save({"model": weights}, tmp_path / "vqkd.pth")
    _, found = read_vqkd(tmp_path / "vqkd.pth")
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in found.values())
    assert torch.equal(found["norm.weight"], whole[:, 1].float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("encode_task_layer.0.bias"), "lacks the weight 'encode_task_layer.0.bias'"),
        (lambda w: w.pop("encoder.blocks.0.norm1.weight"), "lacks the weight 'encoder.blocks.0.norm1.weight'"),
        (lambda w: w.pop("quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        (lambda w: w.update({"encoder.blocks.1.gamma_1": torch.ones(64)}), "has a weight 'encoder.blocks.1.gamma_1'"),
        (lambda w: w.update({"encoder.fc_norm.bias": torch.ones(65)}), "is of shape [65], expected [64]"),
        (lambda w: w.update({"encoder.pos_embed": torch.ones(1, 6, 64)}), "expected [1, 5, 64]"),
        (lambda w: w.update({"encoder.pos_embed": torch.ones(1, 1, 64)}), "is of shape [1, 1, 64]"),
        (lambda w: w.update({"encoder.fc_norm.bias": torch.full((64,), float("nan"))}), "non-finite"),
        (lambda w: w.update({"encoder.fc_norm.bias": 3}), "no plain tensor as 'encoder.fc_norm.bias'"),
        (lambda w: w.update({"encoder.fc_norm.bias": torch.ones(1).expand(64)}), "in 1 numbers"),
        (lambda w: w.clear(), "encoder.patch_embed.proj.weight is missing"),
    ],
)
def test_another_layout_is_refused(tmp_path, change, words):
    weights = vqkd_weights()
    change(weights)
    torch.save({"model": weights}, tmp_path / "vqkd.pth")
    assert words in refusal(tmp_path / "vqkd.pth", read_vqkd)


def test_another_range_of_pixels_is_refused(tmp_path):
    """What process_type changes shows in no weight."""
    torch.save({"model": vqkd_weights(), "args": argparse.Namespace(process_type="imagenet_norm")}, tmp_path / "a.pth")
    assert "process_type" in refusal(tmp_path / "a.pth", read_vqkd)
