"""Where ranks run: the hosts of HOSTFILE, or the processes of this machine, and the port they meet at."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from beitforge.pipeline.errors import ConfigError

_SLOT = re.compile(r"(\S+)\s+slots=(\d+)(?:\s.*)?")  # as DeepSpeed reads it


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host, in order. Raises ConfigError for a file that cannot be read or says anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"HOSTFILE={path} cannot be read: {error}") from error
    slots: dict[str, int] = {}
    for line in map(str.strip, text.splitlines()):
        found = _SLOT.fullmatch(line)
        if not line or line.startswith("#"):
            continue
        if not found or found[1] in slots or int(found[2]) < 1:
            raise ConfigError(f"HOSTFILE={path} holds {line!r}; every line must be HOST slots=COUNT, each host once")
        slots[found[1]] = int(found[2])
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
    if text and (not text.isdecimal() or int(text) < 1):
        raise ConfigError(f"NPROC is {text!r}; it must be a number of processes, at least 1")
    return int(text) if text else num_gpus() or 2


def meeting_port() -> int:
    """MASTER_PORT, or one that two runs on one machine do not have in common."""
    text = os.environ.get("MASTER_PORT", "")
    if text and not text.isdecimal():
        raise ConfigError(f"MASTER_PORT is {text!r} in the environment; it must be a whole number, or unset")
    return int(text) if text else 20000 + os.getpid() % 10000
