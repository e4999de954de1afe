"""`evaluate` on real shards: counts of a plain loop on any number of ranks, classes by name, and what it refuses."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beitforge.pipeline.config.loading import from_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.stages.evaluate import EvaluateOptions, evaluation_config, run
from beitforge.pipeline.stages.finetune import new_classifier
from beitforge.pipeline.weights.classifier import save_classifier
from beitforge.pipeline.weights.encoder import save_encoder
from beitforge.shards.format.views import central_views
from beitforge.shards.stream.image_set import ImageSet
from tests.conftest import ROOT, TINY
from tests.pipeline.commands.test_finetune import write_classes
from tests.ranks import run_ranks

STATE = State(step=5, samples_seen=0, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
NAMES = ("class0", "class1", "class2")
CROP = 0.75


def pack(images: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "beitforge", "pack", str(images), str(out), "--samples-per-shard", "9"]
    subprocess.run([*command, "--workers", "1"], check=True, cwd=ROOT, capture_output=True)
    return out


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """23 images of three classes; and those of two of them alone, whose labels are therefore others."""
    folder = tmp_path_factory.mktemp("sets")
    write_classes(folder / "images", 23, 1)
    shutil.copytree(folder / "images", folder / "fewer")
    shutil.rmtree(folder / "fewer" / "class0")
    shutil.copytree(folder / "images" / "class1", folder / "strange" / "elm")
    shutil.copytree(folder / "images" / "class2", folder / "strange" / "fir")
    found = {name: pack(folder / name, folder / f"{name}.set") for name in ("images", "fewer", "strange")}
    return {**found, "files": folder / "images"}


def config_of(size: str = "40") -> Config:
    return from_dict({**TINY, "finetune": {"input_size": size, "randaugment": "", "test_crop": CROP}}, "TINY")


def guessing(size: str = "40", classes: int = len(NAMES)) -> Classifier:
    """Drawn at random, its tables and its norm, too: right about as often as wrong."""
    classifier = new_classifier(config_of(size), classes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return classifier.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("weights") / "classifier"
    save_classifier(where, guessing().state_dict(), config_of(), NAMES, STATE)
    return where


def evaluated(folder: Path, where: Path, out: Path, *words: str, processes: int = 1) -> dict:
    done = run_ranks("beitforge", "evaluate", "--rank", folder, where, "--json", out, *words, processes=processes)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def refused(*words: object, processes: int = 1) -> str:
    done = run_ranks("beitforge", "evaluate", "--rank", *words, processes=processes)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error:"))


def by_hand(files: Path) -> list[tuple[int, list[int]]]:
    """Label and classes in order of their logits, of every image, with Pillow's pixels and no code of `evaluate`."""
    classifier, found = guessing(), []
    for path in sorted(files.rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        x, y, width, height = (
            central_views(np.array([image.width]), np.array([image.height]), 1.0, CROP).boxes[0].tolist()
        )
        pixels = torch.tensor(list(image.crop((x, y, x + width, y + height)).tobytes()), dtype=torch.uint8)
        square = pixels.view(1, height, width, 3).permute(0, 3, 1, 2)
        small = torch.nn.functional.interpolate(square, (40, 40), mode="bicubic", antialias=True).float() / 255
        with torch.no_grad():
            logits = classifier((small - 0.5) / 0.5)[0]
        found.append((int(path.parent.name[5:]), logits.argsort(descending=True).tolist()))
    return found


def test_counts_are_those_of_a_plain_loop_on_any_number_of_ranks(sets, folder, tmp_path):
    """23 images divide by none of 2, 3 and the batch of 4; and all of it is one file, byte for byte."""
    texts = []
    for world in (1, 2, 3):
        evaluated(folder, sets["images"], tmp_path / f"{world}.json", "finetune.micro_batch=4", processes=world)
        texts.append((tmp_path / f"{world}.json").read_text())
    assert texts[1:] == texts[:1] * 2
    found, wanted = json.loads(texts[0]), by_hand(sets["files"])
    assert found["images"] == 23 and found["classes_by"] == "name" and found["step"] == 5 and not found["unreadable"]
    assert (found["input_size"], found["test_crop"]) == ("40", CROP)
    right = sum(label == ranks[0] for label, ranks in wanted)
    assert 0 < right < 23 and found["top1"] == {"right": right, "share": right / 23}
    assert found["top5"]["right"] == 23
    for number, each in enumerate(found["classes"]):
        own = [ranks[0] for label, ranks in wanted if label == number]
        assert each == {
            "number": number,
            "name": NAMES[number],
            "images": len(own),
            "top1": own.count(number),
            "top5": len(own),
        }
    for each in found["confusions"]:
        label, taken = NAMES.index(each["class"]), NAMES.index(each["taken_for"])
        assert each["images"] == sum((label, taken) == (own, ranks[0]) for own, ranks in wanted)
    assert sum(each["images"] for each in found["confusions"]) == 23 - right


def test_classes_are_matched_by_name(sets, folder, tmp_path):
    """A set of two of the classes numbers them otherwise: as many of each are right as among all three."""
    whole = {each["name"]: each for each in evaluated(folder, sets["images"], tmp_path / "whole.json")["classes"]}
    fewer = evaluated(folder, sets["fewer"], tmp_path / "fewer.json")
    assert fewer["classes"] == [whole["class1"], whole["class2"]]
    numbered = evaluated(folder, sets["fewer"], tmp_path / "numbered.json", "--by-number")
    assert numbered["classes_by"] == "number" and [each["number"] for each in numbered["classes"]] == [0, 1]


def test_what_does_not_fit_is_refused(sets, folder, tmp_path):
    line = refused(folder, sets["strange"], processes=2)
    assert "has 2 classes that the classifier does not know by name ('elm', 'fir'; it knows 'class0'" in line
    save_classifier(tmp_path / "bare", guessing(classes=3).state_dict(), config_of(), (), STATE)
    assert "has 2 classes, the classifier 3" in refused(tmp_path / "bare", sets["fewer"])
    headless = {name: tensor for name, tensor in guessing().state_dict().items() if not name.startswith("head.")}
    save_classifier(tmp_path / "headless", headless, config_of(), (), STATE)
    assert "is a classifier without a head" in refused(tmp_path / "headless", sets["images"])
    broken = {name: tensor * float("nan") for name, tensor in guessing().state_dict().items()}
    save_classifier(tmp_path / "broken", broken, config_of(), (), STATE)
    assert "the logits of 23 of 23 images are not finite" in refused(tmp_path / "broken", sets["images"])


def test_what_shows_before_anything_is_read(sets, folder, tmp_path):
    config = dataclasses.replace(config_of(), model=dataclasses.replace(config_of().model, positions="absolute"))
    save_encoder(tmp_path / "encoder", Beit(config.model, 64, seed=0).state_dict(), config, STATE)
    with pytest.raises(ConfigError, match="holds an encoder of a pretraining, which has no classes"):
        evaluation_config(tmp_path / "encoder", [])
    with pytest.raises(ConfigError, match=r"finetune.input_size is 40 of this classifier, not 48"):
        evaluation_config(folder, ["finetune.input_size=48"])
    with pytest.raises(ConfigError, match=r"is neither a run folder .* nor an encoder or a classifier"):
        run(tmp_path, str(sets["images"]), EvaluateOptions())
    with pytest.raises(ConfigError, match="there is no such folder"):
        run(folder, str(sets["images"]), EvaluateOptions(json=tmp_path / "nowhere" / "out.json"))
    assert evaluation_config(folder, ["loader.workers=3"]).loader.workers == 3


def test_somebody_elses_file_stays(sets, folder, tmp_path):
    (tmp_path / "notes.json").write_text("[1]")
    assert "was not written by beitforge, so it stays" in refused(
        folder, sets["images"], "--json", tmp_path / "notes.json"
    )
    assert (tmp_path / "notes.json").read_text() == "[1]"


def test_an_image_that_cannot_be_read_counts_nowhere(sets, folder, tmp_path):
    """And is named; no substitute counts in its place."""
    shutil.copytree(sets["images"], tmp_path / "set")
    images = ImageSet(str(tmp_path / "set"))
    tar, row = tmp_path / "set" / f"{images.manifest.shards[0].name}.tar", images.row(0, 4)
    data = bytearray(tar.read_bytes())
    data[row.image_offset + row.image_size // 2] ^= 0xFF
    tar.write_bytes(data)
    found = evaluated(folder, tmp_path / "set", tmp_path / "out.json", processes=2)
    whole = evaluated(folder, sets["images"], tmp_path / "whole.json")
    assert found["images"] == 22 and len(found["unreadable"]) == 1
    lost = [whole["classes"][n]["images"] - found["classes"][n]["images"] for n in range(3)]
    assert sorted(lost) == [0, 0, 1] and found["unreadable"][0]["key"].startswith(NAMES[lost.index(1)])
    said = tuned(sets["images"], tmp_path / "set", tmp_path)
    assert said["samples"] == 22, "fine-tuning's own test counts the same images"


def tuned(images: Path, test: Path, folder: Path) -> dict:
    """What the test of a fine-tuning run of two ranks under ZeRO-2 found; its run is in folder / "run"."""
    tune = {"input_size": 40, "randaugment": "", "duration": "3 steps", "warmup": "1 steps", "lr": 1e-3}
    tune |= {"global_batch": 12, "micro_batch": 6, "test_every": "3 steps", "run": str(folder / "run")}
    data = {"labelled_images": str(images), "labelled_test": str(test)}
    (folder / "tuned.yaml").write_text(json.dumps({**TINY, "data": data, "finetune": {**tune, "head_scale": 1.0}}))
    done = run_ranks("beitforge", "finetune", "--rank", folder / "tuned.yaml", processes=2)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "test"][-1]


def test_a_fine_tuning_run_says_what_its_own_test_said(sets, tmp_path):
    """Its newest checkpoint."""
    said = tuned(sets["images"], sets["images"], tmp_path)
    found = evaluated(tmp_path / "run", sets["images"], tmp_path / "out.json", processes=2)
    assert found["step"] == 3 and found["top1"]["share"] == said["accuracy"] and found["images"] == said["samples"]
