"""A verb whose packages are not installed says so in one line, before it starts processes or writes anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.commands.test_help import LONE

WITHOUT = """
import sys
from beitforge.__main__ import main

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

HIDDEN = sys.argv.pop(1).split(",")
sys.meta_path.insert(0, Hidden())
sys.exit(main())
"""


def run_without(hidden: str, words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """`beitforge WORDS…` in a process that cannot find some packages, as after a plain `pip install beitforge`."""
    command = [sys.executable, "-c", WITHOUT, hidden, *words]
    return subprocess.run(command, cwd=folder, env=LONE, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run" / "config.yaml", tmp_path / "some.yaml"):
        path.write_text("train: {run: run, precision: fp32}\n")
    return tmp_path


TRAINING = [[verb, "some.yaml"] for verb in ("tokenizer", "tokenize", "pretrain", "finetune", "doctor")]
RANKS = [[*words, "--rank"] for words in TRAINING]
OTHERS = [["demo"], ["report", "run", "--data"], ["probe", "run", "set"], ["export", "run", "out"]]
OTHERS += [["evaluate", "run", "set"]]
OTHERS += [["import", "there", "out"], ["import-tokenizer", "there", "out"]]


@pytest.mark.parametrize("words", [*TRAINING, *RANKS, *OTHERS], ids=" ".join)
def test_without_torch(folder, words):
    result = run_without("torch", words, folder)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: `beitforge {words[0]}` needs torch, which is not installed for {sys.executable}: ")
    assert line.endswith("pip install 'beitforge[train]'")
    assert not (folder / "runs").exists(), "demo must not begin what it cannot finish"


@pytest.mark.parametrize(("hidden", "words"), [("deepspeed", words) for words in [*TRAINING, ["demo"]]])
def test_without_deepspeed_no_process_is_started(folder, hidden, words):
    result = run_without(hidden, words, folder)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert f"`beitforge {words[0]}` needs deepspeed, which is not installed" in line


def test_packages_that_settings_ask_for(folder):
    """TensorBoard only where it is written, timm only where `finetune` augments by it."""
    result = run_without("tensorboard", ["pretrain", "some.yaml"], folder)
    assert "needs tensorboard" in result.stderr
    (line,) = run_without("timm", ["finetune", "some.yaml"], folder).stderr.splitlines()
    assert "`pip install timm`, or set finetune.randaugment=" in line


LIGHT = [["plan", "some.yaml", "--images", "100"], ["stop", "run"], ["report", "run"]]


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_verbs_that_need_no_torch(folder, words):
    result = run_without("torch,deepspeed,timm,scipy,tensorboard,triton", words, folder)
    assert result.returncode == 0, result.stderr
