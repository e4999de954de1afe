"""`evaluate RUN|WEIGHTS SET`: the accuracy of a classifier on a labelled set."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from beitforge.pipeline.cluster import deepspeed_launcher, launching
from beitforge.pipeline.cluster.hostfile import num_gpus, processes_here, read_hostfile
from beitforge.pipeline.cluster.signals import end_with_launcher

HELP = "top-1, top-5, accuracy by class and confusions of a classifier on a labelled set"

_EPILOG = """each image counts once, seen as fine-tuning's test sees it; counts are the same on any number of processes.
settings: such as finetune.test_crop=1.0, loader.workers=8 or finetune.micro_batch=256 (images of a batch).
environment: NPROC and HOSTFILE as for `pretrain`; without them one process per GPU, or one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The classifier, the set and where the counts go."""
    parser.epilog = _EPILOG
    text = "run folder of a fine-tuning (its newest checkpoint), or an exported or imported classifier"
    parser.add_argument("weights", metavar="RUN|WEIGHTS", type=Path, help=text)
    parser.add_argument("set", metavar="SET", help="labelled image shards, a folder or a URL")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the run's")
    text = "also write all counts to a file, those of every class and every confusion among them"
    parser.add_argument("--json", type=Path, metavar="OUT", help=text)
    text = "labels are the classifier's numbers, whatever the two call their classes (default: by name, where both say)"
    parser.add_argument("--by-number", action="store_true", help=text)
    text = "of a fine-tuning with finetune.ema_decay: the moving average of its weights"
    parser.add_argument("--ema", action="store_true", help=text)
    text = "run as one process of a job that srun, torchrun or DeepSpeed started (default: start the processes)"
    parser.add_argument("--rank", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks where there are to be several; else, or with --rank, be one."""
    if not arguments.rank:
        launching.refuse_launched()
        launching.require_packages("torch", "deepspeed")
        hosts = read_hostfile(os.environ["HOSTFILE"]) if os.environ.get("HOSTFILE") else {}
        if hosts or ((os.environ.get("NPROC") or num_gpus()) and processes_here() > 1):
            return _launch(arguments, hosts)
    else:
        sys.excepthook = launching.end_with_error
        if "LOCAL_RANK" in os.environ:
            end_with_launcher()
    from beitforge.pipeline.stages import evaluate

    options = {name: getattr(arguments, name) for name in ("json", "by_number", "ema")}
    asked = evaluate.EvaluateOptions(**options, overrides=tuple(arguments.overrides))
    return evaluate.run(arguments.weights, arguments.set, asked)


def _launch(arguments: argparse.Namespace, hosts: dict[str, int]) -> int:
    words = [str(arguments.weights), arguments.set, *arguments.overrides]
    words += ["--json", str(arguments.json)] if arguments.json is not None else []
    words += ["--by-number"] if arguments.by_number else []
    words += ["--ema"] if arguments.ema else []
    with tempfile.TemporaryDirectory(prefix="beitforge-evaluate-") as scratch:
        return deepspeed_launcher.run("evaluate", words, Path(scratch), lambda: True, hosts)
