"""`finetune` through the front door: learns, resumes to the bit, one test on any number of ranks, clear refusals."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.config.derived import refuse_world
from beitforge.pipeline.config.loading import load_config, to_dict
from beitforge.pipeline.data.batches import evaluation_batches, training_batches
from beitforge.pipeline.data.labelled import supervised, supervised_test
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.runs.checkpoints import State, newest
from beitforge.pipeline.runs.folder import claim
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.stages import export, finetune
from beitforge.pipeline.training.objectives import encoder_input, supervised_input
from beitforge.pipeline.weights.classifier import initialise_classifier_from, load_classifier
from beitforge.pipeline.weights.encoder import save_encoder
from tests.conftest import ROOT, TINY, installed
from tests.pipeline.training.test_trainer import finished
from tests.ranks import run_ranks

STEPS = 12
TUNE = {"duration": f"{STEPS} steps", "global_batch": 12, "micro_batch": 6, "warmup": "2 steps", "lr": 3e-3}
TUNE |= {"input_size": 32, "layer_decay": 0.8, "test_every": "6 steps", "head_scale": 1.0}
TUNE |= {"dropout": 0.05, "attention_dropout": 0.05, "ema_decay": 0.8, "weight_decay_end": 0.2}
NVME = "deepspeed.zero_optimization.offload_optimizer={device: nvme, nvme_path: /x}"
if not installed("timm"):
    TUNE["randaugment"] = ""  # all else is tested; the tests marked peers run again where timm is installed


def write_classes(folder: Path, count: int, seed: int) -> None:
    """Images whose colour tells their class, of three of unequal size: a half, a third, a sixth."""
    from beitforge.shards.decode.codec import encode

    generator = np.random.default_rng(seed)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    for number in range(count):
        label = (0, 1, 0, 1, 0, 2)[number % 6]
        height, width = generator.integers(36, 64, size=2)
        pixels = np.clip(colours[label] + generator.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
        path = folder / f"class{label}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, "jpg", 90))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A config with 60 labelled images to train on and 23 to test: 23 divides by no number of ranks."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, count, seed in (("train", 60, 0), ("test", 23, 1)):
        write_classes(folder / "images" / part, count, seed)
        where = [str(folder / "images" / part), str(folder / part)]
        command = [sys.executable, "-m", "beitforge", "pack", *where, "--samples-per-shard", "25", "--workers", "1"]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    data = {"labelled_images": str(folder / "train"), "labelled_test": str(folder / "test")}
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": data, "finetune": TUNE}))
    return path


def tuned(config: Path, run: Path, *settings: str, processes: int = 2) -> subprocess.Popen:
    """`./launch.sh finetune`, in a session of its own so that it can be killed whole."""
    command = [str(ROOT / "launch.sh"), "finetune", str(config), f"finetune.run={run}", *settings]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable, "NPROC": str(processes)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def trained(config: Path, run: Path, *settings: str, processes: int = 2) -> str:
    """What the ranks of a fine-tuning print; without a launcher, which takes seconds."""
    words = ("beitforge", "finetune", "--rank", config, f"finetune.run={run}", *settings)
    done = run_ranks(*words, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def alone(config: Path, run: Path, *settings: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    """`beitforge finetune --rank` in one process; with variables of its own in a new interpreter."""
    words = ["beitforge", "finetune", "--rank", str(config), f"finetune.run={run}", *settings]
    if environment is None:
        return run_ranks(*words)
    command = [sys.executable, "-m", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def whole(labelled, tmp_path_factory) -> Path:
    """A run left alone: 2 processes, ZeRO-2, everything that is drawn switched on."""
    run = tmp_path_factory.mktemp("whole") / "run"
    output = finished(tuned(labelled, run, "log.every_steps=1"))
    assert "the encoder starts as drawn from data.seed" in output
    return run


def kill_all(word: str) -> None:
    """SIGKILL for every process with this word on its command line: ranks outlive their launcher by some steps."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word in (folder / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.peers
def test_a_run_learns_and_says_what_it_is(whole):
    """Trained on coloured noise of three classes: better than the majority's 12 of 23, on every sample once."""
    lines = read_metrics(whole, "test")
    assert [line["step"] for line in lines] == [6, STEPS]
    assert all(line["samples"] == 23 for line in lines)
    assert lines[-1]["accuracy"] > 0.8 > 12 / 23
    losses = [line["loss"] for line in read_metrics(whole, "train")]
    assert len(losses) == STEPS and min(losses[-4:]) < losses[0]
    assert json.loads((whole / "environment.json").read_text())["job"] == "finetune"
    assert json.loads((whole / "classes.json").read_text()) == ["class0", "class1", "class2"]


