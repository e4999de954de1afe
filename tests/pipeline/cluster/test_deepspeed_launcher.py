"""DeepSpeed's launcher, watched: how a run on this machine ends, whatever happens to whichever of its processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from beitforge.pipeline.cluster import deepspeed_launcher
from beitforge.pipeline.cluster.hostfile import read_hostfile
from beitforge.pipeline.cluster.signals import EXIT_STOPPED, read_ended
from beitforge.pipeline.cluster.ssh_environment import forwarded_lines, user_lines
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from tests.conftest import ROOT

LONG = ("train.duration=4000 steps", "checkpoint.every=4000 steps", "log.every_steps=1")
NO_HELDOUT = ("data.heldout_images=", "data.heldout_tokens=")


@dataclass(frozen=True)
class Started:
    """`./launch.sh pretrain` with two processes, and what it started."""

    process: subprocess.Popen
    run: Path

    def group(self) -> list[tuple[int, int, str]]:
        """Process id, parent and command of all that belongs to this run: its folder is in their command lines."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                command = (path / "cmdline").read_text().replace("\0", " ")
                stat = (path / "stat").read_text().rpartition(")")[2].split()
                if str(self.run) in command and stat[0] != "Z":
                    found.append((int(path.name), int(stat[1]), command))
        return found

    def ranks(self) -> list[int]:
        return sorted(pid for pid, _, command in self.group() if "-m beitforge pretrain --rank" in command)

    def reaches(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not any(line["step"] >= step for line in read_metrics(self.run, "train")):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ended(self, seconds: float = 60) -> tuple[int, str]:
        """Exit code and output; nothing that belongs to the run may be left."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def gone(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while self.group():
            assert time.monotonic() < deadline, self.group()
            time.sleep(0.1)

    def saved(self) -> int:
        found = newest(self.run, lambda _: None)
        return found[1].step if found else 0


@pytest.fixture
def started(tiny, tmp_path) -> Iterator[Started]:
    run = tmp_path / "run"
    command = [str(ROOT / "launch.sh"), "pretrain", str(tiny.config), f"train.run={run}", *LONG, *NO_HELDOUT]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    launched = Started(subprocess.Popen(command, env=environment, text=True, **pipe), run)
    launched.reaches(2)
    yield launched
    for pid, _, _ in launched.group():
        os.kill(pid, signal.SIGKILL)
    launched.process.communicate()


def test_a_stop_file_ends_it(started):
    """`./launch.sh stop RUN`: the step is finished and saved, the file is gone, the code says so."""
    words = [str(ROOT / "launch.sh"), "stop", str(started.run)]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable}
    subprocess.run(words, check=True, capture_output=True, env=environment)
    code, output = started.ended()
    assert code == EXIT_STOPPED, output
    assert read_ended(started.run) == (started.saved(), "stop file")
    assert started.saved() >= 2
    assert not (started.run / "stop").exists()
    started.gone(5)


def test_a_signal_that_comes_while_another_is_passed_on_is_not_lost(monkeypatch, tmp_path):
    watch, turns, ended = deepspeed_launcher._Launcher(tmp_path, 0, saves=True, asked=[signal.SIGTERM]), [0], []

    def children(_: list[int]) -> list[int]:
        if len(watch.asked) == 1:
            watch.asked.append(signal.SIGTERM)
        return []

    def reap(_: deepspeed_launcher._Launcher, __: int | None) -> int | None:
        turns[0] += 1
        return 0 if ended or turns[0] > 20 else None

    monkeypatch.setattr(deepspeed_launcher, "_children", children)
    monkeypatch.setattr(deepspeed_launcher, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(deepspeed_launcher._Launcher, "_reap", reap)
    monkeypatch.setattr(deepspeed_launcher._Launcher, "_end", lambda _: ended.append(True))
    watch.wait()
    assert ended == [True]


def test_a_hung_run_ends_at_the_second_signal(started):
    """A rank that is stopped never reaches the end of its step: the first signal waits for it, the second does not."""
    os.kill(started.ranks()[1], signal.SIGSTOP)
    started.process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGTERM)
    code, output = started.ended(10)
    assert code == 128 + signal.SIGTERM, output
    assert "finishing the step" in output
    started.gone(5)


@pytest.mark.parametrize(
    "victim", ["deepspeed.launcher.launch", "deepspeed.launcher.runner", r"-m beitforge pretrain (?!--rank)"]
)
def test_a_killed_launcher_is_no_success_and_leaves_nothing(started, victim):
    """Whichever of its processes is killed: the ranks save and end, and the command's code is not 0."""
    (pid,) = [pid for pid, _, command in started.group() if re.search(victim, command)]
    os.kill(pid, signal.SIGKILL)
    code, output = started.ended()
    assert code != 0, output
    started.gone()
    assert started.saved() >= 2
    assert read_ended(started.run) == (started.saved(), "the launcher is gone")


def refused(tiny, verb: str = "pretrain", **environment: str) -> str:
    """The one line of a start that is refused before anything is started."""
    words = [sys.executable, "-m", "beitforge", verb, str(tiny.config)]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NPROC": "none"}, "NPROC is 'none'"),
        ({"NPROC": "0"}, "NPROC is '0'"),
        ({"NPROC": "3"}, "train.global_batch 8 does not divide over 3 processes"),
        ({"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere cannot be read"),
    ],
    ids=str,
)
def test_a_wrong_start_is_one_line(tiny, environment, words):
    assert words in refused(tiny, **environment)


def test_hostfiles(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nn1 slots=8\n\n  n2   slots=4  # the small one\n")
    assert read_hostfile(str(path)) == {"n1": 8, "n2": 4}
    for text, words in (
        ("n1\n", "holds 'n1'"),
        ("n1 slots=2\nn1 slots=2\n", "each host once"),
        ("n1 slots=0\n", "slots=0"),
        ("# none\n", "names no host"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_hostfile(str(path))


def test_what_travels():
    """Names that matter, quoted for what they go through; nothing secret, nothing of this host alone."""
    environment = {"NCCL_DEBUG": "INFO", "GLOO_X": 'a "b" $c %h', "CUDA_VISIBLE_DEVICES": "0", "EDITOR": "vi"}
    environment |= {"HF_TOKEN": "s", "HF_HOME": "/data/hf", "OMP_NUM_THREADS": "4"}
    carried = forwarded_lines(environment, ["", "# mine", "  NCCL_DEBUG = WARN "])
    assert carried[:4] == ['GLOO_X=a \\"b\\" \\$c %%h', "HF_HOME=/data/hf", "NCCL_DEBUG=INFO", "OMP_NUM_THREADS=4"]
    assert carried[4:] == ["NCCL_DEBUG=WARN", "BEITFORGE_OVER_SSH=1"]
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        forwarded_lines({}, ["export"])


def test_the_users_own_lines(tmp_path, monkeypatch):
    """DeepSpeed's places: home and working folder, or what DS_ENV_FILE names there or by its whole path."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(f"FROM={folder.name}\n")
    (here / "other").write_text("FROM=other\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert user_lines({}) == ["FROM=home", "FROM=here"]
    assert user_lines({"DS_ENV_FILE": "other"}) == ["FROM=other"]
    assert user_lines({"DS_ENV_FILE": str(here / "other")}) == ["FROM=other"]
