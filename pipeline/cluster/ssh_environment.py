"""The environment that DeepSpeed's launcher takes along to other hosts over ssh.

By itself it carries PYTHON*, MLFLOW*, MV2*, UCX* and, where the machine it is called on has NVIDIA GPUs, NCCL*; the
rest through files of NAME=VALUE lines, ~/.deepspeed_env and ./.deepspeed_env or what DS_ENV_FILE names. Here such a
file is made for each start: first what matters of this environment, then the user's own lines, which win.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from beitforge.pipeline.cluster.signals import OVER_SSH
from beitforge.pipeline.errors import ConfigError

# PATH and LD_LIBRARY_PATH: what `module load` and conda gave this shell, a session of sshd does not have.
_NAMES = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "XDG_CACHE_HOME", "CUDA_HOME", "CUDA_MODULE_LOADING", "LANG", "LC_ALL")
_PREFIXES: tuple[str, ...] = (
    "PYTHON",
    "TORCH",
    "PYTORCH_",
    "DS_",
    "DEEPSPEED_",
    "TRITON_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "NCCL_",
)
_PREFIXES += ("GLOO_", "RCCL_", "MIOPEN_", "HSA_", "FI_", "IB_", "UCX_", "HF_", "TRANSFORMERS_", "BEITFORGE_")
# Command lines are seen by everyone on a host; and each host has a file and devices of its own.
_NEVER = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$|^DS_ENV_FILE$")
_QUOTED_BY_DEEPSPEED = re.compile(r"[^\w@%+=:,./-]")
_FILE = ".deepspeed_env"


def forwarded_lines(environment: Mapping[str, str], own: list[str]) -> list[str]:
    """NAME=VALUE lines of the file for DeepSpeed: the environment's, then the user's `own`.

    DeepSpeed stops at a blank line; own lines that are blank or begin with # are left out. Values with a line break
    cannot travel. Raises ConfigError for an own line that is no NAME=VALUE.
    """
    wanted = {name: value for name, value in environment.items() if _travels(name) and "\n" not in value}
    carried = [f"{name}={_quoted(value)}" for name, value in sorted(wanted.items())]
    for line in own:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not re.match(r"\s*[A-Za-z_]\w*\s*=", line):
            raise ConfigError(f"{_FILE} holds {line.strip()!r}; every line must be NAME=VALUE")
        carried.append(line.strip())
    return [*carried, f"{OVER_SSH}=1"]


def user_lines(environment: Mapping[str, str]) -> list[str]:
    """The user's lines, from where DeepSpeed would have read them."""
    name = environment.get("DS_ENV_FILE", _FILE)
    found: list[str] = []
    for folder in dict.fromkeys([Path.home(), Path.cwd()]):
        path = folder / name
        if path.is_file():
            found += path.read_text(encoding="utf-8").splitlines()
        if os.path.isabs(name):
            break
    return found


def _travels(name: str) -> bool:
    return (name in _NAMES or name.startswith(_PREFIXES)) and not _NEVER.search(name)


def _quoted(value: str) -> str:
    """So that the shell at the far end sees `value`. DeepSpeed puts quotes around it and escapes nothing in them, and
    pdsh replaces %h, %n and %u."""
    value = value.replace("%", "%%")
    return re.sub(r'([\\"$`])', r"\\\1", value) if _QUOTED_BY_DEEPSPEED.search(value) else value
