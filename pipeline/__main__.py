"""The command line: `python -m pipeline VERB …`. Help and config errors are instant: stages import what is heavy."""

import argparse
import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from pipeline.commandline import CONFIG_VERBS, parsed
from pipeline.complaints import EXPECTED, complain, line_of, of_host
from pipeline.config import Config, ConfigError, load_config, refuse_world, to_size, work_folder
from pipeline.signals import StopRequest, end_with_launcher


def _run(arguments: argparse.Namespace) -> int:
    """One verb; returns the exit code."""
    verb = arguments.verb
    if verb in CONFIG_VERBS:
        return _work(verb, _config(arguments))
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

        words = {name: getattr(arguments, name) for name in ("samples", "label_share", "seed", "epochs")}
        return probe.run(arguments.run, arguments.shards, arguments.test, probe.Asked(**words))
    if verb == "report":
        from pipeline.stages import report

        return report.run(arguments.runs, arguments.out)
    if verb == "watch":
        from pipeline.stages import watch

        return watch.run(arguments.run, arguments.host, arguments.port, arguments.terminal)
    from pipeline.stages import demo

    folders = [word for word in arguments.words if "=" not in word]
    if len(folders) > 1:
        raise ConfigError(f"demo takes one folder of pictures, not {len(folders)}: {' '.join(folders)}")
    settings = [word for word in arguments.words if "=" in word]
    return demo.run(Path(folders[0]) if folders else None, arguments.out, settings)


def _config(arguments: argparse.Namespace) -> Config:
    """Of one of many processes, where each host has a file of its own, and they have not met."""
    with of_host():
        return load_config(arguments.config, arguments.overrides)


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
    if verb == "finetune":
        from pipeline.stages import finetune

        return finetune.run(config, stop)
    from pipeline.stages import tokenizer

    return tokenizer.run(config, stop)


def _doctor(arguments: argparse.Namespace) -> int:
    """One of the processes of `doctor`; signals are taken over before torch is imported."""
    from pipeline.checks_host import Arrivals

    config, arrivals = _config(arguments), Arrivals()
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
    arguments = parsed()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except EXPECTED as error:
        if not line_of(error):
            raise
        return complain(error)


def _end(code: int) -> NoReturn:
    """End a process of a training without taking its threads and libraries apart: now and then gloo aborts there, after
    all is done, and a launcher takes that for a failure."""
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _end_with_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For errors that nobody expects: this process ends at once, so that the others learn of it and end, too.

    While it is called, torch (init_process_group) has a buffer in place of stderr, to be printed afterwards.
    """
    sys.stderr = sys.__stderr__
    sys.__excepthook__(kind, error, trace)
    _end(1)


if __name__ == "__main__":
    code = main()
    if sys.argv[1:2] in (["pretrain"], ["finetune"], ["tokenizer"], ["doctor"]):
        _end(code)
    sys.exit(code)
