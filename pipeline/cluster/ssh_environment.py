"""The environment that DeepSpeed's launcher takes along to other hosts over ssh.

By itself it carries PYTHON*, MLFLOW*, MV2*, UCX* and, where the machine it is called on has NVIDIA GPUs, NCCL*; the
rest through files of NAME=VALUE lines, ~/.deepspeed_env and ./.deepspeed_env or what DS_ENV_FILE names. Here such a
file is made for each start: first what matters of this environment, then the user's own lines, which win.
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from beitforge.pipeline.cluster.signals import OVER_SSH
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import plain, shown
from beitforge.pipeline.reading import read_text

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
# what DeepSpeed takes along whatever the file says, quoted by halves
_DEEPSPEEDS = ("PYTHON", "MLFLOW", "MV2", "UCX", "NCCL")
_PREFIXES += ("MLFLOW", "MV2", "UCX", "NCCL")
# Command lines are seen by everyone on a host; and each host has a file and devices of its own.
_NEVER = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$|^DS_ENV_FILE$")
_QUOTED_BY_DEEPSPEED = re.compile(r"[^\w@%+=:,./-]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FILE = ".deepspeed_env"


def forwarded_lines(environment: Mapping[str, str], own: list[str]) -> list[str]:
    """NAME=VALUE lines of the file for DeepSpeed: the environment's, then the user's `own`.

    DeepSpeed stops at a blank line; own lines that are blank or begin with # are left out. Every value arrives as it
    is: no shell on the way takes anything in it for a command. Raises ConfigError for a value that is not one line, and
    for an own line that is no NAME=VALUE.
    """
    wanted = {name: plain(value, f"{name} in the environment") for name, value in environment.items() if _travels(name)}
    carried = [f"{name}={_quoted(value)}" for name, value in sorted(wanted.items())]
    for line in own:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = plain(line, f"a line of {_FILE}").partition("=")
        if not _NAME.fullmatch(name.strip()) or "=" not in line:
            raise ConfigError(f"{_FILE} holds {shown(line.strip())}; every line must be NAME=VALUE")
        carried.append(f"{name.strip()}={_quoted(value.strip())}")
    return [*carried, f"{OVER_SSH}=1"]


def user_lines(environment: Mapping[str, str]) -> list[str]:
    """The user's lines, from where DeepSpeed would have read them."""
    name = environment.get("DS_ENV_FILE", _FILE)
    found: list[str] = []
    for folder in dict.fromkeys([Path.home(), Path.cwd()]):
        path = folder / name
        if path.exists():
            try:
                found += [line for line in read_text(path).replace("\r\n", "\n").split("\n") if line]
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} cannot be read as text: {error}") from error
        if os.path.isabs(name):
            break
    return found


def without_leaks(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for DeepSpeed's launcher, without what it would put on command lines and must not: secrets, and
    names that a shell would take for more than a name."""
    return {name: value for name, value in environment.items() if _travels(name) or not name.startswith(_DEEPSPEEDS)}


def remote_words(words: list[str]) -> list[str]:
    """Words for a program that DeepSpeed starts over ssh, each quoted so that it arrives as it is.

    pdsh replaces %h, %n and %u, and the shell of the far host takes the line apart. DeepSpeed puts double quotes around
    words with a space and escapes double quotes in them, nothing else; other words it leaves alone.
    """
    found = []
    for word in words:
        word = word.replace("%", "%%")
        found.append(re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word))
    return found


def _travels(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and (name in _NAMES or name.startswith(_PREFIXES)) and not _NEVER.search(name)


def _quoted(value: str) -> str:
    """So that the shell at the far end sees `value`. DeepSpeed puts quotes around it and escapes nothing in them, and
    pdsh replaces %h, %n and %u."""
    value = value.replace("%", "%%")
    return re.sub(r'([\\"$`])', r"\\\1", value) if _QUOTED_BY_DEEPSPEED.search(value) else value
