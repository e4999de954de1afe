"""What `doctor` asks of a host itself: versions, code and config, clock, name, port, signals, limits, shared memory.

`python -m beitforge.pipeline.doctor.host CONFIG PORT [section.key=value …]` prints the facts of a host as JSON, over
ssh before any rank is started; `compare_hosts` finds what differs between hosts. Must not know torch: it starts fast.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import beitforge
from beitforge.__main__ import forget_working_folder
from beitforge.pipeline.cluster.environment import RankInfo, under_srun
from beitforge.pipeline.config.loading import load_config, to_yaml
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import program_name
from beitforge.pipeline.doctor.findings import HOSTS, MARK, OK, STOP, WARNING, Finding, Local

_PACKAGES = ("torch", "deepspeed", "triton", "numpy", "safetensors", "webdataset")
_STOPPING = ("torch", "deepspeed", "triton", "code", "config")  # where they differ; other differences are warnings
_CLOCK_WARNING, _CLOCK_STOP = 2.0, 300.0  # seconds; munge and S3 refuse requests beyond about five minutes
_SHM_RANK = 64 << 20  # bytes of /dev/shm a rank should find: NCCL keeps its channels to its neighbours there
_FILES = 4096
_SOURCES = Path(beitforge.__file__).parent


def facts(config: Config) -> dict[str, str]:
    """What must be the same on every host, by name."""
    found = {"python": platform.python_version(), "code": code_digest(), "driver": driver()}
    found["config"] = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]
    for name in _PACKAGES:
        found[name] = "none"
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest() -> str:
    """Of the project's own sources, 12 hex digits."""
    digest = hashlib.sha256()
    for package in ("kernels", "pipeline", "shards"):
        for path in sorted((_SOURCES / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_SOURCES)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def driver() -> str:
    """NVIDIA's, and the kinds of GPU; none without."""
    rows = nvidia_smi("driver_version,name")
    return ", ".join(sorted({" ".join(row) for row in rows})) or "none"


def nvidia_smi(fields: str) -> list[list[str]]:
    """A row of texts per GPU, of the named fields; [] where nobody tells."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=15)
    except subprocess.TimeoutExpired:
        return []
    return (
        [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()] if not done.returncode else []
    )


def compare_hosts(by_host: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Findings for whatever is not the same on all hosts: those in the minority are named; of two, the second."""
    found: list[Finding] = []
    hosts = list(by_host)
    for name in by_host[hosts[0]] if hosts else ():
        values = {host: by_host[host].get(name, "none") for host in hosts}
        usual = Counter(values.values()).most_common(1)[0][0]  # of equally many the first host's
        for host in (host for host in hosts if values[host] != usual):
            others = [other for other in hosts if values[other] == usual]
            what = f"{name} is {values[host]} here and {usual} on {', '.join(others[:3])}"
            level = STOP if name in _STOPPING else WARNING
            found.append(Finding(level=level, check="versions", host=host, what=what, cure=_cure(name)))
    return found


def _cure(name: str) -> str:
    if name == "code":
        return "give every host the same checkout (one shared file system, or the same commit without local changes)"
    if name == "config":
        return "give every host the same config file at the same path"
    if name == "driver":
        return "take one kind of node, or let the drivers be brought to one version"
    return f"install the same {name} on every host, or share one environment between them"


def clocks(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """offsets: by host, seconds that its clock is ahead of the first host's, and how far off that may be."""
    found = []
    for host, (ahead, unsure) in offsets.items():
        off = max(0.0, abs(ahead) - unsure)
        level = STOP if off > _CLOCK_STOP else WARNING if off > _CLOCK_WARNING else OK
        what = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the first host's"
        cure = "set it by NTP (chronyc makestep): logs cannot be compared; munge and S3 refuse when it is minutes"
        found.append(Finding(level=level, check="clock", host=host, what=what, cure=cure if level != OK else ""))
    return found


def own_address(several_hosts: bool, gloo: bool, environment: Mapping[str, str], local: Local) -> None:
    """The address that this host's name stands for, which gloo (not NCCL) tells the other hosts."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        level = STOP if several_hosts and gloo else WARNING
        local.add(
            level, "host name", f"its name {name} has no address ({error})", f"add `ADDRESS {name}` to /etc/hosts"
        )
        return
    if not address.startswith("127.") or not several_hosts:
        local.add(OK, "host name", f"{name} is {address}")
        return
    harmless = "GLOO_SOCKET_IFNAME" in environment or not gloo
    cure = f"give {name} its real address in /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface between the hosts"
    what = f"its own name {name} stands for {address}, which other hosts cannot reach (gloo tells them this address)"
    local.add(WARNING if harmless else STOP, "host name", what, cure)


def port_in_use(port: int) -> str:
    """Who has a TCP port of this host, or '' when it is free."""
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return _holder(port) or str(error)
    return ""


def _holder(port: int) -> str:
    """Name and id of the process that listens on a port, as far as /proc shows it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                words = line.split()
                if int(words[1].rpartition(":")[2], 16) == port and words[3] == "0A":
                    inodes.add(f"socket:[{words[9]}]")
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) in inodes:
                process = descriptor.parents[1]
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return ""


def port_taken(port: int, holder: str, local: Local) -> None:
    """The finding of a port that is not free on the host where all ranks meet."""
    cure = "end that process, or choose another with MASTER_PORT=NUMBER"
    local.add(STOP, "port", f"port {port}, where the ranks meet, is in use by {holder}", cure, whole_host=True)


def shared_memory(ranks: int, gpus: bool, local: Local, folder: str = "/dev/shm") -> None:
    """Checks that /dev/shm has room for this many ranks."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        local.add(WARNING, "shm", f"{folder}: {error.strerror}", "mount a tmpfs there", whole_host=True)
        return
    value = f"{free / 2**30:.1f} GiB" if free >= 2**30 else f"{free / 2**20:.0f} MiB"
    needed = _SHM_RANK * ranks
    if free >= needed:
        local.add(OK, "shm", f"{value} free in {folder}", value=value, whole_host=True)
        return
    cure = "make it larger: mount -o remount,size=8G /dev/shm; in a container --shm-size=8g or --ipc=host"
    what = f"only {value} free in {folder}; {ranks} ranks want {needed >> 20} MiB (NCCL's channels lie there)"
    local.add(STOP if gpus else WARNING, "shm", what, cure, whole_host=True)


def limits(environment: Mapping[str, str], local: Local) -> None:
    """Open files; and memory that can be locked, which InfiniBand needs."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < _FILES:
        cure = f"raise it: ulimit -n {_FILES * 16}, for SLURM's daemons and sshd, too"
        local.add(WARNING, "limits", f"only {hard} open files are allowed", cure, whole_host=True)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        cure = "ulimit -l unlimited, for SLURM's daemons and sshd, too"
        local.add(WARNING, "limits", f"only {locked >> 10} KiB may be locked in memory; InfiniBand needs more", cure)
    local.add(OK, "limits", f"{files} open files", whole_host=True)


class Arrivals:
    """Counts the SIGUSR1 that reach this process; made before torch is imported."""

    def __init__(self) -> None:
        self.count = 0
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

    def _on_signal(self, _: int, __: object) -> None:
        self.count += 1

    def wait(self, count: int, seconds: float) -> bool:
        """Whether `count` have arrived within `seconds`."""
        until = time.monotonic() + seconds
        while self.count < count and time.monotonic() < until:
            time.sleep(0.05)
        return self.count >= count


def own_signals(arrivals: Arrivals, environment: Mapping[str, str], local: Local) -> None:
    """SIGUSR1 and SIGTERM are neither blocked, nor stopped by a process between this one and what sends them."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    names = [s.name for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT) if s in blocked]
    if names:
        cure = "start the ranks from a process that does not block them: they could not be told to save"
        local.add(STOP, "signals", f"{', '.join(names)} blocked by whatever started this process", cure)
        return
    before = arrivals.count
    os.kill(os.getpid(), signal.SIGUSR1)
    if not arrivals.wait(before + 1, 2.0):
        local.add(STOP, "signals", "a SIGUSR1 to itself did not arrive", "see what changes its handlers")
    parent = _comm(os.getppid())
    if started_by_srun(environment) and not parent.startswith("slurmstepd"):
        cure = f"let srun start python itself (exec), as the script of `{program_name()} slurm` does"
        local.add(WARNING, "signals", f"{parent} stands between srun and this rank: SLURM's signals end there", cure)


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """And not by another launcher inside a step."""
    return under_srun(environment) and "RANK" not in environment


def signal_step(environment: Mapping[str, str]) -> str:
    """Have SLURM send SIGUSR1 to every task of this step, as its time limit does; why it cannot, or ''."""
    step = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    if shutil.which("scancel") is None:
        return "there is no scancel here"
    try:
        done = subprocess.run(["scancel", "-s", "USR1", step], capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return "scancel does not answer"
    return " ".join(done.stderr.split())


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def host_label(environment: Mapping[str, str], place: RankInfo) -> str:
    """What this host is called in the report: as in HOSTFILE, or by its own name."""
    known = hosts_by_rank(environment, place.size) if HOSTS in environment else []
    return known[place.rank] if place.rank < len(known) else socket.gethostname()


def hosts_by_rank(environment: Mapping[str, str], size: int) -> list[str]:
    """Where each rank should be, by what the launcher or SLURM says; '' where nobody does."""
    said = environment.get(HOSTS, "")
    if said:
        pairs = [pair.rpartition("=") for pair in said.split(",")]
        return [host for host, _, count in pairs for _ in range(int(count))]
    if not started_by_srun(environment) or shutil.which("scontrol") is None:
        return [socket.gethostname() if size == 1 else ""] * size
    command = ["scontrol", "show", "hostnames", environment.get("SLURM_STEP_NODELIST", "")]
    with contextlib.suppress(subprocess.TimeoutExpired):
        names = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.split()
        found = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        counts = [int(count) for count, times in found for _ in range(int(times or 1))]
        if len(counts) == len(names) and sum(counts) == size:
            return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    return [""] * size


def main() -> None:
    """The facts of this host, one line of JSON."""
    path, port, *overrides = sys.argv[1:]
    local = Local(socket.gethostname())
    own_address(True, not nvidia_smi("name"), os.environ, local)
    said = {"facts": facts(load_config(path, overrides)), "holder": port_in_use(int(port)) if int(port) else ""}
    found = [asdict(finding) for finding in local.found]
    print(MARK + json.dumps({**said, "found": found, "time": time.time()}), flush=True)


if __name__ == "__main__":
    forget_working_folder()
    main()
