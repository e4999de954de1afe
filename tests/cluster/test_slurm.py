"""A real SLURM does to a job what clusters do, and the run ends with the weights it would have had on a quiet day."""

import json
import os
import re
import signal

from beitforge.pipeline.cluster.signals import read_ended
from beitforge.pipeline.runs.jsonl import read_metrics
from tests.cluster.cluster import Cluster, until
from tests.cluster.conftest import FOUR, NO_HELDOUT, SETTINGS, STEPS, TWO, Run, nightly, same, submit


def restarted(cluster: Cluster, run: Run, times: int) -> None:
    """Wait until SLURM has started the job again, for the `times`-th time."""

    def running() -> bool:
        job = cluster.job(run.job)
        return job["Restarts"] == str(times) and job["JobState"] == "RUNNING"

    until(running, 60, lambda: f"{cluster.job(run.job)}\n{run.log()}")


def every_step_once(run: Run, steps: int = STEPS) -> None:
    """Nothing was computed twice: each stop had saved the step it was at."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, steps + 1))


def test_preempted_requeued_and_out_of_time(cluster, tiny, whole, tmp_path):
    """Must show 1. The time limit's signal is SIGUSR1 to every task; here scancel sends it, by the same way."""
    run = submit(cluster, tiny.config, tmp_path / "run", *FOUR)
    run.reaches(10)
    cluster.run("srun", "-p", "high", "-N2", "--exclusive", "true")
    restarted(cluster, run, 1)
    run.reaches(run.saved() + 10)
    cluster.run("scancel", "-s", "USR1", run.job)
    restarted(cluster, run, 2)
    job = cluster.ended(run.job)
    assert job["JobState"] == "COMPLETED", run.log()
    reasons = re.findall(r"; (\w+) at step (\d+)", run.log())
    assert [reason for reason, _ in reasons] == ["SIGTERM", "SIGUSR1", "finished"], run.log()
    steps = [int(step) for _, step in reasons]
    assert 10 <= steps[0] < steps[1] < steps[2] == STEPS
    assert re.findall(r"from step (\d+)", run.log()) == [str(step) for step in (0, *steps[:2])]
    every_step_once(run)
    assert same(whole.weights(), run.weights()) == []


def test_requeued_by_hand_then_stopped_by_the_stop_file(cluster, tiny, tmp_path):
    """`scontrol requeue` goes on where it saved, `./launch.sh stop` ends the job for good; every step is done once."""
    run = submit(cluster, tiny.config, tmp_path / "run", *TWO)
    run.reaches(5)
    cluster.run("scontrol", "requeue", run.job)
    restarted(cluster, run, 1)
    at = run.saved()
    assert f"SIGTERM at step {at}" in run.log()
    run.reaches(at + 5)
    assert "will finish its step" in cluster.run("./launch.sh", "stop", run.folder)
    job = cluster.ended(run.job)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.log()
    assert read_ended(run.folder) == (run.saved(), "stop file")
    assert at < run.saved() < STEPS
    assert not (run.folder / "stop").exists()
    every_step_once(run, run.saved())


def test_cancelled_stays_cancelled(cluster, tiny, tmp_path):
    """Saved first, and nothing puts the job back in the queue."""
    run = submit(cluster, tiny.config, tmp_path / "run", *TWO)
    run.reaches(5)
    cluster.run("scancel", run.job)
    job = cluster.ended(run.job)
    until(lambda: not cluster.pythons(), 20, lambda: str(cluster.pythons()))
    assert (cluster.job(run.job)["JobState"], job["Restarts"]) == ("CANCELLED", "0"), run.log()
    assert read_ended(run.folder) == (run.saved(), "SIGTERM")
    assert run.saved() >= 5


def test_a_killed_rank_fails_the_job(cluster, tiny, tmp_path):
    """srun ends the others within seconds; nothing is left on any node, and nothing requeues what may fail again."""
    run = submit(cluster, tiny.config, tmp_path / "run", *TWO)
    run.reaches(5)
    os.kill(cluster.rank(1).pid, signal.SIGKILL)
    job = cluster.ended(run.job, 30)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), run.log()
    until(lambda: not cluster.pythons(), 5, lambda: str(cluster.pythons()))


def test_a_stop_file_ends_a_job_that_waits_in_the_queue(cluster, tiny, tmp_path):
    """Written while the job is held: it ends before any process is started. Submitting again takes a stop file back."""
    run = submit(cluster, tiny.config, tmp_path / "run", "--tasks-per-node", "1", "--", "--hold")
    cluster.run("./launch.sh", "stop", run.folder)
    cluster.run("scontrol", "release", run.job)
    assert cluster.ended(run.job)["JobState"] == "COMPLETED"
    assert "was written before this start" in run.log()
    assert not (run.folder / "config.yaml").exists()
    cluster.run("./launch.sh", "stop", run.folder)
    again = submit(cluster, tiny.config, run.folder, "--tasks-per-node", "1", "--", "--hold")
    assert not (run.folder / "stop").exists()
    cluster.run("scancel", again.job)


