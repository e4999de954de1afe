"""What `doctor` asks every host of HOSTFILE over ssh, all at once, before any rank is started: each answers within a
time, or is named. Must not know torch."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from beitforge.pipeline.doctor.findings import MARK, OK, STOP, Finding, Local
from beitforge.pipeline.doctor.host import clocks, compare_hosts, port_taken

_CONNECT_SECONDS, _ANSWER_SECONDS = 8, 25.0
_AT_ONCE = 64
_UNSURE = 0.5  # seconds an answer may be on its way


@dataclass
class _Answer:
    """What a host said of itself, or why it said nothing. `ahead`: of this machine's clock, in seconds."""

    host: str
    problem: str = ""
    cure: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    holder: str = ""
    found: list[dict] = field(default_factory=list)
    ahead: float = 0.0


def check_hosts(hosts: list[str], words: list[str], port: int, environment: Mapping[str, str]) -> list[Finding]:
    """Findings about every host. words: CONFIG and overrides; port: where ranks will meet on the first host, or 0 when
    nobody has chosen it; environment: what the ranks will be given."""
    with ThreadPoolExecutor(min(_AT_ONCE, len(hosts))) as pool:
        asked = [(host, words, port if host == hosts[0] else 0, environment) for host in hosts]
        answers = list(pool.map(lambda each: _ask(*each), asked))
    found: list[Finding] = []
    for answer in answers:
        local = Local(answer.host, found=found)
        if answer.problem:
            local.add(STOP, "ssh", answer.problem, answer.cure)
            continue
        local.add(OK, "ssh", "answers")
        found += [Finding(**{**each, "host": answer.host}) for each in answer.found]
        if answer.holder:
            port_taken(port, answer.holder, local)
    well = [answer for answer in answers if not answer.problem]
    if well:
        found += compare_hosts({answer.host: answer.facts for answer in well})
        found += clocks({answer.host: (answer.ahead - well[0].ahead, 2 * _UNSURE) for answer in well})
    return found


def _ask(host: str, words: list[str], port: int, environment: Mapping[str, str]) -> _Answer:
    """Run pipeline.doctor.host on a host with this machine's Python, folder and PYTHONPATH."""
    kept = [f"{name}={environment[name]}" for name in ("PYTHONPATH", "GLOO_SOCKET_IFNAME") if name in environment]
    program = ["env", *kept, sys.executable, "-m", "beitforge.pipeline.doctor.host", words[0], str(port), *words[1:]]
    remote = f"cd {shlex.quote(os.getcwd())} && exec timeout {_ANSWER_SECONDS:.0f} {shlex.join(program)}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", "-o", "ConnectionAttempts=1"]
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, remote],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_CONNECT_SECONDS + _ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        said = f"lets us in, and then does not answer within {_ANSWER_SECONDS:.0f} s"
        return _Answer(host, said, "log in and see what hangs there: a file system, most often; or leave it out")
    arrived = time.time()
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), "")
    if line:
        said = json.loads(line.removeprefix(MARK))
        return _Answer(
            host, facts=said["facts"], holder=said["holder"], found=said["found"], ahead=said["time"] - arrived
        )
    reason = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
    if done.returncode == 255:
        return _Answer(host, f"cannot be reached over ssh without a password: {reason}", _UNREACHABLE)
    return _Answer(host, f"cannot run this project: {reason}", _FOREIGN)


_UNREACHABLE = "is it up, is its name right, is your key in its authorized_keys? else take it out of HOSTFILE"
_FOREIGN = "the repository, the Python it runs with and the config must be at the same path on every host"
