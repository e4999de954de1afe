"""Where a process stands among all, and where they meet: read from the environment alone, never guessed.

The environment comes in as an argument. deepspeed's and torchrun's launchers say RANK and the rest; what a user sets
wins; under srun it follows from SLURM's own variables; else the process is alone. Must not know torch.
"""

import contextlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from beitforge.pipeline.errors import ConfigError, HostError
from beitforge.pipeline.plain_text import address as checked_address
from beitforge.pipeline.plain_text import whole_number

_PORTS = range(12000, 32000)  # below what Linux gives away for outgoing connections
_STEPS_OF_SLURM = 0xFFFFFFF0  # from here on SLURM numbers what is no srun: the batch script, an interactive shell
_FIRST_OF = re.compile(r"\[([^],-]+)[^]]*\]")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One process. `local_size`: processes on its host; `threads`: CPU cores that are its own, 0 if nobody says."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    threads: int


def under_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, or one above it."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _STEPS_OF_SLURM and "SLURM_PROCID" in environment


def rank_of(environment: Mapping[str, str]) -> int:
    """This process's rank, 0 when it is alone."""
    return _number(environment, "RANK", _number(environment, "SLURM_PROCID", 0) if under_srun(environment) else 0)


def rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Raises ConfigError when a variable is no number, or RANK and WORLD_SIZE contradict each other."""
    step = under_srun(environment) and "RANK" not in environment
    size = _number(environment, "WORLD_SIZE", _tasks(environment) if step else 1)
    local = _number(environment, "SLURM_LOCALID", 0) if step else 0
    rank = rank_of(environment)
    if rank >= size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}; a launcher sets both, or unset RANK to run alone")
    threads = _number(environment, "OMP_NUM_THREADS", _number(environment, "SLURM_CPUS_PER_TASK", 0) if step else 0)
    return RankInfo(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", local),
        local_size=_local_size(environment, step, size),
        threads=threads,
    )


def rendezvous_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables torch and DeepSpeed read to find this process's place and the address to meet at.

    Raises ConfigError when several processes would not meet.
    """
    place = rank_info(environment)
    step = under_srun(environment) and "RANK" not in environment
    address, port = environment.get("MASTER_ADDR", ""), _number(environment, "MASTER_PORT", 0)
    if place.size > 1 and step:
        address, port = address or _first_host(environment), port or _step_port(environment)
    elif place.size > 1 and not (address and port):
        raise ConfigError(
            f"WORLD_SIZE is {place.size}, but MASTER_ADDR and MASTER_PORT are not both set; a launcher sets them"
        )
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "MASTER_ADDR": checked_address(address or "127.0.0.1", "MASTER_ADDR"),
        "MASTER_PORT": str(port or _free_port()),
    }


def refuse_loopback_name(place: RankInfo, environment: Mapping[str, str]) -> None:
    """gloo tells other hosts the address that this host's name has. Debian's /etc/hosts says 127.0.1.1.

    Raises HostError where others could not reach this host. NCCL does not ask for the name.
    """
    if place.size == place.local_size or "GLOO_SOCKET_IFNAME" in environment:
        return
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if address.startswith("127."):
            raise HostError(
                f"the name of host {name} stands for {address}, which other hosts cannot reach; fix its /etc/hosts, "
                f"or set GLOO_SOCKET_IFNAME to the network interface between the hosts"
            )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return whole_number(text, name) if text else default


def _tasks(environment: Mapping[str, str]) -> int:
    """Of this srun; the job may have room for more."""
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))


def _first_host(environment: Mapping[str, str]) -> str:
    """The host of task 0. `scontrol show hostnames` would tell, but a container need not have it."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return first_host(nodes)


def first_host(nodes: str) -> str:
    """The first of SLURM's short list of hosts: node[07-12,15],login → node07. Raises ConfigError for an empty one."""
    first = _FIRST_OF.sub(r"\1", nodes.strip()).partition(",")[0]
    if not first:
        raise ConfigError("SLURM's list of nodes is empty (SLURM_STEP_NODELIST); set MASTER_ADDR to the first host")
    return first


def _step_port(environment: Mapping[str, str]) -> int:
    """The same on every host of a step, another for the next step and for the next job."""
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    return _PORTS[(job + 4099 * step) % len(_PORTS)]


def _local_size(environment: Mapping[str, str], step: bool, size: int) -> int:
    """torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE, SLURM 2(x3),1 for three hosts of two and one of one."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in environment:
            return _number(environment, name, size)
    if not step:
        return size
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        counts += [int(found[1])] * int(found[2] or 1) if found else []
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else size


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
