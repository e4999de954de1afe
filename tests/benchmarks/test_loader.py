"""The benchmark of loaders: each path shows the views it was given, and a peer that fails costs its own row alone."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import loader, loader_child, loader_corpus
from benchmarks.data.loader_child import PeerFailed, environment, start
from benchmarks.data.loader_peers.given import read_given
from tests.conftest import ROOT

PATHS = {path.path: path for path in loader.timed_paths()}


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The given views of a small corpus."""
    where = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_corpus, "FOLDER", where)
        return loader.given_views(loader_corpus.corpus(70))


def alive(session: int) -> list[str]:
    """The states of a session's processes that have not ended."""
    states = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = file.read_text().rpartition(")")[2].split()
            states += [words[0]] if int(words[3]) == session and words[0] != "Z" else []
    return states


@pytest.mark.parametrize("name", [loader.OURS, "webdataset, Pillow"])
def test_a_path_shows_the_given_views(views, name):
    path = PATHS[name]
    given = read_given(views)
    path.child = start(path.module, path.variant, environment(""), views, "any")
    try:
        found = loader.quality(path, given)
        assert found == "equal" if name != loader.OURS else float(found) > 55
        pixels, numbers = path.child.shown
        assert len(set(numbers[:70].tolist())) > 60, "images in an order of all of them"
        spent = path.child.ask("1 1\n")
        assert 0 < spent["cpu"] < 60 and spent["wall"] > 0
        path.child.shown = pixels[..., ::-1], numbers  # mirrored
        path.exact = False
        with pytest.raises(PeerFailed, match="wrong"):
            loader.quality(path, given)
    finally:
        path.child.end()
    deadline = time.monotonic() + 20
    while alive(path.child.process.pid):
        assert time.monotonic() < deadline, "its worker goes on"
        time.sleep(0.05)


def test_a_peer_that_fails_costs_its_row_alone(views, monkeypatch, tmp_path):
    """Of a peer that does not start, of one that is not installed and of one that does not install."""
    with pytest.raises(PeerFailed, match="no_such_loader"):
        start("no_such_loader", "x", environment(""), views, "any")
    monkeypatch.setattr(loader_child, "ROOT", tmp_path)
    (tmp_path / ".venv-ffcv").mkdir()
    (tmp_path / ".venv-ffcv" / "failed").write_text("")
    paths = [PATHS["FFCV"], PATHS["tf.data, fast"]]
    with loader.running(paths, views, read_given(views), "any") as started:
        assert started == []
        loader.measure(paths, 1)
    rows = [loader.row(path) for path in paths]
    assert [row["PSNR dB"] for row in rows] == [
        "does not install here",
        "not installed (./launch.sh setup loader_peers)",
    ]
    assert [row["CPU µs an image"] for row in rows] == ["", ""]
    assert set(rows[0]) == set(loader.row(PATHS[loader.BARE])), "the same columns"


def test_ratios_are_of_what_was_measured_in_turn():
    one, other = loader.Timed(loader.OURS, "", "", ""), loader.Timed("x", "", "", "")
    one.micros, other.micros = [100.0, 200.0, 100.0], [150.0, 320.0, 140.0]
    assert loader.ratios([one, other, PATHS["FFCV"]]) == {"ours / x": 1.5}


def test_environments_are_made_or_said_not_to_install(tmp_path):
    pins = tmp_path / "benchmarks" / "data" / "loader_peers" / "pins"
    for folder in (pins, tmp_path / "src" / "beitforge" / "pipeline"):
        folder.mkdir(parents=True)
    (tmp_path / "launch.sh").write_bytes((ROOT / "launch.sh").read_bytes())
    (pins / "good.txt").write_text("# over the project's environment\n")
    (pins / "lacking.txt").write_text(f"# alone\n{tmp_path}/lacking-1.0-py3-none-any.whl\n")
    command = ["bash", str(tmp_path / "launch.sh"), "setup", "loader_peers"]
    surroundings = {**os.environ, "BEITFORGE_PYTHON": sys.executable}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "lacking does not install here" in done.stderr
    assert not (tmp_path / ".venv-lacking" / "made-from").exists()
    assert (tmp_path / ".venv-lacking" / "failed").exists()
    probe = "import numpy; print(numpy.__version__)"
    found = subprocess.run([tmp_path / ".venv-good" / "bin" / "python", "-c", probe], capture_output=True, text=True)
    assert found.stdout.strip() == np.__version__, "over the project's environment"
