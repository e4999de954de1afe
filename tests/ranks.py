"""Runs `python -m MODULE …` as one process or as several that meet, without the seconds that their imports take.

For tests of what ranks do; those of how ranks are started use `./launch.sh` and torchrun themselves.
"""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def places(count: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of `count` processes of this host; nothing for one process alone."""
    if count == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class Server:
    """tests.rank_server, started by the first job of this process. codes: exit codes of ended jobs by process id."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.rank_server"]
        # without it torch would look for GPUs in a way that forks do not survive
        environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        atexit.register(self.close)
        self._pending = b""
        self._started: list[int] = []
        self.codes: dict[int, int] = {}

    def close(self) -> None:
        """End it, and with it every job that still runs."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, words: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> int:
        """Start `python -m words` in the checkout and return its process id."""
        job = {"words": words, "environment": environment, "folder": str(ROOT)}
        job |= {"stdout": str(stdout), "stderr": str(stderr)}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        while not self._started:
            self._read(60)
        return self._started.pop()

    def wait(self, pid: int, seconds: float) -> int | None:
        """The exit code of a process, or None if it still runs after so long."""
        end = time.monotonic() + seconds
        while pid not in self.codes and (left := end - time.monotonic()) > 0:
            self._read(left)
        return self.codes.get(pid)

    def _read(self, seconds: float) -> None:
        """Take in what the server has said; waits for it for at most `seconds`."""
        stdout = self._process.stdout
        if not select.select([stdout], [], [], seconds)[0]:
            return
        text = stdout.read(65536)
        assert text, "tests.rank_server has ended"
        *lines, self._pending = (self._pending + text).split(b"\n")
        for said in [json.loads(line) for line in lines if line.startswith(b"{")]:  # DeepSpeed logs to stdout, too
            if "started" in said:
                self.codes.pop(said["started"], None)  # of an ended process that had the same id
                self._started.append(said["started"])
            else:
                self.codes[said["ended"]] = said["code"]


server = functools.cache(Server)


def run_each(
    jobs: Sequence[tuple[Sequence[object], Mapping[str, str]]],
    seconds: float = 240,
    grace: float = 15,
) -> list[subprocess.CompletedProcess]:
    """Run processes at once, each with words of its own and variables on top of this process's, until all have ended.

    Where one has failed the others are killed `grace` seconds later, as by a launcher. Raises AssertionError with what
    they said after `seconds`.
    """
    base = {name: value for name, value in os.environ.items() if name not in _PLACE}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(len(jobs))]
        pids = [
            server().start([str(word) for word in words], {**base, **variables}, *output)
            for (words, variables), output in zip(jobs, outputs, strict=True)
        ]
        end, failed = time.monotonic() + seconds, False
        codes: dict[int, int | None] = dict.fromkeys(pids)
        while None in codes.values() and time.monotonic() < end:
            waiting = next(pid for pid, code in codes.items() if code is None)
            server().wait(waiting, 0.1)
            codes = {pid: server().codes.get(pid) for pid in pids}
            if any(codes.values()) and not failed:
                end, failed = min(end, time.monotonic() + grace), True
        for pid in [pid for pid, code in codes.items() if code is None]:
            os.killpg(pid, signal.SIGKILL)
            codes[pid] = server().wait(pid, 30)
        texts = [(stdout.read_text(), stderr.read_text()) for stdout, stderr in outputs]
        assert failed or time.monotonic() < end, f"not ended after {seconds} s: {texts}"
        return [
            subprocess.CompletedProcess(words, codes[pid], *text)
            for (words, _), pid, text in zip(jobs, pids, texts, strict=True)
        ]


def run_ranks(
    *words: object, processes: int = 1, environment: Mapping[str, str] | None = None, seconds: float = 240
) -> subprocess.CompletedProcess:
    """Run `python -m words` as `processes` ranks; the first exit code that is not 0, what all have said, by rank."""
    every = run_each([(words, {**(environment or {}), **place}) for place in places(processes)], seconds)
    code = next((one.returncode for one in every if one.returncode), 0)
    stdout, stderr = ("".join(getattr(one, name) for one in every) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, code, stdout, stderr)
