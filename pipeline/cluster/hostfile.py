"""Where ranks run: the hosts of HOSTFILE, or the processes of this machine, and the port they meet at."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import host_name, plain, shown, whole_number
from beitforge.pipeline.reading import read_text

_MOST = 1_000_000  # processes

_SLOT = re.compile(r"(\S+)\s+slots=([0-9]{1,6})(?:\s.*)?")  # as DeepSpeed reads it


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host, in order. Raises ConfigError for a file that cannot be read or says anything else."""
    try:
        text = read_text(Path(plain(path, "HOSTFILE")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"HOSTFILE={path} cannot be read: {error}") from error
    slots: dict[str, int] = {}
    for line in map(str.strip, text.replace("\t", " ").replace("\r\n", "\n").split("\n")):
        if not plain(line, f"HOSTFILE={path}: a line") or line.startswith("#"):
            continue
        found = _SLOT.fullmatch(line)
        if not found or found[1] in slots or int(found[2]) < 1:
            said = shown(line)
            raise ConfigError(f"HOSTFILE={path} holds {said}; every line must be HOST slots=COUNT, each host once")
        slots[host_name(found[1], f"HOSTFILE={path}: a host")] = int(found[2])
    if not slots:
        raise ConfigError(f"HOSTFILE={path} names no host; write HOST slots=COUNT, one a line")
    return slots


@functools.cache
def num_gpus() -> int:
    """Of this machine, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def processes_here() -> int:
    """NPROC, or one per GPU, or 2. Raises ConfigError when NPROC is no count."""
    text = os.environ.get("NPROC", "")
    return whole_number(text, "NPROC", 1, _MOST) if text else num_gpus() or 2


def meeting_port() -> int:
    """MASTER_PORT, or one that two runs on one machine do not have in common."""
    text = os.environ.get("MASTER_PORT", "")
    return whole_number(text, "MASTER_PORT", 1, 65535) if text else 20000 + os.getpid() % 10000
