"""The words of the command line: verbs and their options. Instant: imports nothing heavy."""

import argparse
import sys
from pathlib import Path

CONFIG_VERBS = {
    "tokenizer": "train a dVAE on the image shards; writes data.tokenizer",
    "tokenize": "image shards + tokenizer → token shards; any number of processes, finished shards are skipped",
    "pretrain": "the training run; goes on by itself from the newest complete checkpoint of train.run",
    "finetune": "supervised training of finetune.init on data.labelled_images; goes on by itself like pretrain",
}
_DOCTOR = "look at every rank and node before a training does: go, go with warnings or stop (exit codes 0, 1, 2)"
_LAUNCHED = {**CONFIG_VERBS, "doctor": _DOCTOR}
_DEMO_WORDS = "your own pictures (default: sample photographs), and settings that win over configs/demo.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Pretrain BEiT from image shards.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in CONFIG_VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("config", metavar="CONFIG", help="a YAML file of configs/")
        sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file")
    doctor = verbs.add_parser("doctor", help=_DOCTOR, description=_DOCTOR)
    doctor.add_argument("config", metavar="CONFIG", help="the training's, a YAML file of configs/")
    doctor.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file")
    _add_doctor_options(doctor)
    export = verbs.add_parser("export", help="encoder and head of a run for others; checked by loading them back")
    export.add_argument("run", metavar="RUN", type=Path, help="run folder, or an encoder that was exported or imported")
    export.add_argument("out", metavar="OUT", type=Path)
    export.add_argument(
        "--to", choices=("safetensors", "hf", "timm", "unilm"), default="safetensors", help="whose names and layout"
    )
    export.add_argument(
        "--finetune", action="store_true", help="a classifier without its head: mean pooling, own tables"
    )
    export.add_argument("--input-size", metavar="PIXELS", help="with --finetune: for pictures of 384 or 224x288")
    bring = verbs.add_parser(
        "import", help="a BEiT of transformers, timm or the released code becomes an encoder of ours"
    )
    bring.add_argument("source", metavar="SRC", type=Path, help="folder, or a .pth or .safetensors file")
    bring.add_argument(
        "out", metavar="OUT", type=Path, help="probe, report, export it, or pretrain with train.init=OUT"
    )
    bring.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over what SRC says")
    tokens = verbs.add_parser("import-tokenizer", help="DALL-E's, FLAVA's or BEiT v2's tokenizer becomes one of ours")
    tokens.add_argument(
        "source", metavar="SRC", type=Path, help="encoder.pkl or its folder, a FLAVA folder, VQ-KD's .pth"
    )
    tokens.add_argument("out", metavar="OUT", type=Path, help="the folder for data.tokenizer")
    tokens.add_argument("--input-size", metavar="PIXELS", help="of the views it is given (default: as published)")
    probe = verbs.add_parser("probe", help="k-NN and linear probe of a run's encoder on labelled shards")
    probe.add_argument("run", metavar="RUN", type=Path, help="run folder; its newest checkpoint is probed")
    probe.add_argument("shards", metavar="SHARDS", help="labelled image shards to fit on")
    probe.add_argument("test", metavar="TEST", nargs="?", help="shards to test on (default: a fifth of SHARDS)")
    probe.add_argument(
        "--samples", type=int, default=20_000, help="at most so many of each set, from all over it (default 20000)"
    )
    probe.add_argument("--label-share", type=float, default=1.0, help="fit on so much of each class (default 1)")
    probe.add_argument("--seed", type=int, default=0, help="that chooses them (default 0)")
    probe.add_argument("--epochs", type=int, default=100, help="of the linear probes (default 100)")
    _add_seeing(verbs)
    _add_plan(verbs)
    _add_launching(verbs)
    demo = verbs.add_parser("demo", help="the whole job on this machine: pictures → … → report")
    demo.add_argument("words", metavar="DIR section.key=value", nargs="*", help=_DEMO_WORDS)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes (default runs/demo)")
    return parser


def _add_seeing(verbs: argparse._SubParsersAction) -> None:
    text = "RUN/report.html: curves, throughput, reconstructions, attention, one file; of several runs: a comparison"
    report = verbs.add_parser("report", help=text, description=text)
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder; several are compared")
    report.add_argument("--out", metavar="FILE", type=Path, help="default RUN/report.html; several: comparison.html")
    text = "a run while it goes, in a browser or in this terminal; from its folder alone"
    watch = verbs.add_parser("watch", help=text, description=text)
    watch.add_argument("run", metavar="RUN", type=Path)
    watch.add_argument("--host", default="127.0.0.1", help="who may open the page (default 127.0.0.1: this machine)")
    watch.add_argument("--port", type=int, default=8265, help="default 8265; 0: any free one")
    watch.add_argument("--terminal", action="store_true", help="no page; the numbers here, for ssh")


