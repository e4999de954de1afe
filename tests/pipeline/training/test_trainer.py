"""Training through the front door: same weights after a kill, same losses under every ZeRO stage, clear refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.cluster.signals import EXIT_STOPPED
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.shards.storage.reading import file_digest
from benchmarks.training.zero_parity import plain_losses as plain_losses_of
from tests.conftest import ROOT
from tests.ranks import run_ranks

STEPS = 24


def launch(tiny, run: Path, *overrides: str, processes: int = 2, verb: str = "pretrain") -> subprocess.Popen:
    """`./launch.sh pretrain` (or finetune) on the tiny set, in a session of its own so that it can be killed whole."""
    section = "finetune" if verb == "finetune" else "train"
    command = [str(ROOT / "launch.sh"), verb, str(tiny.config), f"{section}.run={run}", *overrides]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable, "NPROC": str(processes)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen, code: int = 0, seconds: float = 180) -> str:
    """Its output, once it has ended with `code`."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        kill(process)
    assert process.returncode == code, output
    return output


def kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def trained(tiny, run: Path, *overrides: str, processes: int = 2, verb: str = "pretrain", code: int = 0) -> str:
    """What the ranks of a training print until they end with `code`; without a launcher, which takes seconds."""
    section = "finetune" if verb == "finetune" else "train"
    words = ("beitforge", verb, "--rank", tiny.config, f"{section}.run={run}", *overrides)
    done = run_ranks(*words, processes=processes)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = newest(run, lambda _: None)
    assert found is not None
    return dict(zero_layout.open_checkpoint(found[0], found[1].zero_stage, found[1].groups).weights())


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Iterator[Path]:
    """A run left alone: 2 processes, ZeRO-2."""
    run = tmp_path_factory.mktemp("whole") / "run"
    output = finished(launch(tiny, run, "log.every_steps=1"))
    assert "from step 0" in output
    yield run


def test_writes_what_the_design_says(whole):
    """Run folder: config, environment, metrics of every logged step, complete checkpoints, the newest two kept."""
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        assert (whole / name).exists()
    assert [line["step"] for line in read_metrics(whole, "train")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in read_metrics(whole, "heldout")] == [12, 24]
    assert {path.name for path in (whole / "checkpoints").glob("step-*")} == {"step-20", "step-24"}
    state = json.loads((whole / "checkpoints" / "step-24" / "state.json").read_text())
    assert state["samples_seen"] == STEPS * 8
    for name, saved in state["files"].items():
        path = whole / "checkpoints" / "step-24" / name
        assert path.stat().st_size == saved["bytes"] > 0 and file_digest(path) == saved["xxh3"]


