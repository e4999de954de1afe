"""The lab from a test's side: bring it up, run commands on its hosts, look at its processes and jobs, kill them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

UP = Path(__file__).parent / "lab" / "up.sh"
NEEDED = ("sbatch", "srun", "slurmctld", "slurmd", "munged", "pdsh", "sshd", "ip", "unshare", "nsenter", "pkill")
_NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
_FREEZER = Path("/sys/fs/cgroup/freezer")
_SYSTEM_PATH = "/usr/sbin:/sbin"


def missing() -> str:
    """Why the lab cannot be had for want of packages or rights, or ''."""
    if os.geteuid():
        return "the lab needs root"
    lacking = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:{_SYSTEM_PATH}") is None]
    return f"not installed: {', '.join(lacking)} (tests/cluster/install.sh)" if lacking else ""


def forbidden() -> str:
    """Why namespaces, or a bridge inside one, cannot be made here, or ''."""
    tried = ["ip link add br0 type bridge", "ip link add veth0 type veth peer name veth1", "mount -t tmpfs tmpfs /run"]
    command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-ec", "; ".join(tried)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return f"namespaces are forbidden here: {done.stderr.strip()}" if done.returncode else ""


@dataclass(frozen=True)
class Process:
    """A process of the lab, by its id outside."""

    pid: int
    command: str
    environment: dict[str, str]
    parent: int

    @property
    def rank(self) -> int:
        """Of a training process; -1 for what has none."""
        if " --rank" not in self.command:
            return -1
        return int(self.environment.get("RANK", self.environment.get("SLURM_PROCID", "-1")))


class Cluster:
    """Hosts head, node1, node2, … with SLURM over them."""

    def __init__(self, hosts: int = 2, proctrack: str = "", slurmd_timeout: int = 30):
        """`proctrack`: linuxproc or cgroup; empty: cgroup where this machine lets us."""
        self.python = sys.executable
        self.folder = Path(tempfile.mkdtemp(prefix="lab."))
        self.proctrack = proctrack or ("cgroup" if os.access(_FREEZER, os.W_OK) else "linuxproc")
        environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{_SYSTEM_PATH}"}
        environment |= {"PROCTRACK": self.proctrack, "SLURMD_TIMEOUT": str(slurmd_timeout)}
        command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", UP, self.folder, str(hosts)]
        with open(self.folder / "up.log", "w", encoding="utf-8") as log:
            pipe = subprocess.PIPE
            self._unshare = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=log, text=True)
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline().strip() != "ready":
            said = (self.folder / "up.log").read_text(encoding="utf-8")
            self.down()
            raise RuntimeError(f"the lab did not come up: {said}")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
        self._first = int(children[0])
        self._homes = {"head": self._first}
        inside = {(self.folder / f"node{n + 1}.pid").read_text().strip(): f"node{n + 1}" for n in range(hosts)}
        for process in self.processes():
            ids = re.search(r"NSpid:\s+\d+\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            if ids and ids[1] in inside:
                self._homes[inside[ids[1]]] = process.pid

    def down(self) -> None:
        """Everything in the lab ends; nothing of it stays."""
        if self._unshare.poll() is None:
            children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)  # the first process of the PID namespace: all others go with it
        self._unshare.communicate(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)
        for group in sorted(_FREEZER.glob("slurm_node*/**/"), reverse=True) if _FREEZER.exists() else ():
            with contextlib.suppress(OSError):
                group.rmdir()

    def popen(self, *words: str | Path, host: str = "head", cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
        """Start a command on a host, its output (both) in a pipe."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK"))}
        variables |= {"SLURM_CONF": str(self.folder / "slurm" / "slurm.conf"), "BEITFORGE_PYTHON": sys.executable}
        # one thread a process: two cores are shared by all ranks, and sums then do not depend on the number of cores
        variables |= {"OMP_NUM_THREADS": "1", "HOME": "/root", **environment}
        command = ["nsenter", "-t", str(self._homes[host]), *_NAMESPACES, f"--wd={cwd}", "--", *words]
        return subprocess.Popen(
            [str(word) for word in command],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, *words: str | Path, host: str = "head", code: int = 0, timeout: float = 120, cwd: Path = ROOT, **env: str
    ) -> str:
        """The output of a command that must end with `code`."""
        process = self.popen(*words, host=host, cwd=cwd, **env)
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, f"{words}: exit code {process.returncode}\n{output}"
        return output

    def processes(self) -> list[Process]:
        """Every process of the lab, daemons and all."""
        ours = os.readlink(f"/proc/{self._first}/ns/pid")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                stat = (path / "stat").read_text().rpartition(")")[2].split()
                if os.readlink(path / "ns" / "pid") != ours or stat[0] == "Z":
                    continue
                pairs = (pair.partition("=") for pair in (path / "environ").read_text(errors="replace").split("\0"))
                environment = {name: value for name, _, value in pairs}
                command = (path / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                found.append(Process(int(path.name), command, environment, int(stat[1])))
        return found

    def host_of(self, process: Process) -> str:
        network = os.readlink(f"/proc/{process.pid}/ns/net")
        return next(name for name, pid in self._homes.items() if os.readlink(f"/proc/{pid}/ns/net") == network)

    def pythons(self) -> list[Process]:
        """Whatever of ours is running: trainings, launchers, tokenizers."""
        return [process for process in self.processes() if "python" in process.command]

    def rank(self, rank: int) -> Process:
        """The training process of a rank (its loader workers have another parent)."""
        (found,) = [process for process in self.ranks() if process.rank == rank]
        return found

    def ranks(self) -> list[Process]:
        """The training processes, without their loader workers."""
        training = [process for process in self.processes() if process.rank >= 0]
        inner = {process.pid for process in training}
        return sorted((p for p in training if p.parent not in inner), key=lambda process: process.rank)

    def cut(self, host: str) -> None:
        """The host vanishes: its link goes down, so that nobody is told, then everything on it is killed."""
        gone = [process.pid for process in self.processes() if self.host_of(process) == host]
        self.run("ip", "link", "set", f"ve{host.removeprefix('node')}", "down")
        for pid in gone:
            os.kill(pid, signal.SIGKILL)

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`, field by field."""
        text = self.run("scontrol", "-o", "show", "job", number)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def ended(self, number: str, seconds: float = 120) -> dict[str, str]:
        """The job once it is over; what its log says is in the error when it is not."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.job(number)["JobState"] in over, seconds, lambda: str(self.job(number)))
        return self.job(number)


def until(condition: Callable[[], object], seconds: float, otherwise: Callable[[], str] = lambda: "") -> None:
    """Wait for a condition; a failure says what `otherwise` says."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s\n{otherwise()}"
        time.sleep(0.1)
