"""The config: every knob on one page, every mistake one line that names it, and nothing heavy imported for it."""

import dataclasses
import json
import math
import subprocess
import sys
import typing

import pytest
import yaml

from beitforge.pipeline.config.fields import Duration, Size
from beitforge.pipeline.config.loading import from_dict, load_config, to_dict, to_yaml, words_of
from beitforge.pipeline.config.settings import Config, Optimizer, Train, View
from beitforge.pipeline.errors import ConfigError
from tests.conftest import ROOT
from tests.pipeline.config.loading import load, refusal

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load(tmp_path) == Config()
    assert load(tmp_path, "data:\nmodel: {}\ndeepspeed:\n") == Config()


def test_the_defaults_are_the_recipe():
    """docs/recipe.md: input, mask, optimiser."""
    config = Config()
    sizes = (config.model.input_size, config.model.patch_size, config.tokenizer.input_size, config.tokenizer.stride)
    assert sizes == ((224, 224), 16, (112, 112), 8)
    assert config.train.global_batch == 2048
    assert (config.mask.num_patches, config.mask.min_block, config.mask.aspect_min, config.mask.exact) == (
        75,
        16,
        0.3,
        True,
    )
    assert config.optimizer == Optimizer(lr=1.5e-3, lr_end=1e-5, beta2=0.999, weight_decay=0.05, clip_norm=3.0)
    assert config.view == View(aspect_min=3 / 4, aspect_max=4 / 3, area_min=0.08, flip=0.5, brightness=0.4)


def test_yaml_then_overrides(tmp_path):
    config = load(
        tmp_path,
        "train:\n  zero_stage: 1\n  run: here\nmodel: {layers: 3}\n",
        "train.zero_stage=3",
        "data.seed=7",
        "deepspeed.zero_optimization.overlap_comm=true",
    )
    assert (config.train.zero_stage, config.train.run, config.model.layers, config.data.seed) == (3, "here", 3, 7)
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),  # PyYAML reads it as a text
        ("optimizer.lr='2e-4'", "optimizer", "lr", 2e-4),
        ("optimizer.weight_decay=0", "optimizer", "weight_decay", 0.0),
        ("optimizer.epsilon=1.0e-6", "optimizer", "epsilon", 1e-6),
        ("train.global_batch=1e3", "train", "global_batch", 1000),
        ("train.global_batch=512.0", "train", "global_batch", 512),
        ("train.compile=true", "train", "compile", True),
        ("log.tensorboard=no", "log", "tensorboard", False),
        ("train.duration=800 epochs", "train", "duration", Duration(800, "epochs")),
        ("train.duration=1 epoch", "train", "duration", Duration(1, "epochs")),
        ("train.duration=1e6 samples", "train", "duration", Duration(1e6, "samples")),
        ("optimizer.warmup=0.5 epochs", "optimizer", "warmup", Duration(0.5, "epochs")),
        ("model.mean=[0.485, 0.456, 4e-1]", "model", "mean", (0.485, 0.456, 0.4)),
        ("data.heldout_images=", "data", "heldout_images", ""),
        ("data.images=a=b", "data", "images", "a=b"),
        ("data.images=bilder/äöü und mehr", "data", "images", "bilder/äöü und mehr"),
        ("data.seed=-3", "data", "seed", -3),
    ],
)
def test_values_are_read_by_the_type_of_their_setting(tmp_path, override, section, key, value):
    found = getattr(getattr(load(tmp_path, "", override), section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.zero_stag=1", ["override 'train.zero_stag=1'", "did you mean zero_stage?"]),
        ("optimiser.lr=1", ["section", "'optimiser'", "did you mean optimizer?"]),
        ("qqq.lr=1", ["'qqq'", "there are data, view"]),
        ("model.qqq=1", ["model", "'qqq'", "there are input_size, patch_size"]),
        ("model.layers=2.5", ["model.layers", "2.5", "whole number"]),
        ("model.layers=many", ["model.layers", "'many'", "whole number"]),
        ("model.layers=true", ["model.layers", "True", "whole number"]),
        ("model.layers=", ["model.layers", "None", "whole number"]),
        ("model.layers=nan", ["model.layers", "whole number"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "a number"]),
        ("optimizer.lr=[1]", ["optimizer.lr", "[1]", "a number"]),
        ("optimizer.lr=nan", ["optimizer.lr", "a number"]),
        ("train.compile=1", ["train.compile", "1", "true or false"]),
        ("train.compile=ja", ["train.compile", "'ja'", "true or false"]),
        ("model.mean=[0.1, 0.2]", ["model.mean", "list of 3 numbers"]),
        ("model.mean=0.5", ["model.mean", "0.5", "list of 3 numbers"]),
        ("model.mean=[a, 1, 1]", ["model.mean", "'a'", "a number"]),
        ("train.duration=300", ["train.duration", "300", "300 epochs or 10000 steps"]),
        ("train.duration=300 hours", ["train.duration", "'300 hours'", "epochs"]),
        ("train.duration=-1 epochs", ["train.duration", "'-1 epochs'"]),
        ("train.duration=many epochs", ["train.duration", "'many'", "a number"]),
        ("train.duration=", ["train.duration", "None", "a unit"]),
        ("zero_stage=3", ["'zero_stage=3'", "section.key=value"]),
        ("train.zero_stage", ["'train.zero_stage'", "section.key=value"]),
        (".lr=3", ["'.lr=3'", "section.key=value"]),
        ("model.layers=[1", ["model.layers", "'[1'", "not a YAML value"]),
        ("model.layers.first=1", ["model.layers", "whole number"]),
    ],
)
def test_a_wrong_word_gets_one_line(tmp_path, override, words):
    """Key, value and rule, and for an unknown key the nearest name."""
    line = refusal(tmp_path, "", override)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", ["some.yaml", "sections", "list"]),
        ("3\n", ["some.yaml", "sections", "int"]),
        ("model: 3\n", ["model", "section of settings", "3"]),
        ("model: [1]\n", ["model", "section of settings"]),
        ("deepspeed: 3\n", ["deepspeed", "mapping", "3"]),
        ("a: b: c\n", ["some.yaml", "not valid YAML", "line 1"]),
        ("model:\n\tlayers: 3\n", ["some.yaml", "not valid YAML"]),
        ("modle: {}\n", ["'modle'", "did you mean model?"]),
        ("data: {images: 2024}\n", ["data.images", "2024", "a text"]),
        ("1: {}\n", ["1", "unknown"]),
        ("model: {layres: 3}\n", ["model", "'layres'", "did you mean layers?"]),
        ("model: {1: 3}\n", ["model", "1", "unknown"]),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, text, words):
    line = refusal(tmp_path, text)
    assert all(word in line for word in words), line


