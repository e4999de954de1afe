"""`doctor` on three real hosts: each planted fault is found by its name, on the host that has it, within its time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import Cluster, until
from tests.cluster.conftest import hosts
from tests.conftest import ROOT, TINY, TinySet, write_images

THREE = ("train.global_batch=12", "data.heldout_images=", "data.heldout_tokens=")
BOUND_SECONDS = 120
NAN_KERNEL = """
import importlib.abc, importlib.machinery, sys
class Planted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "beitforge.kernels.attention.sdpa":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        whole = spec.loader.exec_module
        def run(module):
            whole(module)
            right = module.attention_sdpa
            module.attention_sdpa = lambda qkv, bias: right(qkv, bias) * float("nan")
        spec.loader.exec_module = run
        return spec
sys.meta_path.insert(0, Planted())
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Cluster]:
    """Three hosts of these tests' own: what is planted in them is nobody else's."""
    with hosts(3) as cluster:
        yield cluster


@dataclass(frozen=True)
class Report:
    """What doctor said."""

    code: int
    seconds: float
    found: list[dict]
    output: str

    def at(self, host: str, check: str, level: str) -> str:
        """What was found on a host, all of one kind; fails when there is none."""
        lines = [f for f in self.found if (f["host"], f["check"], f["level"]) == (host, check, level)]
        assert lines, f"no {level} of {check} on {host}\n{self.output}"
        assert all(line["cure"] for line in lines)
        return "\n".join(line["what"] for line in lines)

    def only_on(self, check: str, *hosts: str) -> None:
        """Nobody else is blamed."""
        blamed = {f["host"] for f in self.found if f["check"] == check and f["level"] != "ok"}
        assert blamed == set(hosts), self.output


def hostfile(folder: Path, *hosts: str) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{host} slots=1\n" for host in hosts))
    return path


def started(lab: Cluster, config: Path, hosts: Path, *words: str, **environment: str) -> subprocess.Popen:
    return lab.popen("./launch.sh", "doctor", config, "--json", *words, HOSTFILE=str(hosts), **environment)


def report(process: subprocess.Popen, began: float) -> Report:
    output, _ = process.communicate(timeout=BOUND_SECONDS + 30)
    seconds = time.monotonic() - began
    start = output.find("{\n")
    assert start >= 0, output
    content, _ = json.JSONDecoder().raw_decode(output[start:])
    assert content["exit_code"] == process.returncode, output
    assert seconds < BOUND_SECONDS, output
    return Report(process.returncode, seconds, content["findings"], output)


def examined(lab: Cluster, config: Path, hosts: Path, *words: str, **environment: str) -> Report:
    began = time.monotonic()
    return report(started(lab, config, hosts, *words, **environment), began)


