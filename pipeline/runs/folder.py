"""The run folder: config.yaml, environment.json, bad_samples.jsonl, and the lock that keeps a second run out.

Must not know model, shards or any stage.
"""

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from beitforge.pipeline.config.derived import allowed_bad
from beitforge.pipeline.config.identity import differences
from beitforge.pipeline.config.loading import load_config, to_yaml
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.jsonl import end_cut_line, parse_line
from beitforge.shards.errors import about_file

_LOCK_SECONDS = 120
_MOST_LOCK = 4096  # characters read of it
_KNOWN_IN_WORDS = "(known since it was indexed)"
_HOLDER = "process "  # what the lock file of a run begins with
_WRITTEN = ("environment.json", "metrics.jsonl", "bad_samples.jsonl", "ranks.json", "classes.json", "checkpoints")
_PACKAGES = ("torch", "deepspeed", "triton", "webdataset", "numpy", "pillow", "safetensors")


def claim(run: Path, config: Config, sections: tuple[str, ...], world: int, job: str, device: str) -> None:
    """Write config.yaml and environment.json; refuse a folder that holds a run of another identity.

    job: what runs; device: what on, by name.
    """
    path = run / "config.yaml"
    if path.exists():
        # read as a config, so that a setting that came later has its default
        for name, old, new in differences(load_config(str(path), []), config, sections):
            raise ConfigError(
                f"{run} holds a run with {name}={old}, this config says {name}={new}; choose another run folder, or "
                f"set it back"
            )
    else:
        _refuse_strangers(run)
    run.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_yaml(config))
    write_whole(run / "environment.json", json.dumps({"job": job, **environment(world, device)}, indent=1) + "\n")


def _refuse_strangers(run: Path) -> None:
    """Raise ConfigError when a folder without config.yaml, so not a run, has files that a run would write over."""
    found = [name for name in _WRITTEN if (run / name).exists() or (run / name).is_symlink()]
    if found:
        raise ConfigError(
            f"{run} holds {found[0]} but no config.yaml, so it is no run, and what is in it stays: choose another "
            f"train.run folder, or move that away"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file by rename: whoever reads it finds the old one or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    with about_file(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def environment(world: int, device: str) -> dict:
    """Versions, host, device and command: what someone needs to see the same numbers again."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": sys.argv,
        "world": world,
        "device": device,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "versions": versions,
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@contextlib.contextmanager
def lock(run: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the run folder. Waits a while for a process that is just saving, then raises ConfigError."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        if (holder := file.read(_MOST_LOCK).strip()) and not holder.startswith(_HOLDER):
            raise ConfigError(f"{run / '.lock'} was not written by a run, so it stays: choose another train.run folder")
        deadline = time.monotonic() + _LOCK_SECONDS
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read(_MOST_LOCK).strip()
            if time.monotonic() > deadline:
                raise ConfigError(f"{run} is in use by {holder}; wait for it, end it, or choose another train.run")
            if not told:
                say(f"{run} is in use by {holder}; waiting for it to end")
                told = True
            time.sleep(1.0)
        file.truncate(0)
        file.write(f"{_HOLDER}{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class BadSamples:
    """bad_samples.jsonl: each sample that was ever replaced, once; those that the sets did not know to be bad, against
    a budget. Kept by the first rank."""

    def __init__(self, run: Path, epoch_samples: int, budget: float):
        """`budget`: distinct bad samples as a share of the set, rounded up."""
        self.path = run / "bad_samples.jsonl"
        self.limit = allowed_bad(epoch_samples, budget)
        self.listed: set[tuple[str, str]] = set()
        self.charged = 0
        end_cut_line(self.path)
        if self.path.exists():
            for line in filter(None, map(parse_line, self.path.read_bytes().splitlines())):
                if "shard" in line and "key" in line:
                    self._list(line)

    def _list(self, values: dict) -> bool:
        """Whether a sample is new; if so it is charged, unless it was known. Earlier versions told that in words."""
        name = str(values["shard"]), str(values["key"])
        if name in self.listed:
            return False
        self.listed.add(name)
        known = values.get("known", str(values.get("reason")).endswith(_KNOWN_IN_WORDS))
        self.charged += known is not True
        return True

    def add(self, samples: list[Any]) -> None:
        """Write down the new ones (shards.stream.loader.BadSample); they are on disk when it returns."""
        with about_file(self.path), open(self.path, "a", encoding="utf-8") as file:
            for sample in samples:
                values = asdict(sample) if is_dataclass(sample) and not isinstance(sample, type) else dict(sample)
                if self._list(values):
                    file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def exhausted(self) -> bool:
        return self.charged > self.limit

    def over_budget(self) -> str:
        """The line that ends a run whose budget is spent, whenever it is started."""
        return (
            f"{self.charged} samples that were not known to be bad could not be used, more than the {self.limit} of "
            f"data.bad_sample_budget; they are listed in {self.path}, with reasons (known: false); repair the shards "
            f"(`verify --decode` finds them all) and remove that list, or raise the budget"
        )