def test_a_value_is_no_section(tmp_path):
    line = refusal(tmp_path, "model: {layers: 3}", "model.layers.x=1")
    assert line == "override 'model.layers.x=1': layers is a value, not a section"


@pytest.mark.parametrize("what", ["missing.yaml", "folder", "binary.yaml"])
def test_a_file_that_is_none(tmp_path, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match=what) as caught:
        load_config(str(tmp_path / what), [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("224", (224, 224)), ("224x320", (224, 320)), ("'384'", (384, 384)), ("32 x 64", (32, 64))]
)
def test_sizes(tmp_path, text, size):
    """One number is a square; two are height and width. Written back as they came."""
    settings = [f"model.input_size={text}", f"tokenizer.input_size={size[0] // 2}x{size[1] // 2}"]
    config = load(tmp_path, "mask: {num_patches: 4, min_block: 1}", *settings)
    assert config.model.input_size == size
    assert config.model.grid == config.tokenizer.grid == (size[0] // 16, size[1] // 16)
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("text", ["224x", "x224", "1x2x3", "big", "[224]", "2.5", "true", "-16"])
def test_what_is_no_size(tmp_path, text):
    assert "write pixels, such as 224, or height and width" in refusal(tmp_path, "", f"model.input_size={text}")


def changed() -> Config:
    """A config whose every setting differs from its default, as far as the rules allow."""
    choices = {
        "kind": "adamw",
        "activation_checkpointing": "full",
        "positions": "absolute",
        "precision": "fp16",
        "filter": "torch lanczos",
        "kernels": "reference",
        "decoder": "pillow",
        "compile_mode": "reduce-overhead",
        "pooling": "cls",
        "weight_decay_end": 0.2,
        "test_crop": 0.9,
    }

    def other(name: str, value: object) -> object:
        if isinstance(value, bool):
            return not value
        if isinstance(value, Duration):
            return Duration(value.count + 0.5, "samples")
        if isinstance(value, str):
            return choices.get(name, f"{value}/ä b")
        if isinstance(value, Size):
            return Size(2 * value.height, 2 * value.width)
        if isinstance(value, tuple):
            return (0.1, 0.2, 1 / 3)
        return value * 2 if isinstance(value, int) else value * 0.7  # type: ignore[operator]

    tree = {
        section.name: dataclasses.replace(
            getattr(Config(), section.name),
            **{
                field.name: other(field.name, getattr(getattr(Config(), section.name), field.name))
                for field in dataclasses.fields(getattr(Config(), section.name))
                if field.name not in ("patch_size", "stride", "zero_stage")
            },
        )
        for section in dataclasses.fields(Config)
        if section.name != "deepspeed"
    }
    return Config(**tree, deepspeed={"fp16": {"loss_scale": 0}, "x": [1, None, "y"]})


@pytest.mark.parametrize("config", [Config(), changed()], ids=["defaults", "changed"])
def test_round_trips(tmp_path, config):
    """The resolved config in a run folder, a checkpoint or an export is the config of the run, to the last digit."""
    assert from_dict(to_dict(config), "x") == config
    assert from_dict(json.loads(json.dumps(to_dict(config))), "x") == config
    assert load(tmp_path, to_yaml(config)) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    """Each begins with its command, hardware and hours, and expected numbers."""
    assert isinstance(load_config(str(path), []), Config)
    header = path.read_text(encoding="utf-8").split("\ndata:")[0]
    assert "./launch.sh" in header
    assert "Hardware" in header


def test_the_demo_config_is_shipped():
    assert "demo.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(3, "steps"), 3),
        (Duration(10, "epochs"), 100),
        (Duration(1, "epochs"), 10),
        (Duration(0.51, "epochs"), 6),
        (Duration(21, "samples"), 3),
        (Duration(20, "samples"), 2),
        (Duration(0, "epochs"), 0),
    ],
)
def test_durations_in_steps_are_rounded_up(duration, steps):
    """An epoch of 100 samples in batches of 10."""
    assert duration.steps(100, 10) == steps