class Planted:
    """Changes to hosts, taken back in the end."""

    def __init__(self, lab: Cluster):
        self.lab, self.undo = lab, []

    def over(self, host: str, source: Path, target: Path | str) -> None:
        """A host sees `source` where others see `target`."""
        self.lab.run("mount", "--bind", source, target, host=host)
        self.undo.append((host, "umount", target))

    def small(self, host: str, folder: Path | str, size: str) -> None:
        self.lab.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder, host=host)
        self.undo.append((host, "umount", folder))

    def slow(self, host: str, rate: str) -> None:
        shaped = ["tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]
        self.lab.run("tc", "qdisc", "add", "dev", "eth0", "root", *shaped, host=host)
        self.undo.append((host, "tc", "qdisc", "del", "dev", "eth0", "root"))

    def another_clock(self, host: str, seconds: int) -> None:
        """For whatever is started over ssh from now on."""
        (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
        config = self.lab.folder / f"{host}.sshd"
        text = config.read_text()
        own = f"LD_PRELOAD={library} FAKETIME={seconds:+d}s FAKETIME_DONT_FAKE_MONOTONIC=1"
        config.write_text(f"{text}SetEnv {own}\n")
        self._reread(host)
        self.undo.append((host, config, text))

    def _reread(self, host: str) -> None:
        self.lab.run("kill", "-HUP", (self.lab.folder / f"{host}.pid").read_text().strip())
        until(lambda: self._answers(host), 10)

    def _answers(self, host: str) -> bool:
        process = self.lab.popen("ssh", host, "true")
        process.communicate(timeout=10)
        return process.returncode == 0

    def remove(self) -> None:
        for host, *words in reversed(self.undo):
            if isinstance(words[0], Path):
                words[0].write_text(words[1])
                self._reread(host)
            else:
                self.lab.run(*words, host=host)


@pytest.fixture
def planted(lab) -> Iterator[Planted]:
    changes = Planted(lab)
    yield changes
    changes.remove()


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


def test_hosts_that_cannot_take_part_are_named_before_any_rank_is_started(lab, tiny, planted, tmp_path):
    """Unreachable, 127.0.1.1, another version, an occupied port, another clock: each on a host of its own."""
    other = folder(tmp_path / "other")
    skewed = folder(other / "deepspeed-0.18.0.dist-info")
    (skewed / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.0\n")
    planted.over("node2", other, folder(tmp_path / "path"))
    (tmp_path / "names").write_text("127.0.0.1 localhost\n127.0.1.1 node3\n10.77.0.1 node1\n")
    planted.over("node3", tmp_path / "names", "/etc/hosts")
    planted.another_clock("node3", 600)
    listening = "import socket, time; s = socket.create_server(('', 29517)); print('on', flush=True); time.sleep(600)"
    holder = lab.popen(sys.executable, "-c", listening, host="node1")
    assert holder.stdout.readline() == "on\n"
    hosts = hostfile(tmp_path, "node1", "node2", "node3", "10.77.0.99")
    words = (*THREE, f"train.run={tmp_path}/run")
    try:
        found = examined(lab, tiny.config, hosts, *words, MASTER_PORT="29517", PYTHONPATH=f"{tmp_path}/path")
    finally:
        for process in lab.processes():
            if "29517" in process.command:
                os.kill(process.pid, signal.SIGKILL)
        holder.communicate(timeout=10)
    assert found.code == 2
    assert found.seconds < 40
    assert "cannot be reached over ssh" in found.at("10.77.0.99", "ssh", "stop")
    assert "deepspeed is 0.18.0 here" in found.at("node2", "versions", "stop")
    assert "node3 stands for 127.0.1.1" in found.at("node3", "host name", "stop")
    assert "600" in found.at("node3", "clock", "stop")
    said = found.at("node1", "port", "stop")
    assert "29517" in said
    assert "python" in said
    for check, host in (("ssh", "10.77.0.99"), ("versions", "node2"), ("host name", "node3"), ("clock", "node3")):
        found.only_on(check, host)
    assert not [process for process in lab.pythons() if "-m beitforge" in process.command]


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_what_is_wrong_on_one_host_alone_is_named_there(lab, tiny, planted, tmp_path):
    """Missing shard, stale index, wrong tokens, full disk, tiny shm, NaN kernel, too large a batch, in one go."""
    data = copied(tiny.folder, tmp_path / "data")
    images, run = data / "shards" / "train", folder(tmp_path / "run")
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny.config.read_text().replace(str(tiny.folder), str(data)))
    first, second = (sorted(images.glob("*.tar"))[i].stem for i in (0, 1))
    incomplete, stale = copied(images, tmp_path / "incomplete"), copied(images, tmp_path / "stale")
    (incomplete / f"{first}.tar").unlink()
    shutil.copy(images / f"{second}.index.safetensors", stale / f"{first}.index.safetensors")
    planted.over("node2", incomplete, images)
    planted.over("node3", stale, images)
    planted.over("node1", copied(data / "tokens" / "test", tmp_path / "wrong"), data / "tokens" / "train")
    planted.small("node1", run, "900k")
    planted.small("node3", "/dev/shm", "8m")
    (folder(tmp_path / "nan") / "sitecustomize.py").write_text(NAN_KERNEL)
    planted.over("node2", tmp_path / "nan", folder(tmp_path / "path"))
    hosts = hostfile(tmp_path, "node1", "node2", "node3")
    words = ("train.global_batch=12000000", "train.micro_batch=4000000", *THREE[1:], f"train.run={run}")
    found = examined(lab, config, hosts, *words, PYTHONPATH=f"{tmp_path}/path")
    assert found.code == 2
    assert f"{first}.tar is missing" in found.at("node2", "images", "stop")
    assert f"{first}.index.safetensors is not the index" in found.at("node3", "images", "stop")
    assert "does not list the image set's shards" in found.at("node1", "tokens", "stop")
    assert "KiB free" in found.at("node1", "disk", "stop")
    assert "8 MiB free in /dev/shm" in found.at("node3", "shm", "warning")
    assert "attention gives values that are not finite" in found.at("node2", "kernels", "stop")
    for host in ("node1", "node2", "node3"):
        assert "a micro batch of 4000000 takes about" in found.at(host, "memory", "stop")
    for check, blamed in (("tokens", "node1"), ("disk", "node1"), ("shm", "node3"), ("kernels", "node2")):
        found.only_on(check, blamed)
    found.only_on("images", "node2", "node3")
    # node1's run folder is its own: what the others write there it does not see
    found.only_on("run folder", "node2", "node3")


def test_a_slow_link_is_named(lab, tiny, planted, tmp_path):
    """Every pair with node2; and what that makes of a step."""
    planted.slow("node2", "4mbit")
    hosts = hostfile(tmp_path, "node1", "node2", "node3")
    found = examined(lab, tiny.config, hosts, *THREE, f"train.run={tmp_path}/run")
    assert found.code == 1, found.output
    said = found.at("node2", "network", "warning")
    assert "slowest pair between hosts" in said
    assert "on node2" in said
    slowest = re.search(r" with ([\d.]+) MB/s; median", said)
    assert slowest and float(slowest[1]) < 2, "there and back; 4 Mbit/s are half a megabyte, on one of the ways"
    assert "travel" in found.at("node1", "network", "warning")
    assert {f["check"] for f in found.found if f["level"] == "stop"} == set()


def test_a_dead_rank_is_named_and_not_waited_for(lab, tiny, tmp_path):
    """Stopped, as a process is that waits for a disk or a driver for ever: it says nothing and closes nothing."""
    hosts = hostfile(tmp_path, "node1", "node2", "node3")
    began = time.monotonic()
    process = started(lab, tiny.config, hosts, *THREE, f"train.run={tmp_path}/run", "--seconds", "60")
    until(lambda: any(p.rank == 2 for p in lab.processes()), 40)
    (victim,) = [p for p in lab.processes() if p.rank == 2]
    assert lab.host_of(victim) == "node3"
    time.sleep(6)
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        found = report(process, began)
    finally:
        os.kill(victim.pid, signal.SIGKILL)
    assert found.code == 2
    assert "rank" in {f["check"] for f in found.found if f["rank"] == 2 and f["level"] == "stop"}
    found.only_on("rank", "node3")
    until(lambda: not lab.ranks(), 30, lambda: str(lab.ranks()))


@pytest.fixture(scope="module")
def large_images(tmp_path_factory) -> TinySet:
    """Images of four megapixels for a model that eats hundreds a second: no decoder keeps up."""
    from beitforge.pipeline.config.loading import load_config
    from beitforge.pipeline.stages import tokenize
    from beitforge.pipeline.tokenizers.dvae import Dvae, save_dvae

    made = tmp_path_factory.mktemp("large")
    write_images(made / "images", 4, 2, size=(1800, 2400))
    command = [
        sys.executable,
        "-m",
        "beitforge",
        "pack",
        str(made / "images"),
        str(made / "shards"),
        "--workers",
        "1",
    ]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    data = {"images": str(made / "shards"), "tokens": str(made / "tokens"), "tokenizer": str(made / "tokenizer")}
    config = made / "large.yaml"
    config.write_text(yaml.safe_dump({"data": data, **TINY, "view": {"num_views": 1}}))
    loaded = load_config(str(config), [])
    save_dvae(made / "tokenizer", Dvae(loaded.tokenizer, seed=3), loaded.tokenizer)
    assert tokenize.run(loaded) == 0
    return TinySet(made, config)


def test_a_starved_loader_is_named(lab, large_images, tmp_path):
    hosts = hostfile(tmp_path, "node2")
    found = examined(lab, large_images.config, hosts, f"train.run={tmp_path}/run", "loader.workers=1")
    assert found.code == 1, found.output
    assert "it would wait for data" in found.at("node2", "loader", "warning")


def test_hosts_that_are_well_under_srun(lab, tiny, tmp_path):
    """Nothing to stop for; a real SLURM's SIGUSR1 arrives at every rank."""
    began = time.monotonic()
    words = (*THREE, f"train.run={tmp_path}/run", "--json")
    srun = ("srun", "-N3", "--ntasks-per-node=1", sys.executable, "-m", "beitforge", "doctor", "--rank", tiny.config)
    found = report(lab.popen(*srun, *words), began)
    assert found.code < 2, found.output
    unwell = {f["check"] for f in found.found if f["level"] != "ok"}
    assert unwell <= {"network", "loader", "step"}, (
        f"these are slow on a busy machine, and nothing else\n{found.output}"
    )
    arrived = [f["host"] for f in found.found if f["what"] == "SIGUSR1 arrives by SLURM"]
    assert sorted(arrived) == ["node1", "node2", "node3"]
    for check in ("images", "tokens", "digests", "disk", "storage", "shm", "host name", "clock", "limits"):
        assert {f["host"] for f in found.found if f["check"] == check} == {"node1", "node2", "node3"}, check
    for check in ("device", "kernels", "memory", "step", "loader"):
        assert {f["rank"] for f in found.found if f["check"] == check} == {0, 1, 2}, check


def test_a_job_is_looked_at_before_it_trains(lab, tiny, tmp_path):
    """The batch script runs doctor first: a well job trains, one with foreign tokens fails before its first step."""
    for name, more, state in (
        ("well", (), "COMPLETED"),
        ("ill", (f"data.tokens={tiny.folder}/tokens/test",), "FAILED"),
    ):
        words = ["slurm", tiny.config, *THREE[1:], f"train.run={tmp_path}/{name}", "train.duration=4 steps", *more]
        said = lab.run("./launch.sh", *words, "--nodes", "2", "--tasks-per-node", "1")
        job = said.split("submitted job ")[1].partition(":")[0]
        ended = lab.ended(job, 120)
        (log,) = (tmp_path / name / "slurm").glob("*.out")
        assert ended["JobState"] == state, log.read_text()
        table, _, training = log.read_text().partition("looked for")
        assert "node1" in table
        assert ("from step 0" in training) == (name == "well")
    assert "STOP    tokens, node1, node2: " in table
    assert not (tmp_path / "ill" / "config.yaml").exists()