def _add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="of doctor: every finding, for programs")
    limit = "of doctor: what all its checks may take together (default 90)"
    parser.add_argument("--seconds", type=float, default=90.0, metavar="N", help=limit)


def _add_plan(verbs: argparse._SubParsersAction) -> None:
    text = "memory, bytes, time, loader, days, cost of a training, by number of GPUs and ZeRO stage; without a GPU"
    plan = verbs.add_parser("plan", help=text, description=text, allow_abbrev=False)
    plan.add_argument("words", metavar="CONFIG section.key=value", nargs="*", help="a YAML file of configs/")
    plan.add_argument("--gpus", default="1,8,64,512", metavar="N,…", help="default 1,8,64,512")
    plan.add_argument("--stages", default="0,1,2,3", metavar="Z,…", help="of ZeRO; default 0,1,2,3")
    plan.add_argument("--gpu", default="h100", metavar="NAME", help="a chip of pipeline/machines.py (default h100)")
    plan.add_argument("--network", default="ndr-8", metavar="NAME", help="between nodes (default ndr-8)")
    plan.add_argument("--storage", default="nvme", metavar="NAME", help="default nvme")
    plan.add_argument("--days", type=float, default=0.0, metavar="D", help="find the cheapest that ends within so many")
    plan.add_argument("--images", type=int, default=0, metavar="N", help="of an epoch (default: the manifest's)")
    measured = "numbers measured on your machines: a run folder, doctor --json, benchmarks' kernels, train or loader"
    plan.add_argument("--from", dest="measured", action="append", default=[], metavar="FILE|RUN", help=measured)
    plan.add_argument("--assume", action="append", default=[], metavar="NAME=NUMBER", help="replaces what is assumed")
    plan.add_argument("--json", action="store_true", help="for programs")


def _add_launching(verbs: argparse._SubParsersAction) -> None:
    text = "under DeepSpeed's launcher: NPROC processes here (one per GPU), or every host of HOSTFILE"
    launch = verbs.add_parser("launch", help=text, description=text)
    launch.add_argument("what", metavar="VERB", choices=sorted(_LAUNCHED), help=" · ".join(_LAUNCHED))
    launch.add_argument("config", metavar="CONFIG")
    launch.add_argument("overrides", metavar="section.key=value", nargs="*")
    _add_doctor_options(launch)
    stop = verbs.add_parser("stop", help="ask a run to finish its step, save and end, under whatever launcher")
    stop.add_argument("run", metavar="RUN", type=Path, help="run folder, or a tokenizer's folder")
    text = "write a batch script into the job's folder (RUN/slurm/), submit it, and say how to watch and stop it"
    slurm = verbs.add_parser("slurm", help=text, description=text, epilog=_SLURM_EXAMPLES, allow_abbrev=False)
    slurm.formatter_class = argparse.RawDescriptionHelpFormatter
    slurm.add_argument(
        "words", metavar="[VERB] CONFIG|ARGS", nargs="*", help="pretrain (default), finetune, tokenizer, tokenize, pack"
    )
    slurm.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    slurm.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="one task, one process for each")
    slurm.add_argument("--tasks-per-node", type=int, default=0, metavar="T", help="processes per node, without GPUs")
    slurm.add_argument("--cpus-per-task", type=int, default=0, metavar="C", help="loader.workers and one more, say")
    for option in ("time", "partition", "account", "array"):
        slurm.add_argument(f"--{option}", default="", help="as sbatch has it")
    lead = "before the time limit: save, and go on in the queue (default 120)"
    slurm.add_argument("--signal-seconds", type=int, default=120, metavar="S", help=lead)
    slurm.add_argument("--no-doctor", action="store_true", help="a pretraining begins without a look at its nodes")
    slurm.add_argument("--dry-run", action="store_true", help="only write the script")


_SLURM_EXAMPLES = """any option of sbatch may follow a --:
  ./launch.sh slurm configs/beit_base.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 -- --qos high --exclude n7
  ./launch.sh slurm tokenize configs/beit_base.yaml --array 0-15 --gpus-per-node 1 --time 4:00:00
  ./launch.sh slurm pack IMAGES SHARDS --short-side 320 --cpus-per-task 64 --partition cpu"""


def parsed() -> argparse.Namespace:
    """argparse gives up on words that come after an option; `demo`, `plan`, `slurm` and `doctor` take them anywhere."""
    parser = _parser()
    words = sys.argv[1:]
    cut = words.index("--") if words[:1] == ["slurm"] and "--" in words else len(words)
    found, rest = parser.parse_known_args(words[:cut])
    packing = found.verb == "slurm" and (found.words + rest)[:1] == ["pack"]  # whose options are its own
    doctor = "doctor" in (found.verb, getattr(found, "what", ""))
    anywhere = doctor or found.verb in ("demo", "plan", "slurm")
    if rest and not packing and (not anywhere or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        (found.overrides if doctor else found.words).extend(rest)
    found.more = tuple(words[cut + 1 :])
    return found