def test_recipe_durations_in_steps():
    """800 epochs of ImageNet-1k at 2048, 625.6 steps each."""
    assert Duration(800, "epochs").steps(1_281_167, 2048) == math.ceil(800 * 1_281_167 / 2048)
    assert Duration(10_000, "steps").steps(1_281_167, 2048) == 10_000


def test_a_duration_keeps_its_digits():
    duration = Duration(1_281_167, "samples")
    config = Config(train=Train(duration=duration))
    assert from_dict(to_dict(config), "x").train.duration == duration


def test_an_override_of_an_empty_section(tmp_path):
    assert load(tmp_path, "model:\n", "model.layers=3").model.layers == 3


def test_a_folder_is_taken_as_it_is_written(tmp_path):
    assert load(tmp_path, "", "data.images=/images #1").data.images == "/images #1"


def test_a_seed_keeps_its_digits(tmp_path):
    assert load(tmp_path, "", "data.seed=9007199254740993").data.seed == 9007199254740993


def test_a_section_given_twice_is_refused(tmp_path):
    assert "model" in refusal(tmp_path, "model: {layers: 3}\nmodel: {width: 12}\n")


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        load_config(str(tmp_path / "file" / "config.yaml"), [])


def test_a_word_that_stands_for_a_number(tmp_path):
    """Beside numbers in every form, and written back as it came; anything else is one line that names it."""
    config = load(tmp_path, "finetune: {test_crop: auto}", "optimizer.weight_decay_end=2e-1")
    assert (config.finetune.test_crop, config.optimizer.weight_decay_end) == ("auto", 0.2)
    assert config.finetune.weight_decay_end == "same"
    assert load(tmp_path, to_yaml(config)) == config
    for text in ("sane", "true", "[0.1]", "~"):
        assert "it takes a number, or same" in refusal(tmp_path, "", f"finetune.weight_decay_end={text}")
    assert "finetune.test_crop is 1.5; it lies in (0, 1]" in refusal(tmp_path, "", "finetune.test_crop=1.5")


def test_settings_are_frozen_typed_and_keyword_only():
    """Every section is a frozen dataclass; every setting has a type that _convert knows."""
    known = (int, float, bool, str, Duration, Size)
    for section in dataclasses.fields(Config):
        if section.name == "deepspeed":
            continue
        kind = typing.get_type_hints(Config)[section.name]
        assert kind.__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), dataclasses.fields(kind)[0].name, 1)
        with pytest.raises(TypeError):
            kind(1)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            assert hint in known or typing.get_origin(hint) is tuple or words_of(hint), field.name
    assert Train().zero_stage == 2


def test_config_imports_nothing_heavy():
    """Help and config errors are instant."""
    heavy = ("torch", "numpy", "deepspeed", "beitforge.shards")
    code = f"import sys, beitforge.pipeline.config.loading; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_config_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    """Where no repository is: a wheel brings the configs. A file of the user's own of that name comes first."""
    monkeypatch.chdir(tmp_path)
    own = load_config(str(ROOT / "configs" / "beit_large.yaml"), [])
    assert load_config("beit_large", []) == load_config("configs/beit_large.yaml", []) == own
    assert load_config("beit_large.yaml", ["model.layers=3"]).model.layers == 3
    (tmp_path / "beit_large.yaml").write_text("model: {layers: 2}\n")
    assert load_config("beit_large.yaml", []).model.layers == 2
    with pytest.raises(ConfigError, match=r"beit_larg does not exist; give a YAML file, or one of beit_base, .*demo$"):
        load_config("beit_larg", [])


@pytest.mark.parametrize(("written", "read"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_what_earlier_versions_wrote(tmp_path, written, read):
    """train.activation_checkpointing was true or false."""
    line = f"train: {{activation_checkpointing: {written}}}"
    assert load(tmp_path, line).train.activation_checkpointing == read
    assert load(tmp_path, "", f"train.activation_checkpointing={written}").train.activation_checkpointing == read
