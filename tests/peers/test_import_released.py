"""`import` of what the released code saves: its arguments are read whole, what they do not say is assumed aloud."""

import pytest
import torch

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.stages import import_encoder
from beitforge.pipeline.weights.classifier import load_classifier
from beitforge.pipeline.weights.encoder import load_encoder
from tests.peers.foreign_weights import ARGUMENTS, HEADS, IMAGENET, WIDTH, close, imported, pixels, pth, released

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@torch.no_grad()
@pytest.mark.parametrize("key", ["model", "module"])
def test_a_pretraining_of_the_released_code(tmp_path, capfd, key):
    """Its own arguments are read: ImageNet's mean, its masks, its drop path."""
    model, weights = released(pretraining=True)
    out = imported(pth(tmp_path / "checkpoint-799.pth", weights, key, **ARGUMENTS), tmp_path / "out")
    encoder, config = load_encoder(out)
    assert close(encoder.all_logits(pixels(), None), model(pixels())[:, 1:])
    assert torch.equal(encoder.mask_embedding, weights["mask_token"])
    assert config.model.mean == IMAGENET and config.model.drop_path == 0.25 and config.model.heads == HEADS
    assert (config.mask.num_patches, config.mask.min_block) == (6, 4)
    said = capfd.readouterr().err
    assert f"compared with timm {timm.__version__} (the released code's model): logits differ" in said
    assert "model.mean" not in said and "its own arguments" in said


def test_what_a_bare_file_does_not_say_is_assumed_aloud(tmp_path, capfd):
    _, weights = released(pretraining=True)
    torch.save({"model": weights}, tmp_path / "beit.pth")
    imported(tmp_path / "beit.pth", tmp_path / "out", "model.std=[0.4, 0.4, 0.4]")
    said = capfd.readouterr().err
    assert "assumed, since nothing says it: model.mean=[0.5, 0.5, 0.5] (as published BEiT models take)" in said
    assert "mask.num_patches=6" in said and "tokenizer.input_size=32x32" in said and "model.std=" not in said
    _, weights = released(pretraining=True, use_shared_rel_pos_bias=False, use_abs_pos_emb=True)
    torch.save({"model": weights}, tmp_path / "absolute.pth")
    with pytest.raises(ConfigError, match=r"nothing says how many attention heads .* give model\.heads=N"):
        import_encoder.run(tmp_path / "absolute.pth", tmp_path / "absolute", [])


@torch.no_grad()
@pytest.mark.parametrize("said", [True, False], ids=["arguments", "bare"])
@pytest.mark.parametrize("pool", ["avg", "token"], ids=["mean", "cls"])
def test_a_fine_tuning_of_the_released_code(tmp_path, pool, said):
    """--use_cls has the norm that a pretraining has, and a head over classes: no head over tokens."""
    model, weights = released(pretraining=False, pool=pool)
    more = {**ARGUMENTS, "use_mean_pooling": pool == "avg", "model": "beit_base_patch16_224"} if said else {}
    out = imported(pth(tmp_path / "a.pth", weights, **more), tmp_path / "out")
    held = load_classifier(out)
    classifier, config = held.classifier, held.config
    assert close(classifier(pixels()), model(pixels()))
    assert config.finetune.pooling == ("mean" if pool == "avg" else "cls")


@torch.no_grad()
def test_a_model_without_biases_of_queries(tmp_path, capfd):
    model, weights = released(pretraining=True, qkv_bias=False)
    encoder, _ = load_encoder(imported(pth(tmp_path / "a.pth", weights, **ARGUMENTS), tmp_path / "out"))
    assert close(encoder.all_logits(pixels(), None), model(pixels())[:, 1:])
    assert "they are zero here" in capfd.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "own head"])
def test_a_pretraining_of_beit_v2(tmp_path, capfd, shared):
    """Its second head over early layers is left out, and said to be; published ones take ImageNet's mean."""
    model, weights = released(pretraining=True)
    block = {name.removeprefix("blocks.1."): w for name, w in weights.items() if name.startswith("blocks.1.")}
    second = {f"cls_pt_layers.{layer}.{name}": w + 1 for layer in range(2) for name, w in block.items()}
    if not shared:
        second |= {f"cls_pt_{name}": w + 1 for name, w in weights.items() if name.startswith(("norm.", "lm_head."))}
    torch.save({"model": weights | second}, tmp_path / "v2.pth")
    encoder, config = load_encoder(imported(tmp_path / "v2.pth", tmp_path / "out"))
    assert close(encoder.all_logits(pixels(), None), model(pixels())[:, 1:])
    said = capfd.readouterr().err
    assert f"left out: {len(second)} tensors such as cls_pt_" in said and "as published BEiT v2 models take" in said
    assert config.model.mean == IMAGENET and config.tokenizer.stride == 16


def test_data2vecs_regression_is_no_head_over_tokens(tmp_path, capfd):
    _, weights = released(pretraining=True, num_classes=WIDTH)
    imported(pth(tmp_path / "a.pth", weights, **ARGUMENTS, target_layers="[6,7]"), tmp_path / "out")
    assert "which predicts data2vec's hidden vectors, no tokens" in capfd.readouterr().err


CONTRADICTIONS = {
    "positions": ({"abs_pos_emb": True}, "use_abs_pos_emb is True, which its weights contradict"),
    "bias": ({"rel_pos_bias": False}, "rel_pos_bias is False, which its weights contradict"),
    "scale": ({"layer_scale_init_value": 0.0}, "layer_scale_init_value is 0, which"),
    "activation": ({"act_layer": "relu"}, "act_layer is 'relu'"),
    "biases": ({"qkv_bias": False}, "have no biases, which its weights contradict"),
    "no biases": ({"disable_qkv_bias": True}, "have no biases, which its weights contradict"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_arguments_that_its_weights_contradict(tmp_path, case):
    said, words = CONTRADICTIONS[case]
    _, weights = released(pretraining=True)
    with pytest.raises(ConfigError, match=words):
        import_encoder.run(pth(tmp_path / "a.pth", weights, **{**ARGUMENTS, **said}), tmp_path / "out", [])
