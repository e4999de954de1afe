"""`import` of every kind of checkpoint that the libraries write: it says what it read, what it assumed and how its
numbers compare with the library's, and refuses what would compute others here."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.stages import export, import_encoder, import_tokenizer
from beitforge.pipeline.weights.classifier import load_classifier
from beitforge.pipeline.weights.encoder import fine_tuned, load_encoder, run_config
from beitforge.pipeline.weights.export_formats import UNILM_FILE
from tests.conftest import ROOT
from tests.peers import test_vqkd
from tests.peers.foreign_weights import (
    ABSOLUTE,
    CLASSES,
    HEADS,
    IMAGENET,
    OWN,
    SIZE,
    as_in_memory,
    as_pickle,
    changed,
    close,
    hf,
    imported,
    in_shards,
    pixels,
    pth,
    released,
    saved_by_timm,
)

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@torch.no_grad()
@pytest.mark.parametrize(
    "form", [lambda folder: folder, as_pickle, in_shards, as_in_memory], ids=["whole", "bin", "shards", "memory"]
)
@pytest.mark.parametrize("positions", [{}, OWN, ABSOLUTE], ids=["shared", "own", "absolute"])
def test_a_pretraining_of_transformers(tmp_path, capfd, positions, form):
    """Heads of 8, not 64; its own mean; compared with the library, which is not told what we made of it."""
    mean = {"image_mean": list(IMAGENET), "image_std": [0.2, 0.3, 0.4]}
    model = hf(
        tmp_path / "hf", "BeitForMaskedImageModeling", mean, layer_norm_eps=1e-6, drop_path_rate=0.05, **positions
    )
    encoder, config = load_encoder(imported(form(tmp_path / "hf"), tmp_path / "out"))
    assert close(encoder.all_logits(pixels(), None), model(pixels()).logits)
    assert config.model.heads == HEADS and config.model.drop_path == 0.05
    assert config.model.mean == IMAGENET and config.model.std == (0.2, 0.3, 0.4)
    said = capfd.readouterr().err
    assert f"compared with transformers {transformers.__version__}: logits differ by at most" in said
    assert "preprocessor_config.json" in said and "model.mean=" not in said


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BeitForImageClassification", "Data2VecVisionForImageClassification"])
@pytest.mark.parametrize("names", [False, True], ids=["unnamed", "named"])
def test_a_classifier_of_transformers(tmp_path, capfd, kind, names):
    """Norm, head and names whole."""
    called = {i: f"class {i}" for i in range(CLASSES)}
    model = hf(
        tmp_path / "hf",
        kind,
        hidden_dropout_prob=0.1,
        use_mask_token=False,
        layer_norm_eps=1e-6,
        **OWN,
        **({"id2label": called} if names else {}),
    )
    out = imported(tmp_path / "hf", tmp_path / "out", "finetune.test_crop=0.9")
    held = load_classifier(out)
    classifier, config, found = held.classifier, held.config, held.names
    assert close(classifier(pixels()), model(pixels()).logits)
    assert found == (tuple(called.values()) if names else ())
    assert config.finetune.test_crop == 0.9 and config.finetune.dropout == 0.1
    assert config.finetune.input_size == (SIZE, SIZE)
    said = capfd.readouterr().err
    assert "compared with transformers" in said and f"classifier of {CLASSES} classes" in said
    assert "model.mean=[0.5, 0.5, 0.5] (as published BEiT models take)" in said, "no preprocessor_config.json"


@torch.no_grad()
def test_the_encoder_of_a_classifier(tmp_path, capfd):
    """Without norm and head it pretrains further; what is left out is said."""
    model = hf(tmp_path / "hf", "BeitForImageClassification", layer_norm_eps=1e-6, **OWN)
    out = imported(tmp_path / "hf", tmp_path / "out", encoder=True)
    encoder, _ = load_encoder(out)
    assert not fine_tuned(out)
    theirs = model.beit(pixels()).last_hidden_state
    assert close(encoder.hidden(pixels(), None)[-1], theirs)
    said = capfd.readouterr().err
    assert "left out: 4 tensors such as pooled_norm" in said and "hidden states differ by at most" in said


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BeitModel", "Data2VecVisionModel", "BeitForSemanticSegmentation"])
def test_an_encoder_without_head_of_transformers(tmp_path, capfd, kind):
    segmentation = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1], "auxiliary_channels": 8}
    more = segmentation if "Segm" in kind else {}
    hf(tmp_path / "hf", kind, layer_norm_eps=1e-6, **more)
    encoder, _ = load_encoder(imported(tmp_path / "hf", tmp_path / "out"))
    base = transformers.Data2VecVisionModel if "Data2" in kind else transformers.BeitModel
    peer = base.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    assert close(encoder.hidden(pixels(), None)[-1], peer(pixels()).last_hidden_state)
    said = capfd.readouterr().err
    assert "hidden states differ by at most" in said and "drawn from data.seed: " in said


def test_a_published_epsilon_is_told(tmp_path, capfd):
    """transformers' published BEiTs say 1e-12, the released code 1e-6: what that changes is measured."""
    hf(tmp_path / "hf", "BeitForMaskedImageModeling", layer_norm_eps=1e-12)
    imported(tmp_path / "hf", tmp_path / "out")
    said = capfd.readouterr().err
    assert (
        "layer_norm_eps is 1e-12 there and 1e-06 here, which changes" in said and "compared with transformers" in said
    )


