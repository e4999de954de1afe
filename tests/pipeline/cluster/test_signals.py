"""Asked to stop: which signal means what, the stop file, and the word that is left for who started the run."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beitforge.pipeline.cluster import signals
from beitforge.pipeline.cluster.signals import (
    BY_FILE,
    EXIT_STOPPED,
    StopRequest,
    begin,
    exit_code,
    read_ended,
    strongest_reason,
    write_ended,
)
from tests.conftest import ROOT

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
# says its reason whenever it changes; a second signal counts after a tenth of a second
CODE = """
import sys, time
from beitforge.pipeline.cluster import signals
signals._SAME_REQUEST_SECONDS = 0.1
stop = signals.StopRequest()
stop.install()
said = None
while True:
    if stop() != said:
        said = stop()
        print(said, flush=True)
    time.sleep(0.01)
"""


def process(**environment: str) -> subprocess.Popen:
    started = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "\n"
    return started


def says(started: subprocess.Popen, number: int) -> str:
    """The reason it gives after one more signal; '' when it has ended."""
    assert started.stdout is not None
    started.send_signal(number)
    return started.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_asks_and_a_second_ends_at_once(number):
    with process() as started:
        assert says(started, number) == number.name
        time.sleep(0.2)
        started.send_signal(number)
        assert started.wait(timeout=5) == 128 + number


def test_slurm_repeats_itself_and_is_not_impatient():
    """SIGUSR1 before the time limit, SIGTERM at it: the stronger becomes the reason, the save goes on; Ctrl-C ends."""
    with process(**STEP) as started:
        assert says(started, signal.SIGUSR1) == "SIGUSR1"
        time.sleep(0.2)
        assert says(started, signal.SIGTERM) == "SIGTERM"
        time.sleep(0.2)
        started.send_signal(signal.SIGTERM)
        started.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert started.poll() is None
        started.send_signal(signal.SIGINT)
        assert started.wait(timeout=5) == 128 + signal.SIGINT


def test_the_strongest_reason_decides():
    """Ranks may have been told different things; only when none was told to end is the job put back in the queue."""
    assert strongest_reason(["", "SIGUSR1", "SIGTERM"]) == "SIGTERM"
    assert strongest_reason(["SIGTERM", BY_FILE]) == BY_FILE
    assert strongest_reason(["", "the launcher is gone"]) == "the launcher is gone"
    assert strongest_reason(["SIGUSR1", "the launcher is gone"]) == "SIGUSR1"
    assert strongest_reason(["", ""]) == ""


def test_a_stop_file_is_seen_by_the_first_rank_only(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    first, stop = StopRequest(), tmp_path / "stop"
    first.watch_folder(tmp_path)
    assert first() == ""
    stop.touch()
    assert first() == "", "it looks once a second at most"
    first._next_look = 0.0
    assert first() == BY_FILE
    monkeypatch.setenv("RANK", "1")
    second = StopRequest()
    second.watch_folder(tmp_path)
    assert second() == ""


def test_the_stop_file_costs_one_look_a_second(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    looks: list[Path] = []
    monkeypatch.setattr(Path, "exists", lambda path: bool(looks.append(path)))
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    stop.watch_folder(tmp_path)
    for _ in range(500):
        stop()
        now[0] += 0.01
    assert len(looks) == 5


def test_the_last_word(tmp_path):
    """Step and reason; a stop by the file takes the file away, another leaves it for who it is meant for."""
    assert read_ended(tmp_path) is None
    (tmp_path / "stop").touch()
    write_ended(tmp_path, 7, "SIGTERM")
    assert read_ended(tmp_path) == (7, "SIGTERM")
    assert (tmp_path / "stop").exists()
    write_ended(tmp_path, 8, BY_FILE)
    assert read_ended(tmp_path) == (8, BY_FILE)
    assert not (tmp_path / "stop").exists()
    (tmp_path / "ended").write_text("")
    assert read_ended(tmp_path) is None


def test_starting_takes_a_stop_file_back_unless_the_run_is_under_way(tmp_path):
    begin(tmp_path / "nowhere yet")
    for name in ("stop", "ended"):
        (tmp_path / name).touch()
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begin(tmp_path)
        assert (tmp_path / "stop").exists(), "it is for the run that holds the folder"
    begin(tmp_path)
    assert not (tmp_path / "stop").exists()
    assert not (tmp_path / "ended").exists()


def test_exit_codes():
    """srun kills a task's fellows when it ends with another code than 0."""
    assert exit_code(True, {}) == 0
    assert exit_code(False, {}) == EXIT_STOPPED
    assert exit_code(False, STEP) == 0
