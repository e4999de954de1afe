"""`plan CONFIG`: memory, time and cost of a training, from arithmetic."""

import argparse
import dataclasses

HELP = "estimate memory, bytes, time, days and cost of a training by number of GPUs, without a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The training, the machine, and what is known about it."""
    parser.add_argument("words", metavar="CONFIG section.key=value", nargs="*", help="YAML file, and settings over it")
    parser.add_argument("--gpus", default="1,8,64,512", metavar="N,…", help="numbers of GPUs (default 1,8,64,512)")
    parser.add_argument("--stages", default="0,1,2,3", metavar="Z,…", help="ZeRO stages (default 0,1,2,3)")
    text = "chip, as named in pipeline/plan/hardware.py (default h100)"
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=text)
    parser.add_argument("--network", default="ndr-8", metavar="NAME", help="network between nodes (default ndr-8)")
    parser.add_argument("--storage", default="nvme", metavar="NAME", help="storage of the shards (default nvme)")
    text = "find the cheapest setting that ends within this many days (default: no deadline)"
    parser.add_argument("--days", type=float, default=0.0, metavar="D", help=text)
    text = "images of an epoch (default: the manifest's, else ImageNet-1k's)"
    parser.add_argument("--images", type=int, default=0, metavar="N", help=text)
    text = "numbers measured on your machines: a run folder, doctor --json, or results of bench kernels, train, loader"
    parser.add_argument("--from", dest="measured", action="append", default=[], metavar="FILE|RUN", help=text)
    text = "replace an assumption"
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=NUMBER", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from beitforge.pipeline.stages import plan

    names = [field.name for field in dataclasses.fields(plan.PlanOptions)]
    return plan.run(arguments.words, plan.PlanOptions(**{name: getattr(arguments, name) for name in names}))