def test_it_says_what_it_reads_and_how_it_does(whole, labelled):
    """And that a finished run is finished, without one more line about it; another start is another run's."""
    lines = (whole / "metrics.jsonl").read_text()
    again = trained(labelled, whole, "log.every_steps=1")
    assert f"{whole} is finished: step {STEPS} of {STEPS}" in again
    assert (whole / "metrics.jsonl").read_text() == lines
    assert "60 images of 3 classes to train on, 23 to test" in again
    done = alone(labelled, whole, "finetune.init=elsewhere")
    assert (
        done.returncode == 2
        and "holds a run with finetune.init=, this config says finetune.init=elsewhere" in done.stderr
    )


@pytest.mark.peers
def test_killed_and_resumed_is_uninterrupted(labelled, whole, tmp_path):
    """Ended as a kill between two checkpoints would leave it, and by kill -9 while it runs; weights to the bit."""
    run = tmp_path / "run"
    process = tuned(labelled, run, "log.every_steps=1", "checkpoint.every=1 steps")
    while process.poll() is None and len(read_metrics(run, "train")) < 3:
        time.sleep(0.01)
    kill_all(f"finetune.run={run}")
    process.communicate()
    saved = sorted(int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/state.json"))
    assert saved and saved[-1] < STEPS
    output = trained(labelled, run, "log.every_steps=1")
    assert f"from step {saved[-1]}" in output
    assert f"of the test images right after step {STEPS}" in output
    for value in ("fp32", "average"):
        ours, theirs = kept(run, value), kept(whole, value)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for kind in ("test", "test_ema"):
        assert read_metrics(run, kind)[-1]["loss"] == read_metrics(whole, kind)[-1]["loss"]


def kept(run: Path, value: str) -> dict[str, torch.Tensor]:
    """The weights in a run's newest checkpoint, or their moving average."""
    folder, state = newest(run, lambda _: None)
    return dict(zero_layout.open_checkpoint(folder, state.zero_stage, state.groups).weights(value))


def test_the_average_is_tested_saved_and_exported(whole, labelled, tmp_path):
    """By others than the weights, which testing it does not change; exported, it gives what the run's test said."""
    lines, plain = read_metrics(whole, "test_ema"), read_metrics(whole, "test")
    assert [line["step"] for line in lines] == [6, STEPS] and all(line["samples"] == 23 for line in lines)
    assert lines[-1]["loss"] != plain[-1]["loss"]
    assert export.run(whole, tmp_path / "average", average=True) == 0
    assert export.run(whole, tmp_path / "plain") == 0
    config = load_config(str(labelled), [])
    for folder, value, line in (("average", "average", lines[-1]), ("plain", "fp32", plain[-1])):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in kept(whole, value).items())
        loaded = load_classifier(tmp_path / folder)
        classifier = loaded.classifier
        assert loaded.names == ("class0", "class1", "class2")
        source, losses = supervised_test(config), []
        for batch in evaluation_batches(config, source, samples=23, micro=23, rank=0, world=1):
            with torch.no_grad():
                losses = F.cross_entropy(classifier(encoder_input(config, batch)), batch.labels, reduction="none")
        assert float(losses.mean()) == pytest.approx(line["loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="is no run with a checkpoint"):
        export.run(tmp_path / "plain", tmp_path / "other", average=True)


def test_an_average_that_is_not_kept_is_not_exported(labelled, tmp_path):
    trained(labelled, tmp_path / "run", "finetune.duration=1 steps", "finetune.ema_decay=0", processes=1)
    assert not read_metrics(tmp_path / "run", "test_ema")
    with pytest.raises(ConfigError, match=r"keeps no moving average.*finetune\.ema_decay was 0"):
        export.run(tmp_path / "run", tmp_path / "out", average=True)


def test_any_number_of_ranks_trains_and_tests_the_same(labelled, tmp_path):
    """Mixtures, losses and weights; 23 test samples divide by none of 2, 3 and the micro batch."""
    settings = ("finetune.duration=3 steps", "finetune.micro_batch=4", "finetune.head_scale=20", "log.every_steps=1")
    tests, losses, averages = [], [], []
    for world in (1, 2, 3):
        run = tmp_path / f"run{world}"
        trained(labelled, run, *settings, f"train.zero_stage={world}", processes=world)
        tests.append(read_metrics(run, "test")[-1])
        losses.append([line["loss"] for line in read_metrics(run, "train")])
        averages.append(kept(run, "average"))
    for line in tests:
        assert line["samples"] == 23 and line["loss"] == pytest.approx(tests[0]["loss"], rel=1e-5)
        assert (line["accuracy"], line["top5"]) == (tests[0]["accuracy"], tests[0]["top5"])
    assert tests[0]["loss"] != pytest.approx(np.log(3), rel=1e-3)
    for average in averages[1:]:
        assert all(torch.allclose(average[name], tensor, atol=1e-5) for name, tensor in averages[0].items())
    assert len(losses[0]) == 3 and losses[1:] == [pytest.approx(losses[0], rel=1e-5)] * 2


def test_goes_on_with_other_ranks_under_another_stage(whole, labelled, tmp_path):
    """From step 8 of a run of two processes under ZeRO-2 to the end with three under ZeRO-3."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / f"step-{STEPS}" / "state.json").unlink()
    output = trained(labelled, run, "train.zero_stage=3", "finetune.micro_batch=4", processes=3)
    assert "laying it out for 3 under ZeRO-3" in output and "from step 8" in output
    assert read_metrics(run, "test")[-1]["accuracy"] > 0.8
    ours, theirs = kept(run, "average"), kept(whole, "average")
    assert all(torch.allclose(ours[name], tensor, atol=1e-5) for name, tensor in theirs.items())


@pytest.mark.peers
def test_workers_and_ranks_change_no_pixel(labelled):
    """RandAugment, rectangles, noise and mixture of a sample are the same wherever it is made."""
    found = []
    for world, workers in ((1, 0), (2, 2), (3, 1)):
        config = load_config(str(labelled), [f"loader.workers={workers}"])
        pixels: dict[int, torch.Tensor] = {}
        for rank in range(world):
            batches = training_batches(
                config, supervised(config), first_sample=54, global_batch=12, micro=2, rank=rank, world=world, steps=2
            )
            for batch in batches:
                pixels |= dict(zip(batch.samples.tolist(), supervised_input(config, batch), strict=True))
        found.append(pixels)
    assert found[0].keys() == set(range(54, 78))
    for pixels in found[1:]:
        assert pixels.keys() == found[0].keys()
        assert all(torch.equal(pixels[sample], tensor) for sample, tensor in found[0].items())


def test_a_run_of_an_earlier_version_is_the_same_run(labelled, tmp_path):
    """Its config knows none of the settings that came later, and has the test's crop as a number."""
    added = ("drop_last", "weight_decay_end", "dropout", "attention_dropout", "pooling", "init_truncation", "ema_decay")
    settings = ["finetune.dropout=0", "finetune.attention_dropout=0", "finetune.ema_decay=0"]
    config = load_config(str(labelled), [*settings, "finetune.weight_decay_end=same"])
    tree = to_dict(config)
    tree["finetune"] = {n: v for n, v in tree["finetune"].items() if n not in added} | {"test_crop": 0.875}
    for section, names in (("train", ["drop_last"]), ("optimizer", ["weight_decay_end"]), ("mask", ["max_block"])):
        tree[section] = {n: v for n, v in tree[section].items() if n not in names}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    claim(tmp_path, config, finetune.IDENTITY, 2, "finetune", "a CPU")
    for other in ("ema_decay=0.9", "dropout=0.1", "pooling=cls", "drop_last=true", "weight_decay_end=0", "test_crop=1"):
        changed = load_config(str(labelled), [*settings, "finetune.weight_decay_end=same", f"finetune.{other}"])
        with pytest.raises(ConfigError, match=f"holds a run with finetune.{other.partition('=')[0]}="):
            claim(tmp_path, changed, finetune.IDENTITY, 2, "finetune", "a CPU")


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_an_epoch_may_leave_out_its_last_incomplete_batch(labelled, tmp_path, share):
    """Of all labels and of half of them; any ranks train the same."""
    settings = [
        "finetune.drop_last=true",
        "finetune.global_batch=16",
        "finetune.duration=2 epochs",
        "log.every_steps=1",
    ]
    settings += [f"finetune.label_share={share}", "finetune.micro_batch=4"]
    images, losses = (60, []) if share == 1.0 else (30, [])
    for world in (1, 2):
        run = tmp_path / f"run{world}"
        trained(labelled, run, *settings, processes=world)
        start = read_metrics(run, "start")[-1]
        assert (start["epoch_samples"], start["steps"]) == (images // 16 * 16, 2 * (images // 16))
        losses.append([line["loss"] for line in read_metrics(run, "train")])
    assert len(losses[0]) == 2 * (images // 16) and losses[1] == pytest.approx(losses[0], rel=1e-5)
    few = alone(labelled, tmp_path / "few", "finetune.drop_last=true", "finetune.global_batch=64")
    assert "holds 60 samples, fewer than the 64 of one global batch" in refused(few)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["finetune.attention_dropout=0.1", "model.kernels=fused"], "is not for model.kernels fused"),
        (
            [
                "finetune.ema_decay=0.9",
                "train.zero_stage=3",
                NVME,
            ],
            "ema_decay is not for deepspeed.zero_optimization.offload_optimizer.device nvme",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_rank(labelled, settings, words):
    config = load_config(str(labelled), settings)
    with pytest.raises(ConfigError, match=re.escape(words)):
        refuse_world("finetune", config, 2)
    refuse_world("pretrain", config, 2)
    assert words in words_of(labelled, Path("run"), *settings)


def test_few_labels_see_few_images(labelled, tmp_path):
    """10 % of 60: three of the half, two of the third, one of the sixth; an epoch is six samples."""
    run = tmp_path / "run"
    result = alone(labelled, run, "finetune.label_share=0.1", "finetune.duration=2 epochs", "finetune.global_batch=6")
    assert result.returncode == 0, result.stderr
    assert read_metrics(run, "start")[-1]["epoch_samples"] == 6
    assert read_metrics(run, "start")[-1]["steps"] == 2


def refused(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def words_of(config: Path, run: Path, *settings: str) -> str:
    """The line of the ConfigError that comes before any process meets another."""
    with pytest.raises(ConfigError) as found:
        finetune.run(load_config(str(config), [f"finetune.run={run}", *settings]), lambda: "")
    return str(found.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.labelled_images=", "data.labelled_test="], "data.labelled_images is empty"),
        (["finetune.input_size=36"], "finetune.input_size 36 is not a multiple of model.patch_size 8"),
        (["finetune.label_share=0"], "finetune.label_share is 0.0; it lies in (0, 1]"),
        pytest.param(
            ["finetune.randaugment=auto"],
            "finetune.randaugment is 'auto', which timm does not read",
            marks=pytest.mark.peers("timm"),
        ),
        (["finetune.init=same", "finetune.run=same"], "finetune.init and finetune.run are both same"),
        (["data.labelled_test={images}"], "of the same classes"),
        (["data.labelled_images={plain}", "data.labelled_test="], "has images without a label"),
        (["data.labelled_images={single}", "data.labelled_test="], "has one class; there is nothing to learn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_said(labelled, others, tmp_path, settings, words):
    assert words in words_of(labelled, tmp_path / "run", *(setting.format(**others) for setting in settings))


@pytest.mark.parametrize(
    ("init", "settings", "words"),
    [
        ("/nowhere", [], "/nowhere is neither a run folder"),
        ("{whole}", ["model.width=64"], "has model.width 32, this config says 64; make them equal"),
        ("{encoder}", ["model.width=64"], "has model.width 32, this config says 64; make them equal"),
        (
            "{encoder}",
            ["model.patch_size=16", "tokenizer.input_size=16", "mask.num_patches=2", "mask.min_block=1"],
            "has model.patch_size 8, this config says 16; make them equal",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(labelled, whole, encoder, init, settings, words):
    config = load_config(str(labelled), settings)
    classifier = finetune.new_classifier(config, 3)
    with pytest.raises(ConfigError, match=re.escape(words)):
        initialise_classifier_from(Path(init.format(whole=whole, encoder=encoder)), classifier, config.model)


@pytest.fixture(scope="module")
def encoder(labelled, tmp_path_factory) -> Path:
    folder, config = tmp_path_factory.mktemp("encoder") / "encoder", load_config(str(labelled), [])
    state = State(step=7, samples_seen=0, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    save_encoder(folder, Beit(config.model, config.tokenizer.vocabulary, seed=1).state_dict(), config, state)
    return folder


def test_an_encoder_is_taken_with_a_small_new_head(labelled, encoder):
    """A shared table in every layer, on another window; the rest bit for bit; the head as drawn, a thousandth."""
    config = load_config(str(labelled), ["finetune.input_size=48", "finetune.head_scale=1e-3"])
    classifier = finetune.new_classifier(config, 3)
    assert "step 7" in (line := initialise_classifier_from(encoder, classifier, config.model)) and "laid on 48" in line
    weights_there = load_file(encoder / "model.safetensors")
    assert torch.equal(classifier.blocks[1].fc1.weight, weights_there["blocks.1.fc1.weight"])
    assert torch.equal(classifier.patch_embedding.weight, weights_there["patch_embedding.weight"])
    assert classifier.blocks[0].attention.own_bias.table.shape == (11 * 11 + 3, 2)
    head = classifier.head.weight
    assert 0 < head.abs().max() <= 0.02e-3 and not classifier.head.bias.any()
    assert all(torch.isfinite(parameter).all() for parameter in classifier.parameters())


def test_a_fine_tuning_is_started_from_whole(labelled, whole, tmp_path):
    """Its norm and its head, from its own checkpoints or from what `export` makes of them: without a learning rate the
    first test finds what the other's last one found."""
    assert export.run(whole, tmp_path / "out") == 0
    still = ("finetune.duration=1 steps", "finetune.warmup=0 steps", "finetune.lr=0", "finetune.lr_end=0")
    for init, processes, stage in ((whole, 2, 3), (tmp_path / "out", 1, 0)):
        run, where = tmp_path / f"run{processes}", f"finetune.init={init}"
        output = trained(labelled, run, where, *still, f"train.zero_stage={stage}", processes=processes)
        assert f"starting from step {STEPS} of {init}, with its norm and its head over 3 classes" in output
        ours, theirs = read_metrics(run, "test")[-1], read_metrics(whole, "test")[-1]
        assert ours["accuracy"] == theirs["accuracy"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


@pytest.mark.parametrize("setting", ["finetune.global_batch=6", "finetune.micro_batch=1"])
def test_what_has_no_pairs_to_mix_is_refused(labelled, setting):
    """Also before a job is submitted, where no rank is there yet."""
    config = load_config(str(labelled), [setting])
    with pytest.raises(ConfigError, match=r"mix pairs.*choose a multiple of 4 and at least 2"):
        finetune.tuning_setup(config, World(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match="mix pairs"):
        refuse_world("finetune", config, 2)
    unmixed = load_config(str(labelled), [setting, "finetune.mixup=0", "finetune.cutmix=0"])
    assert finetune.tuning_setup(unmixed, World(0, 2, torch.device("cpu"))).micro_batch in (1, 3)


def test_another_config_is_refused(labelled, whole):
    """Its own settings, and what it takes of `train` and `optimizer`; pretraining's may change."""
    same = load_config(str(labelled), [f"finetune.run={whole}", "train.duration=9 epochs", "optimizer.lr=0.5"])
    claim(whole, same, finetune.IDENTITY, 2, "finetune", "a CPU")
    for setting in ("finetune.layer_decay=0.5", "train.precision=bf16", "optimizer.beta2=0.9", "data.seed=3"):
        with pytest.raises(ConfigError, match=setting.partition("=")[0]):
            claim(whole, load_config(str(labelled), [setting]), finetune.IDENTITY, 2, "finetune", "a CPU")


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """A set of other classes, one of no classes, one of a single one."""
    folder = tmp_path_factory.mktemp("others")
    write_classes(folder / "made", 6, 2)
    (folder / "made" / "class0").rename(folder / "made" / "a new class")
    (folder / "flat").mkdir()
    shutil.copytree(folder / "made" / "class1", folder / "one" / "class1")
    for path in (folder / "made").rglob("*.jpg"):
        shutil.copy(path, folder / "flat" / path.name)
    for name, where in (("made", "images"), ("flat", "plain"), ("one", "single")):
        command = [sys.executable, "-m", "beitforge", "pack", str(folder / name), str(folder / where), "--workers", "1"]
        command += ["--labels", "folder"] if name == "one" else []
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return {name: folder / name for name in ("images", "plain", "single")}


def test_without_timm_the_cure_is_named(labelled, tmp_path):
    """And without RandAugment it is not needed."""
    (tmp_path / "timm.py").write_text("raise ImportError('not installed')\n")
    blocked = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    words = "finetune.randaugment=rand-m9-mstd0.5-inc1"
    line = refused(alone(labelled, tmp_path / "run", words, environment=blocked))
    assert "cannot be imported (not installed): `pip install timm`, or set finetune.randaugment=" in line
    settings = ("finetune.randaugment=", "finetune.duration=1 steps")
    result = alone(labelled, tmp_path / "run", *settings, environment=blocked)
    assert result.returncode == 0, result.stderr
