"""The command line: `python -m pipeline VERB …`. Help and config errors are instant: stages import what is heavy."""

import argparse
import contextlib
import errno
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from pipeline.config import Config, ConfigError, load_config, refuse_world, to_size, work_folder
from pipeline.rendezvous import HostError, in_step, rank_of
from pipeline.signals import StopRequest, end_with_launcher

_CONFIG_VERBS = {
    "tokenizer": "train a dVAE on the image shards; writes data.tokenizer",
    "tokenize": "image shards + tokenizer → token shards; any number of processes, finished shards are skipped",
    "pretrain": "the training run; goes on by itself from the newest complete checkpoint of train.run",
}
_DOCTOR = "look at every rank and node before a training does: go, go with warnings or stop (exit codes 0, 1, 2)"
_LAUNCHED = {**_CONFIG_VERBS, "doctor": _DOCTOR}
_DEMO_WORDS = "your own pictures (default: sample photographs), and settings that win over configs/demo.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Pretrain BEiT from image shards.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in _CONFIG_VERBS.items():
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
    probe.add_argument("--samples", type=int, default=20_000, help="at most so many of each set (default 20000)")
    report = verbs.add_parser("report", help="RUN/report.html: curves, throughput, reconstructions, one file")
    report.add_argument("run", metavar="RUN", type=Path)
    _add_plan(verbs)
    _add_launching(verbs)
    demo = verbs.add_parser("demo", help="the whole job on this machine: pictures → … → report")
    demo.add_argument("words", metavar="DIR section.key=value", nargs="*", help=_DEMO_WORDS)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes (default runs/demo)")
    return parser


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
        "words", metavar="[VERB] CONFIG|ARGS", nargs="*", help="pretrain (default), tokenizer, tokenize, pack"
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


