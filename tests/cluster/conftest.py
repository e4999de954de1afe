"""The lab for these tests, once a session: real hosts and a real SLURM (lab/up.sh), or the reason why there is none.

BEITFORGE_CLUSTER=1 runs them and says that what they need has been installed: then only forbidden namespaces are a
reason to skip.
BEITFORGE_NIGHTLY=1 adds what takes minutes. PROCTRACK=linuxproc or cgroup chooses how SLURM tracks processes; by itself
it is cgroup where this machine allows that, as on real clusters.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from tests.cluster.cluster import Cluster, forbidden, missing, until

STEPS = 120  # some six seconds: long enough to be met in the middle
SETTINGS = (f"train.duration={STEPS} steps", "checkpoint.every=20 steps", "log.every_steps=1")
NO_HELDOUT = ("data.heldout_images=", "data.heldout_tokens=")

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="minutes: BEITFORGE_NIGHTLY=1")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two hosts."""
    with hosts(2) as lab:
        yield lab


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Cluster]:
    """A cluster of `count` hosts. Skips unless BEITFORGE_CLUSTER=1; with it fails where what it needs is missing."""
    if os.environ.get("BEITFORGE_CLUSTER") != "1":
        pytest.skip("takes minutes, as root: tests/cluster/install.sh, then BEITFORGE_CLUSTER=1")
    lacking = missing()
    if lacking:
        pytest.fail(f"BEITFORGE_CLUSTER=1, but {lacking}")
    reason = forbidden()
    if reason:
        pytest.skip(reason)
    lab = Cluster(hosts=count, proctrack=os.environ.get("PROCTRACK", ""))
    try:
        yield lab
    finally:
        lab.down()


@dataclass(frozen=True)
class Run:
    """A training on the tiny set and the job that does it."""

    folder: Path
    job: str = ""

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        lines = read_metrics(self.folder, "train")
        return lines[-1]["step"] if lines else 0

    def saved(self) -> int:
        """The newest complete checkpoint's step."""
        found = newest(self.folder, lambda _: None)
        return found[1].step if found else 0

    def log(self) -> str:
        """What the job has said so far, all its starts."""
        logs = sorted((self.folder / "slurm").glob("*.out"))
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)

    def weights(self) -> dict[str, torch.Tensor]:
        """float32, consolidated from every rank's part of the newest checkpoint."""
        found = newest(self.folder, lambda _: None)
        assert found is not None
        assert found[1].step == STEPS
        return dict(zero_layout.open_checkpoint(found[0], found[1].zero_stage, found[1].groups).weights())

    def reaches(self, step: int, seconds: float = 90) -> None:
        until(lambda: self.step() >= step, seconds, lambda: f"step {self.step()} of {step}\n{self.log()}")


def submit(cluster: Cluster, config: Path, run: Path, *options: str) -> Run:
    """`./launch.sh slurm CONFIG` with the settings of these tests; a job for tests of the training alone."""
    words = [f"train.run={run}", *SETTINGS, *NO_HELDOUT, "--no-doctor", *options]
    said = cluster.run("./launch.sh", "slurm", config, *words)
    job = re.search(r"submitted job (\d+)", said)
    assert job, said
    return Run(run, job[1])


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal."""
    assert left.keys() == right.keys()
    return [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]


FOUR = ("--nodes", "2", "--gpus-per-node", "2", "--time", "30")
TWO = ("--nodes", "2", "--tasks-per-node", "1")


@pytest.fixture(scope="session")
def whole(cluster, tiny, tmp_path_factory) -> Run:
    """A run that nothing disturbs: 2 nodes × 2 tasks, ZeRO-2."""
    run = submit(cluster, tiny.config, tmp_path_factory.mktemp("whole") / "run", *FOUR)
    job = cluster.ended(run.job)
    assert job["JobState"] == "COMPLETED", run.log()
    assert "from step 0" in run.log()
    return run
