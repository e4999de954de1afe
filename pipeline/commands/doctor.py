"""`doctor CONFIG`: hosts, data, devices and network, checked by the ranks that a training would have."""

import argparse
import os
import socket
import sys
import time

from beitforge.pipeline.cluster import deepspeed_launcher, launching
from beitforge.pipeline.cluster.hostfile import meeting_port, processes_here
from beitforge.pipeline.cluster.signals import end_with_launcher
from beitforge.pipeline.config.derived import work_folder
from beitforge.pipeline.doctor import findings, ssh
from beitforge.pipeline.doctor.host import Arrivals

HELP = "check hosts, data, devices and network before a training; exit code 0 go, 1 warnings, 2 stop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, overrides, and how to report."""
    launching.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print every finding as JSON, for programs")
    text = "limit for all checks together, in seconds (default 90)"
    parser.add_argument("--seconds", type=float, default=90.0, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Every host of HOSTFILE first, over ssh; then, if ranks can be started at all, each of them; one report."""
    if arguments.rank:
        return _run_rank(arguments)
    started = time.monotonic()
    config, hosts = launching.prepare(arguments)
    words = [arguments.config, *arguments.overrides]
    slots = hosts or {socket.gethostname(): processes_here()}
    os.environ[findings.HOSTS] = ",".join(f"{host}={count}" for host, count in slots.items())
    report = findings.Report(arguments.json)
    if hosts:
        port = meeting_port() if "MASTER_PORT" in os.environ else 0
        report.found += ssh.check_hosts(list(hosts), words, port, os.environ)
    if findings.worst(report.found) < 2:
        os.environ[findings.LINES] = "1"
        words += ["--seconds", str(arguments.seconds)]
        folder, limit = work_folder("doctor", config), arguments.seconds + 20
        asked = deepspeed_launcher.listen("doctor", words, folder, hosts, report.receive_line, limit)
        if asked:
            return 128 + asked[-1]
        report.close(next(iter(slots)))
    print(report.text(time.monotonic() - started), flush=True)
    return findings.worst(report.found)


def _run_rank(arguments: argparse.Namespace) -> int:
    """One of the ranks; signals are taken over before torch is imported."""
    config, arrivals = launching.rank_config(arguments), Arrivals()
    if "LOCAL_RANK" in os.environ:
        end_with_launcher()
    sys.excepthook = launching.end_with_error
    from beitforge.pipeline.stages import doctor

    return doctor.run(config, arguments.seconds, arguments.json, arrivals)
