"""The command line answers at once: help and refusals import neither torch nor deepspeed, and refusals are one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

HEAVY = ("torch", "deepspeed", "triton", "tensorboard")
LONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m …`; every module it imports is a line of stderr (-X importtime)."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words],
        cwd=ROOT,
        env={**LONE, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def imported(result: subprocess.CompletedProcess) -> set[str]:
    """Top-level packages that were imported."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    assert lines
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def said(result: subprocess.CompletedProcess) -> list[str]:
    """What stderr holds beside the imports."""
    return [line for line in result.stderr.splitlines() if not line.startswith("import time:")]


HELP = [
    (("beitforge", "--help"), ["pack", "verify", "tokenizer", "tokenize", "pretrain", "doctor", "export", "demo"]),
    (("beitforge", "pretrain", "--help"), ["CONFIG", "section.key=value"]),
    (("beitforge", "doctor", "--help"), ["CONFIG", "section.key=value", "--json", "--seconds"]),
    (("beitforge", "tokenize", "--help"), ["CONFIG", "section.key=value"]),
    (("beitforge", "export", "--help"), ["RUN", "OUT"]),
    (("beitforge", "probe", "--help"), ["RUN", "SHARDS", "--samples"]),
    (("beitforge", "evaluate", "--help"), ["RUN|WEIGHTS", "SET", "section.key=value", "--json", "--by-number"]),
    (("beitforge", "report", "--help"), ["RUN"]),
    (("beitforge", "replay", "--help"), ["RUN", "--step", "--from", "--to", "--page"]),
    (("beitforge", "demo", "--help"), ["DIR", "--out"]),
    (("beitforge", "pack", "--help"), ["IMAGES", "SHARDS", "--split", "--quality"]),
    (("beitforge", "verify", "--help"), ["SHARDS"]),
]


@pytest.mark.parametrize(("words", "expected"), HELP, ids=lambda value: " ".join(value))
def test_help_is_instant(words, expected):
    result = command(*words)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in expected), result.stdout
    assert said(result) == []
    assert not imported(result) & {*HEAVY, "numpy"}


@pytest.mark.parametrize("words", [(), ("fly",)])
def test_no_verb_or_a_wrong_one(words):
    """A usage and exit code 2."""
    result = command("beitforge", *words)
    assert result.returncode == 2
    assert "usage:" in result.stderr
    assert "Traceback" not in result.stderr


REFUSALS = [
    (["nowhere.yaml"], "nowhere.yaml does not exist"),
    (["configs"], "configs"),
    (["{}", "train.zero_stag=2"], "did you mean zero_stage?"),
    (["{}", "trian.zero_stage=2"], "did you mean train?"),
    (["{}", "train.zero_stage=many"], "train.zero_stage is 'many'"),
    (["{}", "zero_stage"], "section.key=value"),
    (["{}", "model.heads=7"], "model.heads 7"),
]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({"train": {"precision": "fp32"}}))
    return str(path)


@pytest.mark.parametrize("verb", ["pretrain", "tokenize"])
@pytest.mark.parametrize(("words", "expected"), REFUSALS, ids=str)
def test_a_wrong_config_is_one_line(config, verb, words, expected):
    """Exit code 2, exactly one line on stderr, nothing on stdout, nothing heavy imported for it."""
    result = command("beitforge", verb, *(word.replace("{}", config) for word in words))
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = said(result)
    assert line.startswith("error: ")
    assert expected in line
    assert not imported(result) & {*HEAVY, "numpy"}


def test_missing_images_are_one_line(config):
    """Found out by a stage, after torch is loaded: still one line."""
    result = command("beitforge", "pretrain", "--rank", config, "data.images=nowhere")
    assert result.returncode == 2
    lines = [line for line in said(result) if line.startswith("error: ")]
    assert len(lines) == 1
    assert "nowhere" in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_a_config_is_refused_by_each_host_once(config, local_rank, lines):
    """Launchers look at it before; so it is this host's own copy, which all its ranks read."""
    place = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "4"}
    result = command("beitforge", "pretrain", "--rank", config, "model.heads=7", **place)
    assert result.returncode == 2
    found = said(result)
    assert len(found) == lines and all(line.startswith(f"error: host {os.uname().nodename}: ") for line in found)


def test_shards_refuse_in_one_line(tmp_path):
    result = command("beitforge", "stats", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    (line,) = said(result)
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert not imported(result) & {*HEAVY}


def test_preprocessing_needs_neither_torch_nor_deepspeed():
    """Every module of shards but loader and view_batches imports without them; the writer of tars, too."""
    code = """
import importlib, pkgutil, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import beitforge.shards as shards
for module in pkgutil.walk_packages(shards.__path__, "beitforge.shards."):
    if module.name.rpartition(".")[2] not in ("loader", "view_batches", "fixed_point", "on_device"):
        importlib.import_module(module.name)
from webdataset.writer import TarWriter
print(len(sys.modules) > 50)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_a_reader_that_leaves_is_no_error():
    """`beitforge settings | head -1`."""
    words = f"{sys.executable} -m beitforge settings | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == "" and done.returncode == 0
