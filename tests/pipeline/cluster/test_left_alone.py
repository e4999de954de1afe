"""What the others say when a process of a training ends: one line each: who, where, what they were at."""

import contextlib
import errno
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from beitforge.pipeline.cluster.error_reporting import user_message
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.shards.errors import about_file
from tests.ranks import places, run_ranks, server

HOST = os.uname().nodename
LONG = ["train.duration=100000 steps", "log.every_steps=1", "data.heldout_images=", "data.heldout_tokens="]


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def left(tiny, tmp_path: Path, *words: str, victim: str) -> list[tuple[int | None, str]]:
    """Exit code and stderr of three ranks of which one, or a loader worker of one, was killed in training."""
    run, pids = tmp_path / "run", []
    command = ["beitforge", "pretrain", "--rank", str(tiny.config), f"train.run={run}", "train.global_batch=12"]
    for rank, place in enumerate(places(3)):
        outputs = (tmp_path / f"{rank}.out", tmp_path / f"{rank}.err")
        pids.append(server().start([*command, *LONG, *words], {**os.environ, **place}, *outputs))
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run, "train")) < 3:
            assert time.monotonic() < end, [path.read_text() for path in tmp_path.glob("*.err")]
            time.sleep(0.05)
        rank = int(victim[-1])
        os.kill(pids[rank] if victim.startswith("rank") else children(pids[rank])[0], signal.SIGKILL)
        codes = [server().wait(pid, 60) for pid in pids]
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if server().codes.get(pid) is None:
                    os.killpg(pid, signal.SIGKILL)
    return [(code, (tmp_path / f"{rank}.err").read_text()) for rank, code in enumerate(codes)]


@pytest.mark.parametrize("victim", ["rank 0", "rank 2", "worker of 1"])
def test_a_killed_process_is_one_line_of_each_rank_that_is_left(tiny, tmp_path, victim):
    workers = ["loader.workers=1"] if victim.startswith("worker") else []
    for rank, (code, said) in enumerate(left(tiny, tmp_path, *workers, victim=victim)):
        if victim == f"rank {rank}":
            continue
        assert code == 1, said
        lines = [line for line in said.replace("\r", "\n").splitlines() if "Traceback" in line or "frame #" in line]
        assert lines == [], said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: rank {rank} on {HOST}: ") and " step " in line, line
        assert ("loader worker " in line) == (victim == f"worker of {rank}"), line
        assert line.endswith("start the same command again to resume")


def test_a_port_that_is_taken_is_one_line(tiny, tmp_path):
    """Another job's: the first rank names the port, and what never answers as a rank would is said by the other."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "WORLD_SIZE": "2"}
        environment |= {"LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        command = ("beitforge", "pretrain", "--rank", tiny.config, f"train.run={tmp_path}/run")
        done = run_ranks(*command, environment=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"MASTER_PORT {environment['MASTER_PORT']} on {HOST} is in use" in line


def test_an_error_of_a_full_disk_names_the_file(tmp_path):
    """A write knows only its descriptor; a file that takes no byte stands in for a disk without room."""
    with (
        pytest.raises(OSError, match="No space left") as caught,
        about_file(tmp_path / "metrics.jsonl"),
        open("/dev/full", "w", encoding="utf-8", buffering=1) as file,
    ):
        file.write("line\n")
    assert caught.value.errno == errno.ENOSPC and user_message(caught.value).startswith(f"{tmp_path}/metrics.jsonl: ")