REFUSED = {
    "relu": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "tanh": ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    "epsilon": ({"layer_norm_eps": 0.1}, r"layer_norm_eps is 0\.1"),
    "heads": ({"num_attention_heads": 2}, "its config says 2 heads, its bias table has 4"),
    "size": ({"image_size": 64}, "said to be 64x64, but its weights are for a grid of 4×4"),
    "channels": ({"num_channels": 1}, "num_channels is 1"),
    "width": ({"hidden_size": 64}, "hidden_size is 64, its weights have 32"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
    "mlp": ({"intermediate_size": 128}, "intermediate_size is 128"),
    "positions": ({"use_shared_relative_position_bias": False}, "which its weights contradict"),
    "more positions": ({"use_absolute_position_embeddings": True}, "which its weights contradict"),
    "scale": ({"layer_scale_init_value": 0}, "layer_scale_init_value is 0, which its weights contradict"),
    "another model": ({"model_type": "vit"}, "model_type 'vit'"),
    "tokens": ({"vocab_size": 100}, "vocab_size is 100, its weights have 64"),
    "no number": ({"num_attention_heads": "many"}, "num_attention_heads is 'many', no number"),
    "infinite": ({"drop_path_rate": float("inf")}, "drop_path_rate is inf, no number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_computes_other_numbers_is_refused(tmp_path, case):
    fields, words = REFUSED[case]
    hf(tmp_path / "hf", "BeitForMaskedImageModeling")
    with pytest.raises(ConfigError, match=words) as caught:
        import_encoder.run(changed(tmp_path / "hf", **fields), tmp_path / "out", [])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [[], ["model.heads=2"], ["model.heads=4"]], ids=["unsaid", "wrong", "right"])
def test_heads_that_no_weight_shows(tmp_path, capfd, settings):
    """Absolute positions have no table. Where config.json says nothing it is the library's 12; a wrong word of ours
    does not get past the comparison."""
    hf(tmp_path / "hf", "BeitForMaskedImageModeling", layer_norm_eps=1e-6, **ABSOLUTE)
    if not settings:
        path = tmp_path / "hf" / "config.json"
        path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "num_attention_heads"})
        )
    if settings == ["model.heads=4"]:
        imported(tmp_path / "hf", tmp_path / "out", *settings)
        return
    with pytest.raises(ConfigError, match="not imported" if settings else "heads"):
        import_encoder.run(tmp_path / "hf", tmp_path / "out", settings)


PREPROCESSORS = {
    "whole numbers": ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
    "not normalised": ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0.0, 1.0),
    "a factor": ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 0.5, 0.5),
}


@pytest.mark.parametrize("case", PREPROCESSORS)
def test_preprocessing_in_other_words(tmp_path, case):
    said, mean, std = PREPROCESSORS[case]
    hf(tmp_path / "hf", "BeitForMaskedImageModeling", said)
    model = run_config(imported(tmp_path / "hf", tmp_path / "out")).model
    assert model.mean == pytest.approx((mean,) * 3) and model.std == pytest.approx((std,) * 3)


def test_preprocessing_within_a_processor(tmp_path):
    """As transformers reads it where preprocessor_config.json is not there; a crop is read where no mean is said."""
    folder = tmp_path / "hf"
    hf(folder, "BeitForImageClassification")
    said = {"image_processor": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3] * 3, "do_center_crop": False}}
    (folder / "processor_config.json").write_text(json.dumps(said))
    config = run_config(imported(folder, tmp_path / "out"))
    assert config.model.mean == (0.4, 0.5, 0.6) and config.finetune.test_crop == 1.0
    del said["image_processor"]["image_mean"]
    (folder / "processor_config.json").write_text(json.dumps(said))
    config = run_config(imported(folder, tmp_path / "again"))
    assert config.model.mean == (0.5, 0.5, 0.5) and config.finetune.test_crop == 1.0


@pytest.mark.parametrize("names", [2, 9])
def test_names_of_other_classes_than_the_head_has(tmp_path, names):
    hf(tmp_path / "hf", "BeitForImageClassification")
    labels = {str(label): f"class {label}" for label in range(names)}
    with pytest.raises(ConfigError, match=f"id2label names {names} classes, its head has {CLASSES}"):
        import_encoder.run(changed(tmp_path / "hf", id2label=labels), tmp_path / "out", [])


