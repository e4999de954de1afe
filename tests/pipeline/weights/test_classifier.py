"""A classifier as a folder: written, read, exported, and refused where it is none or does not belong together."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import from_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.stages import export
from beitforge.pipeline.weights.classifier import load_classifier, save_classifier
from beitforge.pipeline.weights.encoder import class_names, fine_tuned, load_encoder, run_config, save_encoder
from tests.conftest import TINY

STATE = State(step=9, samples_seen=72, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
NAMES = ("ant", "bee", "cat")


def tiny(positions: str = "relative_shared", size: int = 48) -> Config:
    """Pretrained at 32 px, fine-tuned at 48."""
    config = from_dict({**TINY, "finetune": {"input_size": size, "randaugment": ""}}, "TINY")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, positions=positions))


def drawn(positions: str = "relative", classes: int = len(NAMES), size: int = 48, seed: int = 0) -> Classifier:
    """A classifier whose every weight is drawn, its norm's and its tables', too."""
    classifier = Classifier(dataclasses.replace(tiny(positions).model, input_size=Size(size, size)), classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return classifier.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    save_classifier(tmp_path / "classifier", drawn().state_dict(), tiny(), NAMES, STATE)
    return tmp_path / "classifier"


@pytest.mark.parametrize("positions", ["relative", "relative_shared", "absolute"])
@pytest.mark.parametrize(("classes", "names"), [(3, NAMES), (3, ()), (0, ())])
def test_what_is_read_is_what_was_written(tmp_path, positions, classes, names):
    """Its norm, its head and its names, of whatever positions, and without a head, too."""
    ours = drawn(positions, classes)
    save_classifier(tmp_path, ours.state_dict(), tiny(positions), names, STATE, source="elsewhere")
    again, config, called = load_classifier(tmp_path)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(pixels), ours(pixels)) and called == names == class_names(tmp_path)
    assert (config.model.positions, config.model.input_size) == (positions, (48, 48))
    assert fine_tuned(tmp_path) and run_config(tmp_path) == tiny(positions)
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["kind"], said["num_classes"], said["classes"]) == ("beit-classifier", classes, list(names))
    assert (said["step"], said["imported_from"]) == (9, "elsewhere")


def test_an_export_of_it_is_it(folder, tmp_path):
    assert export.run(folder, tmp_path / "out") == 0
    assert load_file(folder / "model.safetensors").keys() == drawn().state_dict().keys()
    for name, tensor in drawn().state_dict().items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)
    assert class_names(tmp_path / "out") == NAMES


def test_names_that_are_not_as_many_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="2 names were given for 3 classes"):
        save_classifier(tmp_path, drawn().state_dict(), tiny(), NAMES[:2], STATE)


def test_an_encoder_is_no_classifier_nor_the_other_way_round(folder, tmp_path):
    config = tiny(size=32)
    beit = Beit(config.model, 64, seed=0)
    save_encoder(tmp_path / "encoder", beit.state_dict(), config, STATE)
    with pytest.raises(ConfigError, match="holds an encoder of a pretraining, which has no classes"):
        load_classifier(tmp_path / "encoder")
    with pytest.raises(ConfigError, match="holds a classifier, which has no head over visual tokens"):
        load_encoder(folder)
    with pytest.raises(ConfigError, match="are no classifier's of its config"):
        save_classifier(tmp_path / "other", beit.state_dict(), config, (), STATE)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("kind", "resnet", "holds another library's checkpoint"),
        ("classes", "abc", "damaged"),
        ("classes", [1, 2, 3], "damaged"),
        ("classes", ["a"], "1 names for 3 classes"),
        ("config", 7, "damaged"),
    ],
)
def test_a_damaged_description_is_said(folder, name, value, words):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, name: value}))
    with pytest.raises(ConfigError, match=words):
        load_classifier(folder)


def test_other_weights_than_described_are_said(folder):
    weights = load_file(folder / "model.safetensors")
    for changed in ({"blocks.1.fc1.bias": None}, {"head.weight": torch.zeros(3, 7)}, {"more": torch.zeros(1)}):
        kept = {name: tensor for name, tensor in {**weights, **changed}.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(ConfigError, match="are no classifier's of its config"):
            load_classifier(folder)
