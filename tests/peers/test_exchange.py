"""Weights out of a run and back in, through every format and the libraries that own them."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.stages import export, import_encoder, probe, report
from beitforge.pipeline.weights import conversion, export_formats
from beitforge.pipeline.weights.conversion import to_unilm
from beitforge.pipeline.weights.encoder import load_encoder, save_encoder
from beitforge.shards.errors import ShardError
from tests.conftest import ROOT
from tests.ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

MODES = ("absolute", "relative_shared", "relative")


@pytest.fixture(params=MODES)
def encoder(request, tiny, tmp_path) -> Path:
    """An encoder folder with nothing left at its initial value."""
    return made(tiny, tmp_path / "encoder", f"model.positions={request.param}")


def made(tiny, folder: Path, *settings: str) -> Path:
    config = load_config(str(tiny.config), list(settings))
    beit = Beit(config.model, config.tokenizer.vocabulary, seed=5)
    generator = torch.Generator().manual_seed(6)
    weights = {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in beit.state_dict().items()}
    state = State(step=7, samples_seen=56, world=1, zero_stage=0, precision="fp32", images="", tokens="t", config="")
    save_encoder(folder, weights, config, state)
    return folder


@pytest.mark.parametrize("to", export.FORMATS)
def test_out_and_in_again(encoder, tmp_path, capfd, to):
    """Every export says how it compares; imported again it is the same encoder."""
    out, back = tmp_path / "out", tmp_path / "back"
    assert export.run(encoder, out, to, finetune=False, size=None) == 0
    compared = "it is the checkpoint's weights bit for bit" if to == "safetensors" else "its logits differ by at most"
    assert f"loaded back, {compared}" in capfd.readouterr().err
    source = out / export_formats.UNILM_FILE if to == "unilm" else out
    assert import_encoder.run(source, back, []) == 0
    ours, config = load_encoder(encoder)
    again, config_again = load_encoder(back)
    lost = {"mask_embedding"} if to == "timm" else set()  # timm has none
    for name, tensor in ours.state_dict().items():
        assert name in lost or torch.equal(tensor, again.state_dict()[name]), name
    assert config_again.model == config.model, "nothing is assumed"
    assert json.loads((back / "config.json").read_text()).get("imported_from") == str(source)


def test_an_export_that_computes_something_else_is_refused(encoder, tmp_path, monkeypatch):
    """The command believes the peer, not itself: nothing appears, and what was there stays."""
    out = tmp_path / "out"
    assert export.run(encoder, out, "hf", finetune=False, size=None) == 0
    before = (out / "model.safetensors").read_bytes()
    written = conversion.to_hf

    def wrong(weights, model):
        renamed = written(weights, model)
        renamed["beit.encoder.layer.1.lambda_2"] = renamed["beit.encoder.layer.1.lambda_2"] * 1.001
        return renamed

    monkeypatch.setattr(export_formats, "to_hf", wrong)
    with pytest.raises(ConfigError, match="not exported"):
        export.run(encoder, out, "hf", finetune=False, size=None)
    assert (out / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("size", [None, Size(48, 48)], ids=["same", "larger"])
@pytest.mark.parametrize("to", ["hf", "timm"])
def test_fine_tuning_export(encoder, tmp_path, to, size):
    assert export.run(encoder, tmp_path / "out", to, finetune=True, size=size) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("mask_token" in name or "lm_head" in name for name in weights)


@pytest.mark.parametrize("to", ["timm", "unilm"])
def test_the_command_itself_finds_timm(tiny, tmp_path, to):
    """In a process of its own, without what this suite puts in place; and a run that asked for fused kernels."""
    folder = made(tiny, tmp_path / "encoder", "model.kernels=fused")
    command = [sys.executable, "-m", "beitforge", "export", str(folder), str(tmp_path / "out"), "--to", to]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"as {to}; loaded back" in done.stderr


def test_an_export_never_replaces_its_source(encoder):
    with pytest.raises(ConfigError, match="is what is exported"):
        export.run(encoder, encoder, "timm", finetune=False, size=None)
    load_encoder(encoder)


def test_an_export_never_replaces_strangers(encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ShardError, match=r"thesis\.tex"):
        export.run(encoder, tmp_path / "out", "timm", finetune=False, size=None)


def test_a_training_checkpoint_of_the_released_code(tiny, tmp_path):
    """Optimizer, epoch and an argparse.Namespace beside the weights; index buffers among them."""
    folder = made(tiny, tmp_path / "encoder")
    beit, config = load_encoder(folder)
    weights = to_unilm(beit.state_dict(), config.model)
    weights["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    path = tmp_path / "checkpoint-799.pth"
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": np.float64(1.5e-3), "params": [0]}]}
    arguments = argparse.Namespace(lr=1.5e-3, output_dir="x", imagenet_default_mean_and_std=False)
    torch.save({"model": weights, "optimizer": optimizer, "epoch": 799, "args": arguments, "scaler": {}}, path)
    assert import_encoder.run(path, tmp_path / "back", []) == 0
    again, config_again = load_encoder(tmp_path / "back")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in beit.state_dict().items())
    assert config_again.model.heads == 2, "from the width of the table"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Resolving cdn... connected. HTTP request sent, awaiting response... 200 OK", "no file of torch.save"),
        (b"", "no file of torch.save"),
        (b"PK\x05\x06" + bytes(18), "no file of torch.save"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, content, words):
    path = tmp_path / "beit.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        import_encoder.run(path, tmp_path / "out", [])
    assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_runs_nothing(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"model": Evil()}, tmp_path / "beit.pth")
    with pytest.raises(ConfigError, match="nothing of it was run"):
        import_encoder.run(tmp_path / "beit.pth", tmp_path / "out", [])
    assert not marker.exists()


def test_weights_of_something_else(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ConfigError, match="no weights of a BEiT"):
        import_encoder.run(tmp_path / "resnet.safetensors", tmp_path / "out", [])
    save_file({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "swin.safetensors")
    with pytest.raises(ConfigError, match="no blocks or no positions"):
        import_encoder.run(tmp_path / "swin.safetensors", tmp_path / "out", [])
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShardError, match="is a file"):
        import_encoder.run(tmp_path / "swin.safetensors", tmp_path / "file", [])


def test_an_imported_encoder_is_pretrained_further_probed_and_reported(tiny, tmp_path):
    """transformers' folder in; then like our own. Its first loss is the loss of its weights, not of fresh ones."""
    folder = made(tiny, tmp_path / "encoder")
    export.run(folder, tmp_path / "hf", "hf", finetune=False, size=None)
    data = yaml.safe_load(tiny.config.read_text())["data"]
    settings = [f"data.{name}={path}" for name, path in data.items()]
    settings += ["view.num_views=3", "mask.num_patches=6", "mask.min_block=2", "loader.workers=0"]
    assert import_encoder.run(tmp_path / "hf", tmp_path / "encoder2", settings) == 0
    assert (
        probe.run(tmp_path / "encoder2", str(tiny.folder / "shards" / "train"), None, probe.ProbeOptions(samples=50))
        == 0
    )
    assert report.run([tmp_path / "encoder2"], data=True) == 0
    page = (tmp_path / "encoder2" / "report.html").read_text()
    assert page.count(">masked<") == page.count(">predicted<") == 8
    run = tmp_path / "run"
    more = [f"train.run={run}", "train.duration=3 steps", "log.every_steps=1", "model.drop_path=0"]
    losses = []
    for init in ("", str(tmp_path / "encoder2")):
        config = load_config(str(tiny.config), [*more, f"train.init={init}", f"train.run={run}{bool(init)}"])
        losses.append(in_a_process(config, tmp_path))
    assert losses[0] != losses[1]
    beit, _ = load_encoder(folder)
    assert losses[1] == pytest.approx(first_loss(config, beit), rel=1e-5)