def test_interrupt_saves_and_goes_on(tiny, whole, tmp_path):
    """Ctrl-C in a terminal reaches every process of the group: they save, end with 75 or the launcher's 1, go on."""
    run = tmp_path / "run"
    process = launch(tiny, run, "log.every_steps=1", "checkpoint.every=1000 steps")
    while process.poll() is None and not read_metrics(run, "train"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (1, EXIT_STOPPED), output
    assert "Traceback" not in output
    found = newest(run, lambda _: None)
    assert found is not None, output
    assert 1 <= found[1].step < STEPS, output
    output = trained(tiny, run)
    assert f"from step {found[1].step}" in output
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def test_an_unexpected_error_is_told(tiny, tmp_path):
    """Also once there is a process group: from then on torch has a buffer for stderr while the last hook runs."""
    code = """if True:
        import runpy, beitforge.pipeline.training.objectives as objectives
        def fails(*_):
            raise RuntimeError("out of memory, say")
        objectives.masked_token_loss = fails
        runpy.run_module("beitforge", run_name="__main__")"""
    command = [sys.executable, "-c", code, "pretrain", "--rank", str(tiny.config), f"train.run={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: out of memory, say" in done.stderr


@pytest.fixture(scope="module")
def plain_losses(tiny) -> list[float]:
    """The same training without DeepSpeed."""
    return plain_losses_of(load_config(str(tiny.config), []), 20)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_agree_with_plain_torch(tiny, whole, plain_losses, tmp_path, stage):
    """20 steps in fp32. Sums are taken in another order (2 ranks × 1 micro batch against one batch of 8), so the last
    bits differ: 2e-6 of a loss of 4 is 4 units in its last place."""
    run = whole
    if stage != 2:
        run = tmp_path / "run"
        trained(tiny, run, "log.every_steps=1", f"train.zero_stage={stage}")
    losses = [line["loss"] for line in read_metrics(run, "train")][:20]
    assert losses == pytest.approx(plain_losses, rel=2e-6)
    assert max(losses) - min(losses) > 0.05, "nothing was learned, so nothing was compared"


def alone(tiny, run: Path, *overrides: str) -> subprocess.CompletedProcess:
    """`beitforge pretrain --rank` without a launcher: one process."""
    return run_ranks("beitforge", "pretrain", "--rank", tiny.config, f"train.run={run}", *overrides)


def one_line(result: subprocess.CompletedProcess) -> str:
    """The single `error:` line of a refusal."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_torn_checkpoint_falls_back(tiny, whole, tmp_path):
    """A checkpoint torn in half is passed over, said so, and the one before gives the same end."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    torn = max((run / "checkpoints" / "step-24").rglob("*optim_states.pt"))
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    output = trained(tiny, run)
    assert "checkpoint step-24 is not used" in output
    assert "from step 20" in output
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


def test_another_config_is_refused(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    line = one_line(alone(tiny, run, "optimizer.lr=0.5"))
    assert "optimizer.lr=0.001" in line
    assert "0.5" in line


def test_a_run_that_cannot_be_helped_says_what_is_wrong(tiny, tmp_path):
    """Learning rate 1e12: the first update ruins the weights; nothing before it is left to go back to."""
    run = tmp_path / "run"
    settings = ["optimizer.lr=1e12", "optimizer.warmup=0 steps", "checkpoint.every=1 steps", "faults.max_skipped=2"]
    line = one_line(alone(tiny, run, *settings))
    assert "the loss of rank 0 on" in line and "is not finite at step 1, the first of 2 in a row (samples 8–23)" in line
    assert "there is no checkpoint before step 1 to go back to" in line
    found = newest(run, lambda _: None)
    assert found is not None and found[1].step >= 1


def test_a_full_disk_keeps_the_checkpoint_before(tiny, tmp_path):
    """A real file system too small for a third checkpoint: one line, and the newest complete one is still there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], check=False).returncode
    if mounted:
        pytest.skip("no right to mount a tmpfs")
    try:
        line = one_line(alone(tiny, disk / "run", "checkpoint.keep=50", "checkpoint.every=1 steps"))
        assert "MiB free, a checkpoint takes 0." in line
        found = newest(disk / "run", lambda _: None)
        assert found is not None
        assert found[1].step >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision=bf16", "train.zero_stage=1"],
        ["train.activation_checkpointing=true", "train.zero_stage=3"],  # true: full, as earlier versions wrote it
        ["train.activation_checkpointing=selective", "train.zero_stage=3"],
        ["train.offload_optimizer=true"],
        ["optimizer.kind=muon", "optimizer.clip_norm=0", "train.precision=bf16", "train.zero_stage=2"],
        ["deepspeed.zero_optimization.reduce_bucket_size=1000"],
        ["mask.exact=false", "model.positions=absolute", "model.layer_scale=false"],
        ["model.positions=relative", "model.kernels=reference"],
    ],
    ids=lambda settings: settings[0].partition("=")[0],
)
def test_every_way_to_train_runs_and_learns(tiny, tmp_path, settings):
    """What the config offers works: the loss falls, and held-out loss is measured."""
    run = tmp_path / "run"
    result = alone(tiny, run, *settings)
    assert result.returncode == 0, result.stderr
    losses = [line["loss"] for line in read_metrics(run, "train")]
    assert losses[-1] < losses[0] - 0.1
    assert read_metrics(run, "heldout")[-1]["samples"] == 8


def test_compiled_training_gives_the_same_losses(tiny, whole, tmp_path):
    """torch.compile changes speed, not losses; evaluations between steps see through it."""
    if shutil.which("g++") is None and not torch.cuda.is_available():
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    run = tmp_path / "run"
    often = ["log.heldout_every=2 steps", "log.evaluation_share=1", f"data.labelled_images={tiny.folder}/shards/train"]
    result = alone(tiny, run, "train.compile=true", "train.duration=6 steps", "log.every_steps=1", *often)
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(run, "train")) == 6
    surveys = read_metrics(run, "survey")
    assert [line["step"] for line in surveys if line["attention_distance_2"] > 0 and "knn" in line] == [2, 4, 6]
    # another length has another learning rate after the warm-up of 4 steps
    compiled, eager = ([line["loss"] for line in read_metrics(where, "train")][:5] for where in (run, whole))
    assert compiled == pytest.approx(eager, rel=2e-6)


def test_the_budget_of_bad_samples_stops_the_run(tiny, tmp_path):
    """A budget of zero and one damaged image: named in bad_samples.jsonl, then the end."""
    from tests.shards.stream.test_stream import copied, damage, moved

    folder = copied(tiny, tmp_path)
    key = damage(folder, shard=0, row=2)
    run = tmp_path / "run"
    nothing_apart = ("data.heldout_images=", "data.heldout_tokens=")
    line = one_line(alone(tiny, run, *moved(folder), "data.bad_sample_budget=0", *nothing_apart))
    assert "bad_sample_budget" in line
    named = [json.loads(text)["key"] for text in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert named == [key]


def test_export_is_read_without_this_project(whole, tmp_path):
    """safetensors and JSON alone give every weight; loaded here they are the run's."""
    from safetensors.torch import load_file

    from beitforge.pipeline.stages import export
    from beitforge.pipeline.weights.encoder import load_encoder

    assert export.run(whole, tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["step"] == STEPS
    assert content["config"]["model"]["layers"] == 2
    ours = weights(whole)
    assert exported.keys() == ours.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in ours.items())
    beit, _ = load_encoder(tmp_path / "out")
    assert all(torch.equal(parameter, exported[name]) for name, parameter in beit.named_parameters())