def test_two_jobs_on_one_node_do_not_meet(cluster, tiny, tmp_path):
    """One by `./launch.sh slurm`, one by plain srun: ranks and port follow from SLURM's variables in both."""
    short = ("train.duration=24 steps", *NO_HELDOUT)
    run = submit(cluster, tiny.config, tmp_path / "one", "--tasks-per-node", "2", *short, "--", "-w", "node1")
    plain = Run(tmp_path / "two")
    words = ["srun", "-w", "node1", "-n2", cluster.python, "-m", "beitforge", "pretrain", "--rank", str(tiny.config)]
    said = cluster.run(*words, f"train.run={plain.folder}", *SETTINGS, *short)
    assert cluster.ended(run.job)["JobState"] == "COMPLETED", run.log()
    assert "2 processes" in said
    assert read_ended(plain.folder) == read_ended(run.folder) == (24, "finished")
    assert [line["loss"] for line in read_metrics(plain.folder, "train")] == [
        line["loss"] for line in read_metrics(run.folder, "train")
    ]


def test_tokenize_as_a_job_array(cluster, tiny, tmp_path):
    """Three elements that know nothing of each other: the same bytes as one process makes."""
    folders = [f"data.tokens={tmp_path}/train", f"data.heldout_tokens={tmp_path}/test"]
    words = ["tokenize", str(tiny.config), *folders, "--array", "0-2", "--tasks-per-node", "2"]
    said = cluster.run("./launch.sh", "slurm", *words)
    job = re.search(r"submitted job (\d+)", said)
    assert job, said
    until(lambda: not cluster.run("squeue", "-h", "-j", job[1]).strip(), 90)
    logs = sorted((tmp_path / "train" / "slurm").glob("tokenize-*.out"))
    assert len(logs) == 3
    assert all("srun ended with 0" in log.read_text() for log in logs), [log.read_text() for log in logs]
    for part in ("train", "test"):
        made = {path.name: path.read_bytes() for path in (tmp_path / part).glob("*.safetensors")}
        assert made == {path.name: path.read_bytes() for path in (tiny.folder / "tokens" / part).glob("*.safetensors")}
        assert (tmp_path / part / "manifest.json").exists()


def test_the_first_host_is_slurms(cluster):
    """rendezvous reads SLURM's short lists of hosts by itself; `scontrol show hostnames` says what they mean."""
    from beitforge.pipeline.cluster.environment import first_host

    for nodes in ("node1", "node[1-2]", "n[07-12,15],login", "a1,b[03-05]", "r[1-2]n[3-4]", "g-[001]"):
        said = cluster.run("scontrol", "show", "hostnames", nodes).split()
        assert first_host(nodes) == said[0], nodes


@nightly
def test_a_real_time_limit(cluster, tiny, tmp_path):
    """SLURM's own USR1, 30 s before the end of two minutes; it looks every 30 s. Each round saves and goes on."""
    steps = "train.duration=2600 steps"  # some three minutes
    options = ("--nodes", "2", "--tasks-per-node", "1", "--time", "2", "--signal-seconds", "30")
    run = submit(cluster, tiny.config, tmp_path / "run", steps, *options)
    job = cluster.ended(run.job, 900)
    assert job["JobState"] == "COMPLETED", run.log()
    assert int(job["Restarts"]) >= 1
    reasons = re.findall(r"; (\w+) at step (\d+)", run.log())
    assert [reason for reason, _ in reasons] == ["SIGUSR1"] * int(job["Restarts"]) + ["finished"], run.log()
    every_step_once(run, 2600)


@nightly
def test_a_node_that_vanishes(tiny, tmp_path):
    """Three nodes, the job on two; one dies with everything on it. SLURM gives the job the third; it goes on."""
    lab = Cluster(hosts=3, slurmd_timeout=10)
    try:
        run = submit(lab, tiny.config, tmp_path / "run", *TWO)
        until(lambda: run.saved() >= 20, 90, run.log)
        assert lab.job(run.job)["NodeList"] == "node[1-2]"
        lab.cut("node2")
        restarted(lab, run, 1)
        job = lab.ended(run.job)
        assert job["JobState"] == "COMPLETED", run.log()
        assert job["NodeList"] == "node[1,3]"
        assert "from step 20" in run.log()
    finally:
        lab.down()
