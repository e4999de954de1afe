"""`probe` on real shards: which images it takes, where its results go, what it refuses."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.stages.finetune import new_classifier
from beitforge.pipeline.stages.probe import ProbeOptions, run
from beitforge.pipeline.weights.classifier import save_classifier
from beitforge.pipeline.weights.encoder import save_encoder
from beitforge.shards.decode.codec import encode
from beitforge.shards.pack.adopt import adopt
from tests.conftest import ROOT, TINY

CLASSES = 4
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]])


def sorted_set(folder: Path, each: int) -> str:
    """Foreign tars, every class after the other; an image's colour is its class."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for number in range(CLASSES * each):
            label = number // each
            pixels = np.clip(COLOURS[label] + generator.normal(0, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
            for suffix, content in ((".jpg", encode(pixels, "jpg", 90)), (".cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    adopt(folder, 1)
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sorted")
    return sorted_set(folder / "train", 20), sorted_set(folder / "test", 6)


@pytest.fixture
def encoder(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    config = load_config(str(tmp_path / "tiny.yaml"), [])
    state = State(step=7, samples_seen=0, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    weights = Beit(config.model, config.tokenizer.vocabulary, seed=1).state_dict()
    save_encoder(tmp_path / "encoder", weights, config, state)
    return tmp_path / "encoder"


def said(encoder: Path, name: str = "probe.json") -> dict:
    return json.loads((encoder / name).read_text())


def test_few_images_of_a_sorted_set_are_of_all_classes(sets, encoder):
    """The first ones are of one class."""
    assert run(encoder, *sets, ProbeOptions(samples=24, epochs=5)) == 0
    found = said(encoder)
    assert (found["classes"], found["train_samples"], found["test_samples"]) == (CLASSES, 24, 24)
    assert found["majority_class"] == 1 / CLASSES
    assert found["results"]["raw pixels"]["knn"] > 0.9


def test_a_classifier_is_probed_at_its_own_size(sets, encoder, tmp_path):
    """Whose images are not of the size that its encoder was pretrained on."""
    config = load_config(str(tmp_path / "tiny.yaml"), ["finetune.input_size=48"])
    weights = new_classifier(config, CLASSES).state_dict()
    state = State(step=9, samples_seen=0, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    save_classifier(tmp_path / "classifier", weights, config, (), state)
    assert run(tmp_path / "classifier", *sets, ProbeOptions(samples=24, epochs=2)) == 0
    found = said(tmp_path / "classifier")
    assert found["step"] == 9 and found["results"]["trained"] == found["results"]["untrained"]


def test_results_of_few_labels_are_not_the_runs(sets, encoder, capsys):
    run(encoder, *sets, ProbeOptions(epochs=2))
    before = said(encoder)
    assert before["train_samples"] == CLASSES * 20 and before["results"]["trained"]["chosen"]
    capsys.readouterr()
    run(encoder, *sets, ProbeOptions(epochs=2, label_share=0.1, seed=3))
    assert said(encoder) == before
    few = said(encoder, "probe-0.1-3.json")
    assert few["train_samples"] == CLASSES * 2 and few["test_samples"] == CLASSES * 6 and few["tested_apart"]
    assert not few["results"]["trained"]["chosen"]
    printed = "".join(capsys.readouterr())
    assert "too few images of a class to choose by" in printed and f"in {encoder / 'probe-0.1-3.json'}" in printed


def test_a_set_alone_is_tested_on_its_fifth(sets, encoder):
    run(encoder, sets[0], None, ProbeOptions(epochs=2))
    found = said(encoder)
    assert (found["train_samples"], found["test_samples"], found["tested_apart"]) == (CLASSES * 16, CLASSES * 4, False)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (ProbeOptions(label_share=1.5), r"--label-share is 1.5; it lies in \(0, 1\]$"),
        (ProbeOptions(samples=1), "--samples is 1; it must be at least 2$"),
        (ProbeOptions(epochs=0), "--epochs is 0; it must be at least 1$"),
        (ProbeOptions(label_share=0.5), "give TEST"),
    ],
)
def test_what_cannot_be_done_is_refused(sets, encoder, asked, words):
    with pytest.raises(ConfigError, match=words):
        run(encoder, sets[0], None, asked)


def packed(folder: Path, classes: list[str]) -> str:
    for name in classes:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(4):
            (folder / "images" / name / f"{number}.jpg").write_bytes(encode(np.zeros((40, 40, 3), np.uint8), "jpg", 90))
    command = [
        sys.executable,
        "-m",
        "beitforge",
        "pack",
        str(folder / "images"),
        str(folder / "shards"),
        "--workers",
        "1",
    ]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return str(folder / "shards")


def test_a_test_set_of_other_classes_is_refused(encoder, tmp_path):
    """Whose labels mean something else."""
    train, test = packed(tmp_path / "train", ["ash", "beech", "fir"]), packed(tmp_path / "test", ["ash", "fir"])
    with pytest.raises(ConfigError, match=f"{test} has class 'fir' as label 1, {train} 'beech'"):
        run(encoder, train, test, ProbeOptions(epochs=2))