def first_loss(config, beit: Beit) -> float:
    from beitforge.pipeline.data.batches import training_batches
    from beitforge.pipeline.data.pretraining import pretraining
    from beitforge.pipeline.training.objectives import masked_token_loss

    size = config.train.global_batch
    batches = training_batches(
        config, pretraining(config), first_sample=0, global_batch=size, micro=size, rank=0, world=1, steps=1
    )
    return masked_token_loss(config, beit, next(batches), torch.float32)[0].item()


def in_a_process(config, folder: Path) -> float:
    """The first loss of `beitforge pretrain --rank`, which wants a process of its own."""
    from beitforge.pipeline.config.loading import to_yaml
    from beitforge.pipeline.runs.jsonl import read_metrics

    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    done = run_ranks("beitforge", "pretrain", "--rank", path)
    assert done.returncode == 0, done.stderr
    return read_metrics(Path(config.train.run), "train")[0]["loss"]


def test_a_run_goes_on_without_what_it_began_with(tiny, tmp_path):
    """The encoder of train.init may be gone once there is a checkpoint."""
    folder = made(tiny, tmp_path / "encoder")
    words = [f"train.init={folder}", f"train.run={tmp_path / 'run'}", "train.duration=8 steps"]
    for first in (True, False):
        done = run_ranks("beitforge", "pretrain", "--rank", tiny.config, *words)
        assert done.returncode == 0, done.stderr
        assert ("starting from" in done.stderr) == first
        shutil.rmtree(folder, ignore_errors=True)


def test_other_normalisation_does_not_start_a_run(tiny, tmp_path):
    """Weights made for other inputs: refused, not trained on wrong ones."""
    from beitforge.pipeline.weights.encoder import initialise_from

    folder = made(tiny, tmp_path / "encoder", "model.mean=[0.4, 0.4, 0.4]")
    with pytest.raises(ConfigError, match=r"has model\.mean"):
        initialise_from(folder, Beit(load_config(str(tiny.config), []).model, 64, seed=0), 64)


def test_another_shape_does_not_start_a_run(tiny, tmp_path):
    folder = made(tiny, tmp_path / "encoder", "model.layers=3")
    from beitforge.pipeline.weights.encoder import initialise_from

    config = load_config(str(tiny.config), [])
    with pytest.raises(ConfigError, match=r"model\.layers 3, this config says 2"):
        initialise_from(folder, Beit(config.model, 64, seed=0), 64)


def test_another_grid_and_vocabulary_start_a_run(tiny, tmp_path):
    """Tables are fitted to the larger grid; a head over other tokens is drawn anew, and said so."""
    folder = made(tiny, tmp_path / "encoder")
    from beitforge.pipeline.weights.encoder import initialise_from

    config = load_config(
        str(tiny.config), ["model.input_size=48", "tokenizer.input_size=48", "tokenizer.vocabulary=99"]
    )
    beit = Beit(config.model, 99, seed=0)
    head = beit.head.weight.clone()
    assert "new head over 99" in initialise_from(folder, beit, 99)
    theirs, _ = load_encoder(folder)
    assert torch.equal(beit.head.weight, head)
    assert torch.equal(beit.blocks[0].fc1.weight, theirs.blocks[0].fc1.weight)
    assert not torch.equal(beit.shared_bias.table[:-3], torch.zeros_like(beit.shared_bias.table[:-3]))