def _arguments() -> argparse.Namespace:
    """argparse gives up on words that come after an option; `demo`, `plan`, `slurm` and `doctor` take them anywhere."""
    parser = _parser()
    words = sys.argv[1:]
    cut = words.index("--") if words[:1] == ["slurm"] and "--" in words else len(words)
    arguments, rest = parser.parse_known_args(words[:cut])
    packing = arguments.verb == "slurm" and (arguments.words + rest)[:1] == ["pack"]  # whose options are its own
    doctor = "doctor" in (arguments.verb, getattr(arguments, "what", ""))
    anywhere = doctor or arguments.verb in ("demo", "plan", "slurm")
    if rest and not packing and (not anywhere or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        (arguments.overrides if doctor else arguments.words).extend(rest)
    arguments.more = tuple(words[cut + 1 :])
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    """One verb; returns the exit code."""
    verb = arguments.verb
    if verb in _CONFIG_VERBS:
        return _work(verb, load_config(arguments.config, arguments.overrides))
    if verb == "doctor":
        return _doctor(arguments)
    if verb in ("launch", "slurm", "stop"):
        return _start_or_stop(arguments)
    if verb in ("export", "import", "import-tokenizer"):
        return _exchange(arguments)
    if verb == "plan":
        return _plan(arguments)
    if verb == "probe":
        from pipeline.stages import probe

        return probe.run(arguments.run, arguments.shards, arguments.test, arguments.samples)
    if verb == "report":
        from pipeline.stages import report

        return report.run(arguments.run)
    from pipeline.stages import demo

    folders = [word for word in arguments.words if "=" not in word]
    if len(folders) > 1:
        raise ConfigError(f"demo takes one folder of pictures, not {len(folders)}: {' '.join(folders)}")
    settings = [word for word in arguments.words if "=" in word]
    return demo.run(Path(folders[0]) if folders else None, arguments.out, settings)


def _work(verb: str, config: Config) -> int:
    """One of the processes of a training or of `tokenize`."""
    stop = StopRequest()
    if verb == "tokenize":
        from pipeline.stages import tokenize

        if "LOCAL_RANK" in os.environ:
            end_with_launcher()
        return tokenize.run(config)
    stop.install()
    sys.excepthook = _end_with_error
    stop.look_in(work_folder(verb, config))
    if verb == "pretrain":
        from pipeline.stages import pretrain

        return pretrain.run(config, stop)
    from pipeline.stages import tokenizer

    return tokenizer.run(config, stop)


def _doctor(arguments: argparse.Namespace) -> int:
    """One of the processes of `doctor`; signals are taken over before torch is imported."""
    from pipeline.checks_host import Arrivals

    config, arrivals = load_config(arguments.config, arguments.overrides), Arrivals()
    if "LOCAL_RANK" in os.environ:
        end_with_launcher()
    sys.excepthook = _end_with_error
    from pipeline.stages import doctor

    return doctor.run(config, arguments.seconds, arguments.json, arrivals)


def _start_or_stop(arguments: argparse.Namespace) -> int:
    """The verbs that start the processes of a run elsewhere, or end them."""
    if arguments.verb == "stop":
        from pipeline.stages import stop

        return stop.run(arguments.run)
    if arguments.verb == "launch":
        if arguments.what == "doctor":
            return _launch_doctor(arguments)
        return _launch(arguments.what, arguments.config, arguments.overrides)
    from pipeline.stages import slurm

    wanted = slurm.Wanted(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        tasks_per_node=arguments.tasks_per_node,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        array=arguments.array,
        signal_seconds=arguments.signal_seconds,
        doctor=not arguments.no_doctor,
        more=arguments.more,
    )
    return slurm.run(arguments.words, wanted, arguments.dry_run)


def _launch_doctor(arguments: argparse.Namespace) -> int:
    """Every host of HOSTFILE first, over ssh; when ranks can be started at all, theirs; one report."""
    from pipeline import checks_ssh, findings
    from pipeline.stages import launch

    started, path, seconds = time.monotonic(), arguments.config, arguments.seconds
    config = load_config(path, arguments.overrides)
    hosts = launch.hostfile(os.environ["HOSTFILE"]) if os.environ.get("HOSTFILE") else {}
    words = [path, *arguments.overrides]
    there = hosts or {socket.gethostname(): launch.processes_here()}
    refuse_world("doctor", config, sum(there.values()))
    os.environ[findings.HOSTS] = ",".join(f"{host}={slots}" for host, slots in there.items())
    report = findings.Report(arguments.json)
    if hosts:
        port = launch.meeting_port() if "MASTER_PORT" in os.environ else 0
        report.found += checks_ssh.examine(list(hosts), words, port, os.environ)
    if findings.worst(report.found) < 2:
        os.environ[findings.LINES] = "1"
        words += ["--seconds", str(seconds)]
        asked = launch.listen("doctor", words, work_folder("doctor", config), hosts, report.hear, seconds + 20)
        if asked:
            return 128 + asked[-1]
        report.close(next(iter(there)))
    print(report.text(time.monotonic() - started), flush=True)
    return findings.worst(report.found)


def _launch(verb: str, path: str, overrides: list[str]) -> int:
    """What can be refused is refused here, once, before any process is started."""
    from pipeline.stages import launch

    config = load_config(path, overrides)
    hosts = launch.hostfile(os.environ["HOSTFILE"]) if os.environ.get("HOSTFILE") else {}
    world = sum(hosts.values()) or launch.processes_here()
    refuse_world(verb, config, world)
    folder = work_folder(verb, config)
    tokenized = (lambda: (folder / "manifest.json").exists()) if verb == "tokenize" else None
    return launch.run(verb, [path, *overrides], folder, tokenized, hosts)


def _plan(arguments: argparse.Namespace) -> int:
    """What a training will take."""
    from pipeline.stages import plan

    asked = plan.Asked(
        gpus=arguments.gpus,
        stages=arguments.stages,
        gpu=arguments.gpu,
        network=arguments.network,
        storage=arguments.storage,
        days=arguments.days,
        images=arguments.images,
        measured=arguments.measured,
        assume=arguments.assume,
        json=arguments.json,
    )
    return plan.run(arguments.words, asked)


def _exchange(arguments: argparse.Namespace) -> int:
    """Weights in and out."""
    if arguments.verb == "import":
        from pipeline.stages import import_encoder

        return import_encoder.run(arguments.source, arguments.out, arguments.overrides)
    size = to_size(arguments.input_size, "--input-size") if arguments.input_size else None
    if arguments.verb == "import-tokenizer":
        from pipeline.stages import import_tokenizer

        return import_tokenizer.run(arguments.source, arguments.out, size)
    from pipeline.stages import export

    return export.run(arguments.run, arguments.out, arguments.to, arguments.finetune, size)


def main() -> int:
    """Parse, run, and turn what a user or a disk caused into one line and exit code 2."""
    arguments = _arguments()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except ConfigError as error:
        return _refuse(str(error), isinstance(error, HostError))
    except ValueError as error:
        from shards.errors import ShardError

        if not isinstance(error, ShardError):
            raise
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        return _refuse(f"{error.filename or 'a file'}: {error.strerror}; mend that, then run the same command again")


def _refuse(line: str, of_host: bool = False) -> int:
    """Say it once, not once per rank; what only one host knows, its first process says."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0") if in_step(os.environ) else "0")
    if local == "0" if of_host else rank_of(os.environ) == 0:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


def _end(code: int) -> NoReturn:
    """End a process of a training without taking its threads and libraries apart: now and then gloo aborts there, after
    all is done, and a launcher takes that for a failure."""
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _end_with_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For errors that nobody expects: this process ends at once, so that the others learn of it and end, too."""
    sys.__excepthook__(kind, error, trace)
    _end(1)


if __name__ == "__main__":
    code = main()
    if sys.argv[1:2] in (["pretrain"], ["tokenizer"], ["doctor"]):
        _end(code)
    sys.exit(code)
