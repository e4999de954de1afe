"""`slurm [VERB] …`: writes the batch script of a job into its folder and submits it."""

import argparse
from dataclasses import fields
from pathlib import Path

HELP = "write the batch script of a job, submit it, and say how to watch and stop it"
_EPILOG = """any option of sbatch may follow a --:
  beitforge slurm configs/beit_base.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 -- --qos high --exclude n7
  beitforge slurm tokenize configs/beit_base.yaml --array 0-15 --gpus-per-node 1 --time 4:00:00
  beitforge slurm pack IMAGES SHARDS --short-side 320 --cpus-per-task 64 --partition cpu"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job, and what to ask SLURM for."""
    parser.epilog = _EPILOG
    text = "verb (default pretrain; or finetune, tokenizer, tokenize, pack) and what it takes"
    parser.add_argument("words", metavar="[VERB] CONFIG|ARGS", nargs="*", help=text)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default 1)")
    text = "GPUs of a node; one process for each"
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help=text)
    text = "processes of a node without GPUs"
    parser.add_argument("--tasks-per-node", type=int, default=0, metavar="T", help=text)
    text = "CPU cores of a process, such as loader.workers and one more (default: the cluster's)"
    parser.add_argument("--cpus-per-task", type=int, default=0, metavar="C", help=text)
    for option, metavar in (("time", "TIME"), ("partition", "NAME"), ("account", "NAME"), ("array", "RANGE")):
        text = f"sbatch's --{option} (default: the cluster's)"
        parser.add_argument(f"--{option}", default="", metavar=metavar, help=text)
    text = "save and requeue this many seconds before the time limit (default 120)"
    parser.add_argument("--signal-seconds", type=int, default=120, metavar="S", help=text)
    text = "start a pretraining without running doctor on its nodes first"
    parser.add_argument("--no-doctor", action="store_true", help=text)
    parser.add_argument("--dry-run", action="store_true", help="write the script and do not submit it")


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """What follows -- is sbatch's; options that `pack` knows are left to it."""
    cut = words.index("--") if "--" in words else len(words)
    if "pack" in words[:cut] and "--help" not in words[:cut]:
        arguments, rest = parser.parse_known_intermixed_args(words[:cut])
        if arguments.words[:1] != ["pack"]:
            parser.error(f"unrecognized arguments: {' '.join(rest)}") if rest else None
        arguments.words += rest
    else:
        arguments = parser.parse_intermixed_args(words[:cut])
    arguments.more = tuple(words[cut + 1 :])
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Write the script, and submit it unless --dry-run is given."""
    from beitforge.pipeline.cluster import slurm_script

    arguments.doctor = not arguments.no_doctor
    names = [field.name for field in fields(slurm_script.SlurmRequest)]
    request = slurm_script.SlurmRequest(**{name: getattr(arguments, name) for name in names})
    return slurm_script.run(arguments.words, request, arguments.dry_run, _shards_of)


def _shards_of(words: list[str]) -> Path:
    """The folder that `pack WORDS…` writes. Its own parser ends the process when a word is wrong. Raises ShardError for
    what it would refuse before it reads an image: better now than hours later in a log."""
    from beitforge.pipeline.cli import parse_arguments
    from beitforge.shards.options import local_folder
    from beitforge.shards.pack.plan import check_folders, check_options, options_of

    arguments = parse_arguments(["pack", *words])
    images, shards = local_folder(arguments.images), local_folder(arguments.shards)
    check_options(options_of(arguments))
    check_folders(images, shards)
    return shards
