"""A classifier as a folder: written, read, exported, and refused where it is none or does not belong together."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beitforge.pipeline.cli import main
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import from_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.model.resize import finetuned_model
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.stages import export, report
from beitforge.pipeline.stages.finetune import new_classifier
from beitforge.pipeline.weights.classifier import initialise_classifier_from, load_classifier, save_classifier
from beitforge.pipeline.weights.encoder import class_names, fine_tuned, load_encoder, run_config, save_encoder
from tests.conftest import TINY

STATE = State(step=9, samples_seen=72, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
NAMES = ("ant", "bee", "cat")


def tuned(positions: str = "relative_shared", size: int = 48, pooling: str = "mean") -> Config:
    """Pretrained at 32 px, fine-tuned at 48."""
    tune = {"input_size": size, "randaugment": "", "pooling": pooling}
    config = from_dict({**TINY, "finetune": tune}, "TINY")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, positions=positions))


def drawn(positions: str = "relative", classes: int = len(NAMES), pooling: str = "mean") -> Classifier:
    """A classifier whose every weight is drawn, its norm's and its tables', too."""
    model = dataclasses.replace(tuned(positions).model, input_size=Size(48, 48))
    classifier = Classifier(model, classes, pooling)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return classifier.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    save_classifier(tmp_path / "classifier", drawn().state_dict(), tuned(), NAMES, STATE)
    return tmp_path / "classifier"


@pytest.mark.parametrize("positions", ["relative", "relative_shared", "absolute"])
@pytest.mark.parametrize(
    ("classes", "names", "pooling"), [(3, NAMES, "mean"), (3, (), "mean"), (0, (), "mean"), (3, NAMES, "cls")]
)
def test_what_is_read_is_what_was_written(tmp_path, positions, classes, names, pooling):
    """Its norm, its head and its names, of whatever positions and pooling, and without a head, too."""
    ours, made = drawn(positions, classes, pooling), tuned(positions, pooling=pooling)
    save_classifier(tmp_path, ours.state_dict(), made, names, STATE, source="elsewhere")
    again = load_classifier(tmp_path)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.classifier(pixels), ours(pixels)) and again.names == names == class_names(tmp_path)
    assert (again.config.model.positions, again.config.model.input_size) == (positions, (48, 48))
    assert (again.classes, again.state.step) == (classes, 9)
    assert fine_tuned(tmp_path) and run_config(tmp_path) == made
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["kind"], said["num_classes"], said["classes"]) == ("beit-classifier", classes, list(names))
    assert (said["step"], said["imported_from"]) == (9, "elsewhere")


def test_an_export_of_it_is_it(folder, tmp_path):
    assert export.run(folder, tmp_path / "out") == 0
    assert load_file(folder / "model.safetensors").keys() == drawn().state_dict().keys()
    for name, tensor in drawn().state_dict().items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)
    assert class_names(tmp_path / "out") == NAMES


def test_report_and_verify_take_it(folder, tmp_path, capsys):
    """As the fine-tuning that it comes from, and with every byte as it was written."""
    out = tmp_path / "out"
    assert export.run(folder, out) == 0 and main(["verify", str(out)]) == 0
    assert "2 files, clean" in capsys.readouterr().out
    assert report.run([out], tmp_path / "report.html") == 0
    assert "BEiT fine-tuning from drawn weights" in (tmp_path / "report.html").read_text()
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert main(["verify", str(out)]) == 2
    assert "model.safetensors is damaged or was changed" in capsys.readouterr().out


def test_names_that_are_not_as_many_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="2 names were given for 3 classes"):
        save_classifier(tmp_path, drawn().state_dict(), tuned(), NAMES[:2], STATE)


def test_an_encoder_is_no_classifier_nor_the_other_way_round(folder, tmp_path):
    config = tuned(size=32)
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
        ("classes", ["a"], "damaged .*1 names for 3 classes"),
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


def fresh(classes: int, size: int = 48, pooling: str = "mean") -> Classifier:
    """What fine-tuning would start with."""
    return new_classifier(tuned(size=size, pooling=pooling), classes)


@pytest.mark.parametrize("positions", ["relative", "relative_shared"])
@pytest.mark.parametrize(
    ("names", "taken", "words"),
    [
        (NAMES, [0, 1, 2], "with its norm and its head over 3 classes"),
        ((), [0, 1, 2], "with its norm and its head over 3 classes"),
        (("cat", "ant", "bee"), [2, 0, 1], "with its norm and its head over 3 classes"),
        (("ant", "bee", "dog"), None, "a new head over 3 classes: class 2 is 'dog', which it does not have"),
        (("ant", "bee"), None, "a new head over 2 classes: it has 3"),
    ],
)
def test_a_classifier_is_started_from_with_its_norm_and_a_head_that_fits(tmp_path, positions, names, taken, words):
    """At the same size it computes the same at once: the trained norm is not lost."""
    ours = drawn(positions)
    save_classifier(tmp_path, ours.state_dict(), tuned(positions), NAMES, STATE)
    other = fresh(len(names) or 3)
    drawn_head = other.head.weight.clone()
    assert words in initialise_classifier_from(tmp_path, other, tuned().model, names)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    if taken is not None:
        torch.testing.assert_close(other.eval()(pixels), ours(pixels)[:, taken], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(other.head.weight, drawn_head)
    assert torch.equal(other.norm.weight, ours.norm.weight) and torch.equal(other.norm.bias, ours.norm.bias)


def test_another_size_lays_the_tables_on_it(folder):
    other = fresh(3, size=64)
    line = initialise_classifier_from(folder, other, tuned().model, NAMES)
    assert "its 48 px windows laid on 64, with its norm and its head" in line
    assert torch.equal(other.norm.weight, drawn().norm.weight)
    assert other.blocks[0].attention.own_bias.table.shape == (15 * 15 + 3, 2)


def test_pooling_is_the_classifiers_own(tmp_path):
    """The norm of the class token is no norm of a mean."""
    ours = drawn(pooling="cls")
    save_classifier(tmp_path, ours.state_dict(), tuned(pooling="cls"), NAMES, STATE)
    other, pixels = fresh(3, pooling="cls"), torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    initialise_classifier_from(tmp_path, other, tuned().model, NAMES)
    assert torch.equal(other.eval()(pixels), ours(pixels))
    with pytest.raises(ConfigError, match=r"has finetune\.pooling cls, this config says mean; make them equal"):
        initialise_classifier_from(tmp_path, fresh(3), tuned().model, NAMES)


def test_a_head_without_classes_and_other_shapes(tmp_path):
    save_classifier(tmp_path, drawn(classes=0).state_dict(), tuned(), (), STATE)
    assert "a new head over 3 classes: it has none" in initialise_classifier_from(tmp_path, fresh(3), tuned().model)
    wider = dataclasses.replace(tuned().model, mean=(0.4, 0.5, 0.5))
    with pytest.raises(ConfigError, match=r"has model.mean .* this config says"):
        initialise_classifier_from(tmp_path, Classifier(finetuned_model(wider, Size(48, 48)), 3), wider)
