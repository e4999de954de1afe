"""The verbs that run on many processes: one command starts DeepSpeed's launcher, and each process it starts is the same
verb with `--rank`. Must not know torch.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from beitforge.pipeline.cluster import deepspeed_launcher
from beitforge.pipeline.cluster.error_reporting import as_host_error
from beitforge.pipeline.cluster.hostfile import processes_here, read_hostfile
from beitforge.pipeline.cluster.signals import StopRequest
from beitforge.pipeline.config.deepspeed_section import refuse_deepspeed
from beitforge.pipeline.config.derived import refuse_world, work_folder
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError

_EPILOG = """settings: `beitforge settings` lists every section.key with its default, range, unit and meaning.
environment: NPROC=2 processes on this machine (default: one per GPU, 2 without a GPU);
  HOSTFILE=hosts starts them on many hosts over ssh, one `HOST slots=GPUS` a line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, overrides and --rank."""
    parser.epilog = _EPILOG
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/beit_base.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file")
    text = "run as one process of a job that srun, torchrun or DeepSpeed started (default: start the processes)"
    parser.add_argument("--rank", action="store_true", help=text)


def require_packages(*names: str) -> None:
    """Raise ModuleNotFoundError for the first package that is not installed; none of them is imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _require_timm(randaugment: str) -> None:
    try:
        require_packages("timm")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"finetune.randaugment {randaugment} is timm's, which is not installed for {sys.executable}: "
            f'`pip install timm`, or set finetune.randaugment=""'
        ) from error


def refuse_launched() -> None:
    """Raise ConfigError where a launcher has started this process, which is to start processes itself."""
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "LOCAL_RANK is set, so a launcher has started this process: add --rank to run as one of its ranks, or "
            "unset LOCAL_RANK"
        )


def prepare(arguments: argparse.Namespace) -> tuple[Config, dict[str, int]]:
    """Before any process is started: the config, and the hosts of HOSTFILE with their slots ({}: this machine alone).

    Raises ConfigError for what can be refused here, once, and ModuleNotFoundError for a package that ranks need.
    """
    refuse_launched()
    config = load_config(arguments.config, arguments.overrides)
    trains = arguments.verb in ("pretrain", "finetune", "tokenizer")
    require_packages("torch", "deepspeed", *(["tensorboard"] if trains and config.log.tensorboard else []))
    if arguments.verb == "finetune":
        require_packages("scipy")
        if config.finetune.randaugment:
            _require_timm(config.finetune.randaugment)
    hosts = read_hostfile(os.environ["HOSTFILE"]) if os.environ.get("HOSTFILE") else {}
    refuse_world(arguments.verb, config, sum(hosts.values()) or processes_here())
    return config, hosts


def launch(arguments: argparse.Namespace, finished: Callable[[Path], bool] | None = None) -> int:
    """Start the verb's processes and see them to their end; returns the exit code. finished: told the work folder,
    says whether the work is done, for a verb that has nothing to save when it is stopped."""
    config, hosts = prepare(arguments)
    folder = work_folder(arguments.verb, config)
    done = None if finished is None else (lambda: finished(folder))
    return deepspeed_launcher.run(arguments.verb, [arguments.config, *arguments.overrides], folder, done, hosts)


def rank_config(arguments: argparse.Namespace) -> Config:
    """The config of one of many processes, where each host has its own copy of the file and they have not met."""
    with as_host_error():
        config = load_config(arguments.config, arguments.overrides)
        if arguments.verb != "tokenize":
            refuse_deepspeed(config)
        return config


def start_rank(arguments: argparse.Namespace) -> tuple[Config, StopRequest]:
    """One process of a training: reads the config, and takes over signals and the reporting of unexpected errors."""
    config, stop = rank_config(arguments), StopRequest()
    stop.install()
    sys.excepthook = end_with_error
    stop.watch_folder(work_folder(arguments.verb, config))
    return config, stop


def end_with_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook for unexpected errors: this process ends at once, so that the others notice and end, too.

    While it is called, torch (init_process_group) has a buffer in place of stderr, to be printed afterwards.
    """
    sys.stderr = sys.__stderr__
    sys.__excepthook__(kind, error, trace)
    end_process(1)


def end_process(code: int) -> NoReturn:
    """End a rank without tearing down its threads and libraries: gloo sometimes aborts there after all work is done,
    and a launcher takes that for a failure."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)
