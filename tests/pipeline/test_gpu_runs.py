"""Whole verbs on the simulated GPU (tests/simulated_gpu.py), DeepSpeed's part included: what the CPU gives, and no
tensor left behind there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from benchmarks.training.zero_parity import plain_losses
from tests.conftest import ROOT, TinySet
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
]
STEPS = 3
SHORT = [f"train.duration={STEPS} steps", "optimizer.warmup=1 steps", "log.every_steps=1"]
UNJUDGED = ["data.heldout_images=", "data.heldout_tokens=", "log.evaluation_share=0"]
PLAIN = ["model.kernels=sdpa"]  # the fused kernels, interpreted, are slow: one case has them


def on_gpu(*words: object, processes: int = 1) -> str:
    done = run_ranks("tests.pipeline.gpu_runs", *words, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr  # DeepSpeed's, of what cannot be compiled, from every rank
    return done.stdout


def interpreted(*words: object) -> str:
    """The same where kernels run: Triton must learn of its interpreter before it is imported."""
    command = [sys.executable, "-m", "tests.pipeline.gpu_runs", *map(str, words)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain(tiny: TinySet) -> list[float]:
    return plain_losses(load_config(str(tiny.config), [*SHORT, *UNJUDGED, "model.kernels=reference"]), STEPS)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run, "train")]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ([], 1e-5),
        (["train.zero_stage=0", "train.micro_batch=8"], 1e-5),
        (["train.zero_stage=1", "train.offload_optimizer=true", "train.activation_checkpointing=true"], 1e-5),
        (["train.zero_stage=3", "train.precision=bf16", "checkpoint.asynchronous=true"], 2e-2),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else "",
)
def test_losses_are_those_of_plain_pytorch(tiny, plain, tmp_path, settings, tolerance):
    on_gpu("pretrain", "--rank", tiny.config, f"train.run={tmp_path}", *SHORT, *UNJUDGED, *PLAIN, *settings)
    assert losses(tmp_path) == pytest.approx(plain, rel=tolerance)
    assert newest(tmp_path, print)[1].step == STEPS


def test_two_gpus(tiny, plain, tmp_path):
    settings = [*SHORT, *UNJUDGED, *PLAIN, "train.zero_stage=2"]
    on_gpu("pretrain", "--rank", tiny.config, f"train.run={tmp_path}", *settings, processes=2)
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-5)


def test_auto_is_fused(tiny, plain, tmp_path):
    """Every kernel, launched from a training."""
    words = ["pretrain", "--rank", tiny.config, f"train.run={tmp_path}", *SHORT, *UNJUDGED]
    assert "attention: fused" in interpreted(*words)
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-5)


def test_fp16_saves_before_its_first_update(tiny, tmp_path):
    """No CPU runs fp16: while the loss scale is searched for no step is made, and the optimizer has no moments yet. The
    search goes on where it stood, also under other stages."""
    settings = [*UNJUDGED, *PLAIN, "train.precision=fp16", "optimizer.warmup=1 steps", "log.every_steps=1"]
    settings += ["checkpoint.every=1 steps", f"train.run={tmp_path}"]
    settings += ["deepspeed.fp16={initial_scale_power: 24, hysteresis: 1}", "train.duration=4 steps"]
    for first, stage, exponent in ((0, 2, 20), (3, 2, 20), (3, 3, 20), (3, 0, 21)):  # ZeRO-0's sums overflow later
        on_gpu("pretrain", "--rank", tiny.config, *settings, f"train.zero_stage={stage}")
        folder, state = newest(tmp_path, print)
        assert state.step == 4
        assert read_metrics(tmp_path, "start")[-1]["step"] == first
        saved = zero_layout.open_checkpoint(folder, state.zero_stage, state.groups)  # as any other world would
        assert saved.scale["cur_scale"] == 2**exponent and saved.counters["skipped_steps"] == 24 - exponent
        for name, pieces in saved.pieces.items() if stage else ():
            assert saved.step == 0 and all(not piece.values["exp_avg"].any() for piece in pieces), name
        shutil.rmtree(folder)


def test_evaluations_and_online_tokens(tiny, tmp_path):
    """The same numbers as on the CPU of everything that is measured; ZeRO-3, whose weights are gathered."""
    sets = tiny.folder / "shards"
    settings = [*SHORT, *PLAIN, "data.tokens=online", "data.heldout_tokens=online", "log.evaluation_share=1"]
    settings += [f"data.labelled_images={sets}/train", f"data.labelled_test={sets}/test", "train.zero_stage=3"]
    on_gpu("pretrain", "--rank", tiny.config, f"train.run={tmp_path}/gpu", *settings)
    words = ("beitforge", "pretrain", "--rank", tiny.config, f"train.run={tmp_path}/cpu", *settings)
    assert run_ranks(*words).returncode == 0
    for kind in ("train", "heldout", "seen_view", "new_view", "survey"):
        there, here = (read_metrics(tmp_path / run, kind)[-1] for run in ("gpu", "cpu"))
        assert there.keys() - here.keys() == ({"mfu"} if kind == "train" else set())
        for name in here.keys() - {"kind", "time", "seconds", "share", "memory_bytes", "images_per_second"}:
            if "forward" not in name and "wait" not in name:
                assert there[name] == pytest.approx(here[name], rel=1e-4), name


def test_tokenizer_tokenize_probe_and_export(tiny, tmp_path):
    """A dVAE is trained, makes tokens, an encoder is trained on them, probed and exported: as on the CPU."""
    made = []
    for device, module in (("gpu", "tests.pipeline.gpu_runs"), ("cpu", "beitforge")):
        folder = tmp_path / device
        settings = [str(tiny.config), f"data.tokenizer={folder}/tokenizer", f"data.tokens={folder}/tokens", *UNJUDGED]
        settings += [
            *SHORT,
            *PLAIN,
            "tokenizer.duration=2 steps",
            "tokenizer.warmup=1 steps",
            f"train.run={folder}/run",
        ]
        settings += ["tokenizer.global_batch=8", "tokenizer.micro_batch=4"]
        for verb in ("tokenizer", "tokenize", "pretrain"):
            done = run_ranks(module, verb, "--rank", *settings)
            assert done.returncode == 0, done.stderr
        probing = ["probe", folder / "run", tiny.folder / "shards/train", "--epochs", "2", "--samples", "16"]
        if device == "gpu":
            interpreted(*probing)
        else:
            assert run_ranks(module, *probing).returncode == 0
        assert run_ranks(module, "export", folder / "run", folder / "export").returncode == 0
        weights = load_file(folder / "export/model.safetensors")
        results = json.loads((folder / "run/probe.json").read_text())["results"]
        made.append((losses(folder / "tokenizer/training") + losses(folder / "run"), weights, results.keys()))
    (there, weights, probed), (here, plain_weights, plainly_probed) = made
    assert there == pytest.approx(here, rel=1e-4)
    assert probed == plainly_probed
    torch.testing.assert_close(weights, plain_weights, rtol=1e-3, atol=1e-4)


def test_finetune(tiny, tmp_path):
    settings = [f"data.labelled_images={tiny.folder}/shards/train", f"data.labelled_test={tiny.folder}/shards/test"]
    settings += ["finetune.duration=2 steps", "finetune.warmup=1 steps", "finetune.global_batch=8", *PLAIN]
    settings += ["finetune.micro_batch=4", "finetune.input_size=32", "log.every_steps=1"]
    settings += ["finetune.randaugment="]  # which is timm's
    settings += ["finetune.dropout=0.1", "finetune.ema_decay=0.5"]
    settings += ["finetune.weight_decay_end=0.5", "finetune.pooling=cls"]
    found = []
    for device, module in (("gpu", "tests.pipeline.gpu_runs"), ("cpu", "beitforge")):
        done = run_ranks(module, "finetune", "--rank", tiny.config, *settings, f"finetune.run={tmp_path}/{device}")
        assert done.returncode == 0, done.stderr
        test = read_metrics(tmp_path / device, "test")[-1]
        average = read_metrics(tmp_path / device, "test_ema")[-1]["loss"]
        found.append([*losses(tmp_path / device), test["loss"], test["accuracy"], test["samples"], average])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
