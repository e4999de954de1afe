"""`replay RUN --step N`: do steps of a run again, and say whether they are the recorded ones bit for bit."""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from beitforge.pipeline.cluster import deepspeed_launcher, launching
from beitforge.pipeline.cluster.hostfile import num_gpus, processes_here, read_hostfile
from beitforge.pipeline.cluster.signals import end_with_launcher
from beitforge.pipeline.config.derived import refuse_world
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError

HELP = "do steps of a run again from a checkpoint; says whether losses, gradients and weights are the same bits"

_EPILOG = """exit code: 0 the recorded numbers bit for bit, 1 others, 2 it could not be done.
steps are counted as in metrics.jsonl: checkpoint step-N is the state after step N. Nothing in RUN is changed.
settings: where sets lie now (data.images=PATH data.tokens=PATH), or train.micro_batch=1 for a loss of every sample.
environment: NPROC and HOSTFILE as for `pretrain`; without NPROC as many processes as the run had."""
_MOST = 16  # processes that are started unasked where there is no GPU for each
_BROKEN = 70  # exit code of a rank that meets what nobody expects: 1 has a meaning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, which steps, and settings."""
    parser.epilog = _EPILOG
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or a tokenizer's folder")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the run's")
    parser.add_argument("--step", type=int, metavar="N", help="do step N again, from the checkpoint before it")
    parser.add_argument("--from", type=int, metavar="A", dest="after", help="do the steps behind step A again (0: all)")
    parser.add_argument("--to", type=int, metavar="B", dest="until", help="… up to step B")
    text = "also write a page with the samples of the first step that is not finite, or differs, or of the last"
    parser.add_argument("--page", type=Path, metavar="FILE.html", help=text)
    text = "run as one process of a job that srun, torchrun or DeepSpeed started (default: start the processes)"
    parser.add_argument("--rank", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks, or with --rank be one of them."""
    after, until = _span(arguments)
    folder = _run_folder(arguments.run)
    if arguments.page is not None and arguments.page.is_dir():
        raise ConfigError(f"--page is {arguments.page}, a folder; name a file")
    config = load_config(str(folder / "config.yaml"), arguments.overrides)
    from beitforge.pipeline.runs.recorded import read_recorded

    recorded = read_recorded(folder)
    if not arguments.rank:
        return _launch(arguments, folder, config, recorded.job, recorded.world_at(until))
    sys.excepthook = _end_broken
    if "LOCAL_RANK" in os.environ:
        end_with_launcher()
    from beitforge.pipeline.replay import verdict
    from beitforge.pipeline.replay.steps import Span

    stage = importlib.import_module(f"beitforge.pipeline.stages.{recorded.job}")
    return verdict.run(config, folder, recorded, Span(after, until), arguments.page, stage.prepare)


def _end_broken(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook that says with the exit code that nothing was compared."""
    sys.stderr = sys.__stderr__
    sys.__excepthook__(kind, error, trace)
    launching.end_process(_BROKEN)


def _span(arguments: argparse.Namespace) -> tuple[int, int]:
    """The step before the first and the last of those asked for."""
    step, after, until = arguments.step, arguments.after, arguments.until
    if (step is None) == (after is None) or (after is None) != (until is None):
        raise ConfigError("give --step N, or --from A and --to B")
    if step is not None:
        after, until = step - 1, step
    if not 0 <= after < until < 2**62:
        given = f"--step {step}" if step is not None else f"--from {after} --to {until}"
        raise ConfigError(f"{given}: steps are counted from 1 on, and A is less than B")
    return after, until


def _run_folder(run: Path) -> Path:
    for folder in (run, run / "training"):  # a tokenizer's folder
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"{run} holds no run (no config.yaml); give the folder that train.run names, or a tokenizer's")


def _launch(arguments: argparse.Namespace, folder: Path, config: Config, job: str, recorded: int) -> int:
    """Start as many processes as recorded, or as are asked for, and see them to their end."""
    launching.refuse_launched()
    launching.require_packages("torch", "deepspeed")
    hosts = read_hostfile(os.environ["HOSTFILE"]) if os.environ.get("HOSTFILE") else {}
    if not hosts and not os.environ.get("NPROC") and recorded <= (num_gpus() or _MOST):
        os.environ["NPROC"] = str(recorded)
    refuse_world(job, config, sum(hosts.values()) or processes_here())
    words = [str(folder), *arguments.overrides, "--from", str(arguments.after), "--to", str(arguments.until)]
    if arguments.step is not None:
        words = [str(folder), *arguments.overrides, "--step", str(arguments.step)]
    words += ["--page", str(arguments.page)] if arguments.page is not None else []
    with tempfile.TemporaryDirectory(prefix="beitforge-replay-") as scratch:
        return deepspeed_launcher.run("replay", words, Path(scratch), lambda: True, hosts)
