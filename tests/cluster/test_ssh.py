"""DeepSpeed's launcher on real hosts over ssh: what dies ends the job within a stated time, and a restart goes on."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from beitforge.pipeline.cluster.signals import EXIT_STOPPED, read_ended
from tests.cluster.cluster import Cluster, until
from tests.cluster.conftest import NO_HELDOUT, SETTINGS, STEPS, Run, nightly, same
from tests.conftest import ROOT

# A killed rank's peers lose their connections at once; DeepSpeed's launcher looks once a second and gives what it ends
# 30 s.
BOUND_SECONDS = 60
# A vanished host's ssh gives up after 30 s; 20 s later the others are ended, which takes 10 s of trying to reach it and
# 30 s for those that wait in a collective.
VANISHED_SECONDS = 120
SECRET = "not for the command lines of a host"
AWKWARD = "a b  $HOME `date` \"quoted\" 'single' 100% %h %n back\\slash"


@pytest.fixture
def hostfile(tmp_path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=2\nnode2 slots=2\n")
    return path


def start(cluster: Cluster, config: Path, run: Run, hostfile: Path) -> subprocess.Popen:
    words = ["./launch.sh", "pretrain", config, f"train.run={run.folder}", *SETTINGS, *NO_HELDOUT]
    own = hostfile.with_name("own_variables")
    own.write_text("# mine\n\nNCCL_DEBUG=WARN\nMINE=yes\n")
    variables = {"HOSTFILE": str(hostfile), "DS_ENV_FILE": str(own), "HF_TOKEN": SECRET, "NCCL_DEBUG": "INFO"}
    return cluster.popen(*words, **variables, GLOO_AWKWARD=AWKWARD)


def ended(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """Exit code and output of a command that must end within `seconds`."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def nothing_runs(cluster: Cluster, seconds: float = 5) -> None:
    """On no host."""
    until(lambda: not cluster.pythons(), seconds, lambda: "\n".join(map(str, cluster.pythons())))


def supervisor(cluster: Cluster) -> int:
    """The process that the user started, and would send signals to."""
    (found,) = [
        process for process in cluster.pythons() if re.search(r"-m beitforge pretrain (?!--rank)", process.command)
    ]
    return found.pid


def the_environment_travelled(there: dict[str, str]) -> None:
    """Through DeepSpeed, pdsh, ssh and a shell: awkward values too; the user's own lines win; what is secret stays."""
    assert there["GLOO_AWKWARD"] == AWKWARD
    assert (there["NCCL_DEBUG"], there["MINE"]) == ("WARN", "yes")
    assert (there["OMP_NUM_THREADS"], there["TORCH_CPP_LOG_LEVEL"]) == ("1", "ERROR")
    assert there["PYTHONPATH"].split(":")[0] == str(ROOT / "src")
    assert SECRET not in str(there)


def test_a_killed_rank_and_ctrl_c_on_two_hosts(cluster, tiny, whole, hostfile, tmp_path):
    """Must show 2: a rank on the second host is killed, later the user's Ctrl-C; the end is the undisturbed run's."""
    run = Run(tmp_path / "run")
    process = start(cluster, tiny.config, run, hostfile)
    until(lambda: run.saved() >= 20, 120)
    victim = cluster.rank(3)
    assert cluster.host_of(victim) == "node2"
    the_environment_travelled(victim.environment)
    os.kill(victim.pid, signal.SIGKILL)
    code, output = ended(process, BOUND_SECONDS)
    assert code not in (0, EXIT_STOPPED), output
    nothing_runs(cluster)
    saved = run.saved()
    assert 20 <= saved < STEPS

    process = start(cluster, tiny.config, run, hostfile)
    run.reaches(saved + 5)
    os.kill(supervisor(cluster), signal.SIGINT)
    code, output = ended(process, BOUND_SECONDS)
    assert code == EXIT_STOPPED, output
    assert f"from step {saved}" in output
    assert read_ended(run.folder) == (run.saved(), "stop file")
    nothing_runs(cluster)
    saved = run.saved()

    code, output = ended(start(cluster, tiny.config, run, hostfile), 120)
    assert code == 0, output
    assert f"from step {saved}" in output
    nothing_runs(cluster)
    assert same(whole.weights(), run.weights()) == []


def test_a_host_name_that_others_cannot_reach_is_refused(cluster, tiny, tmp_path):
    """Debian's 127.0.1.1 in /etc/hosts: else gloo fails after a minute and names neither file nor cure."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 node2\n10.77.0.1 node1\n")
    words = (
        f"mount --bind {tmp_path}/hosts /etc/hosts; exec {cluster.python} -m beitforge pretrain --rank {tiny.config}"
    )
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    meeting = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    said = cluster.run("unshare", "--mount", "bash", "-c", words, host="node2", code=2, **place, **meeting)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "the name of host node2 stands for 127.0.1.1" in line
    assert "Traceback" not in said


@nightly
@pytest.mark.parametrize(
    "victim",
    [r"-m beitforge pretrain (?!--rank)", "launcher.runner", "^pdsh -S", "^[^ ]+python.* -m deepspeed.launcher.launch"],
)
def test_a_killed_launcher_ends_the_run_everywhere(cluster, tiny, hostfile, tmp_path, victim):
    """Whichever of its processes: the ranks notice, save at the next step and end; the exit code is not 0."""
    run = Run(tmp_path / "run")
    process = start(cluster, tiny.config, run, hostfile)
    run.reaches(5)
    (found, *_) = [process for process in cluster.processes() if re.search(victim, process.command)]
    os.kill(found.pid, signal.SIGKILL)
    code, output = ended(process, BOUND_SECONDS)
    assert code != 0, output
    nothing_runs(cluster, BOUND_SECONDS)
    assert 5 <= run.saved() < STEPS, output


@nightly
def test_a_host_that_vanishes(tiny, tmp_path):
    """Its link is cut, so that no word of its end gets out, then it dies. The others wait for it in a collective whose
    own time limit is ten minutes."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    lab = Cluster()
    try:
        run = Run(tmp_path / "run")
        process = start(lab, tiny.config, run, hostfile)
        run.reaches(5)
        lab.cut("node2")
        began = time.monotonic()
        code, output = ended(process, VANISHED_SECONDS)
        assert code not in (0, EXIT_STOPPED), output
        assert "1 of 2 hosts ended alone" in output
        nothing_runs(lab, VANISHED_SECONDS - (time.monotonic() - began))
        print(f"ended {time.monotonic() - began:.0f} s after the host had vanished")
    finally:
        lab.down()