@pytest.mark.parametrize("shape", [{}, OWN, ABSOLUTE], ids=["shared", "own", "absolute"])
def test_an_export_to_timm_without_layer_scale_comes_back(tmp_path, shape):
    hf(tmp_path / "hf", "BeitForMaskedImageModeling", layer_scale_init_value=0.0, **shape)
    first = imported(tmp_path / "hf", tmp_path / "first")
    assert export.run(first, tmp_path / "timm", "timm") == 0
    again = imported(tmp_path / "timm", tmp_path / "again")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("blocks."))


def test_a_file_is_described_by_what_lies_beside_it(tmp_path):
    """pytorch_model.bin given by name is as its folder."""
    hf(tmp_path / "hf", "BeitForMaskedImageModeling", {"image_mean": [0.4] * 3, "image_std": [0.3] * 3})
    imported(as_pickle(tmp_path / "hf") / "pytorch_model.bin", tmp_path / "out")
    assert run_config(tmp_path / "out").model.mean == (0.4, 0.4, 0.4)


def test_folders_with_parts_missing_or_several_weights(tmp_path):
    hf(tmp_path / "hf", "BeitForMaskedImageModeling")
    shutil.copytree(tmp_path / "hf", tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").rename(tmp_path / "two" / "a.safetensors")
    shutil.copy(tmp_path / "two" / "a.safetensors", tmp_path / "two" / "b.safetensors")
    in_shards(tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    cases = [("hf", "model-00002-of-00003.safetensors', which is missing"), ("two", "several files of weights")]
    for folder, words in cases:
        with pytest.raises(ConfigError, match=words):
            import_encoder.run(tmp_path / folder, tmp_path / "out", [])
    index.write_text(json.dumps({"weight_map": {"a": "../two/a.safetensors"}}))
    with pytest.raises(ConfigError, match="does not lie beside it"):
        import_encoder.run(tmp_path / "hf", tmp_path / "out", [])
    index.unlink()
    with pytest.raises(ConfigError, match="2 of 3 parts"):
        import_encoder.run(tmp_path / "hf", tmp_path / "out", [])


@torch.no_grad()
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_classifier_of_timm(tmp_path, capfd, pool):
    model, _ = released(pretraining=False, pool=pool)
    out = imported(saved_by_timm(tmp_path / "timm", model, global_pool=pool), tmp_path / "out")
    held = load_classifier(out)
    classifier, config = held.classifier, held.config
    assert close(classifier(pixels()), model(pixels()))
    assert config.model.mean == IMAGENET and config.finetune.test_crop == 0.95
    assert f"compared with timm {timm.__version__}: logits differ by at most" in capfd.readouterr().err


def test_words_of_timm_that_change_the_numbers(tmp_path):
    model, _ = released(pretraining=False)
    cases = {
        "swiglu_mlp is True": {"swiglu_mlp": True},
        "norm_layer is 'rmsnorm'": {"norm_layer": "rmsnorm"},
        "its config says 2 heads": {"num_heads": 2},
        "use_abs_pos_emb is True": {"use_abs_pos_emb": True},
        "global_pool is ''": {"global_pool": ""},
    }
    for number, (words, fields) in enumerate(cases.items()):
        with pytest.raises(ConfigError, match=words):
            import_encoder.run(saved_by_timm(tmp_path / str(number), model, **fields), tmp_path / "out", [])
    with pytest.raises(ConfigError, match="architecture is 'vit_base_patch16_224', no BEiT"):
        import_encoder.run(saved_by_timm(tmp_path / "vit", model, "vit_base_patch16_224"), tmp_path / "out", [])


def test_numbers_that_the_library_does_not_compute_are_not_imported(tmp_path, monkeypatch):
    """The command believes the peer, not itself."""
    from beitforge.pipeline.weights import foreign

    real = foreign.from_hf
    monkeypatch.setattr(
        foreign, "from_hf", lambda w: {n: t * (1.001 if n.endswith("gamma2") else 1) for n, t in real(w).items()}
    )
    hf(tmp_path / "hf", "BeitForMaskedImageModeling", layer_norm_eps=1e-6)
    with pytest.raises(ConfigError, match="computes logits from it that differ by"):
        import_encoder.run(tmp_path / "hf", tmp_path / "out", [])


def test_images_that_are_not_square(tmp_path):
    """timm computes them; transformers mixes up their tables, or fails: neither is a traceback, nor imported."""
    model, _ = released(pretraining=False, img_size=(32, 48))
    folder = saved_by_timm(tmp_path / "timm", model, img_size=[32, 48])
    assert run_config(imported(folder, tmp_path / "out")).model.input_size == (32, 48)
    for number, positions in enumerate([{}, ABSOLUTE]):
        hf(tmp_path / str(number), "BeitForMaskedImageModeling", image_size=[32, 48], layer_norm_eps=1e-6, **positions)
        with pytest.raises(ConfigError, match="not square" if not positions else "cannot compute it"):
            import_encoder.run(tmp_path / str(number), tmp_path / "none", [])
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="nothing says their size"):
        import_encoder.run(folder, tmp_path / "none", [])
    imported(folder, tmp_path / "given", "model.input_size=32x48")


@pytest.mark.parametrize("to", ["hf", "timm", "unilm"])
def test_features_without_a_head_go_round(tmp_path, to):
    """A fine-tuned body with its norm: a classifier of no classes."""
    hf(tmp_path / "hf", "BeitForImageClassification", num_labels=0, layer_norm_eps=1e-6, **OWN)
    first = load_classifier(imported(tmp_path / "hf", tmp_path / "first"))
    assert export.run(tmp_path / "first", tmp_path / "out", to) == 0
    source = tmp_path / "out" / UNILM_FILE if to == "unilm" else tmp_path / "out"
    again = load_classifier(imported(source, tmp_path / "again"))
    assert torch.equal(first.classifier(pixels()), again.classifier(pixels()))


def test_each_verb_speaks_of_its_own_thing(tmp_path):
    """An encoder is no tokenizer, and a tokenizer is no encoder: each names the verb that takes it."""
    _, weights = released(pretraining=True)
    pth(tmp_path / "encoder.pth", weights)
    with pytest.raises(ConfigError, match="is an encoder, no tokenizer: bring it in with `import "):
        import_tokenizer.run(tmp_path / "encoder.pth", tmp_path / "out", None)
    needed, rest = test_vqkd.published(test_vqkd.SMALL)
    tokenizer = test_vqkd.checkpoint(tmp_path, test_vqkd.drawn(needed | rest))
    with pytest.raises(ConfigError, match="is a tokenizer: bring it in with `import-tokenizer "):
        import_encoder.run(tokenizer, tmp_path / "out", [])
    torch.save({"model": weights, "more": nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    with pytest.raises(ConfigError, match="asks for the global") as caught:
        import_encoder.run(tmp_path / "pickled.pth", tmp_path / "out", [])
    assert "tokenizer" not in str(caught.value)


def test_without_the_library_it_is_said(tmp_path, monkeypatch, capfd):
    """An import needs no peer; what was not compared is told."""
    from beitforge.pipeline.weights import peers

    hf(tmp_path / "hf", "BeitForMaskedImageModeling", layer_norm_eps=1e-12)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    imported(tmp_path / "hf", tmp_path / "out")
    said = capfd.readouterr().err
    assert "not compared with its own library" in said and "No module named 'transformers'" in said
    assert "which changes" in said, "of the epsilon"


def test_weights_that_are_not_finite(tmp_path):
    _, weights = released(pretraining=True)
    weights["blocks.1.mlp.fc1.bias"][3] = float("nan")
    with pytest.raises(ConfigError, match=r"blocks\.1\.fc1\.bias contains numbers that are not finite"):
        import_encoder.run(pth(tmp_path / "a.pth", weights), tmp_path / "out", [])


BROKEN = {
    "operator": 'raise RuntimeError("operator torchvision::nms does not exist")',
    "attribute": "import sys; sys.no_such_attribute",
    "library": 'raise OSError("libcudart.so.13: cannot open shared object file")',
    "name": "no_such_name",
}
STAND_IN = "from beitforge.pipeline.torchvision_stub import install; install(); import torchvision.ops"
IN_AND_OUT = """
from beitforge.pipeline.cli import main
code = main(["import", "hf", "out"])
for to in ("hf", "timm"):
    code = code or main(["export", "out", "to-" + to, "--to", to])
sys.exit(code)
"""


@pytest.mark.parametrize("fault", BROKEN)
def test_a_torchvision_that_does_not_load(tmp_path, fault):
    """Installed, as transformers' look at the packages finds it, but built for another torch: no traceback."""
    (tmp_path / "site" / "torchvision").mkdir(parents=True)
    (tmp_path / "site" / "torchvision" / "__init__.py").write_text(BROKEN[fault])
    (tmp_path / "site" / "torchvision-0.29.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.29.0\n"
    (tmp_path / "site" / "torchvision-0.29.0.dist-info" / "METADATA").write_text(metadata)
    if fault == "operator":
        hf(tmp_path / "hf", "BeitForMaskedImageModeling", layer_norm_eps=1e-6)
    code = f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), str(ROOT / 'src')]!r}\n"
    code += IN_AND_OUT if fault == "operator" else STAND_IN
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert fault != "operator" or "compared with transformers" in done.stderr
