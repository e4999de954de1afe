"""The whole job through the front door, on a user's own folder: interrupted, continued, finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beitforge.pipeline.stages import demo as stage
from tests.conftest import ROOT, write_images

SMALL = [
    "tokenizer.duration=12 steps",
    "tokenizer.global_batch=8",
    "tokenizer.vocabulary=64",
    "tokenizer.width=16",
    "model.layers=2",
    "model.width=32",
    "view.num_views=2",
    "train.duration=60 steps",
    "train.global_batch=8",
    "optimizer.warmup=4 steps",
    "checkpoint.every=10 steps",
    "log.every_steps=2",
    "log.heldout_every=20 steps",
]


def demo(images: Path, out: Path) -> subprocess.Popen:
    command = [str(ROOT / "launch.sh"), "demo", str(images), "--out", str(out), *SMALL]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def members(group: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == group and fields[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return found


def test_demo_of_a_folder_killed_and_continued(tmp_path):
    """kill -9 of the demo alone, in the middle of pretraining: nothing runs on; the same command ends the job."""
    write_images(tmp_path / "images", 120, 3)
    out = tmp_path / "out"
    first = demo(tmp_path / "images", out)
    deadline = time.monotonic() + 240
    while first.poll() is None and not list((out / "pretrain" / "checkpoints").glob("step-*/state.json")):
        assert time.monotonic() < deadline, "no checkpoint in four minutes"
        time.sleep(0.05)
    assert first.poll() is None, first.communicate()[0]
    os.kill(first.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while members(first.pid):
        assert time.monotonic() < deadline, f"still running a minute later: {members(first.pid)}"
        time.sleep(0.2)
    first.communicate()

    output, _ = (second := demo(tmp_path / "images", out)).communicate(timeout=400)
    assert second.returncode == 0, output
    assert "== tokenizer: finished before" in output
    _, command, pretraining = output.partition("== ./launch.sh pretrain ")
    assert command, output
    assert "from step 0" not in pretraining
    assert re.search(r"from step [1-9]", pretraining), output
    for words in ("codebook use", "masked accuracy", "linear probe", "untrained", "raw pixels", "report.html"):
        assert words in output, output
    probe = json.loads((out / "pretrain" / "probe.json").read_text())
    assert set(probe["results"]) == {"trained", "untrained", "raw pixels"}
    assert "<html" in (out / "pretrain" / "report.html").read_text()
    assert {path.name for path in (out / "encoder").iterdir()} == {"model.safetensors", "config.json", "beitforge.json"}

    output, _ = (third := demo(tmp_path / "images", out)).communicate(timeout=120)
    assert third.returncode == 0, output
    assert "./launch.sh pretrain" not in output


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_labelled_sets_are_given_where_images_have_classes(tmp_path, labels):
    write_images(tmp_path / "images", 20, 2)
    where = [str(tmp_path / "images"), str(tmp_path / "shards"), "--split", "test=0.3", "--labels", labels]
    command = [sys.executable, "-m", "beitforge", "pack", *where, "--workers", "1"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    settings = stage._settings(tmp_path, [])
    labelled = [
        f"data.labelled_{name}={tmp_path}/shards/{part}" for name, part in (("images", "train"), ("test", "test"))
    ]
    assert [setting for setting in settings if setting.startswith("data.labelled")] == (
        labelled if labels == "auto" else []
    )
    assert f"data.heldout_images={tmp_path}/shards/test" in settings


@pytest.mark.parametrize("kind", ["missing", "empty", "other"])
def test_a_wrong_folder_is_one_line(tmp_path, kind):
    images, out = tmp_path / "images", tmp_path / "out"
    if kind != "missing":
        images.mkdir()
    if kind == "other":
        out.mkdir()
        (out / "pictures.txt").write_text("/somewhere/else\n")
    process = demo(images, out)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "error: " in output
