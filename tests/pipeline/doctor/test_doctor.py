"""`doctor` on one machine: what each check finds, what it must not find, and how the findings become a verdict.

tests/cluster/test_doctor.py plants the faults that need several hosts.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from beitforge.pipeline.cluster.environment import RankInfo
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data import pretraining
from beitforge.pipeline.doctor import data as checks_data
from beitforge.pipeline.doctor import device, findings, network
from beitforge.pipeline.doctor import host as checks_host
from beitforge.pipeline.doctor.findings import (
    OK,
    STOP,
    WARNING,
    Finding,
    Local,
    Report,
    from_line,
    to_line,
    to_text,
    worst,
)
from beitforge.pipeline.doctor.network import Pair, Speeds
from beitforge.pipeline.model.beit import Beit
from beitforge.shards.lanes import suiting_lanes
from beitforge.shards.storage.remote import Remote
from tests.conftest import ROOT, TinySet
from tests.ranks import free_port, run_ranks

ALONE = RankInfo(rank=0, size=1, local_rank=0, local_size=1, threads=1)
CPU = torch.device("cpu")


def found(local: Local, check: str, level: str) -> str:
    """What a check has found at a level; every line of it has a cure."""
    lines = [finding for finding in local.found if (finding.check, finding.level) == (check, level)]
    assert lines, local.found
    assert level == OK or all(line.cure for line in lines)
    return "\n".join(line.what for line in lines)


def doctor(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """`beitforge doctor --rank …`."""
    return run_ranks("beitforge", "doctor", "--rank", *words, environment=environment, seconds=120)


def test_under_the_launcher(tiny, tmp_path):
    """Two ranks, one report: the table, what was measured, the verdict; nothing is left in the run folder."""
    words = [str(ROOT / "launch.sh"), "doctor", str(tiny.config), f"train.run={tmp_path}/run"]
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    header, row = done.stdout.splitlines()[:2]
    assert header.split() == ["node", *(title for title, _ in findings.COLUMNS)]
    assert row.split()[0] == socket.gethostname()
    assert "slowest pair within a host" in done.stdout
    assert "the model eats" in done.stdout
    assert "Traceback" not in done.stderr
    assert findings.MARK not in done.stdout
    assert f"\n{findings.VERDICTS[done.returncode].upper()} (looked for " in done.stdout
    assert list((tmp_path / "run").iterdir()) == []


def test_a_rank_that_never_starts_is_named(tiny, tmp_path):
    """Rank 0 alone of two: it names the other within the time it is given, and ends."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port()), findings.HOSTS: "here=1,there=1", "GLOO_SOCKET_IFNAME": "lo"}
    began = time.monotonic()
    done = doctor(tiny.config, f"train.run={tmp_path}/run", "--json", "--seconds", 20, **place)
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - began < 45
    content = json.loads(done.stdout)
    assert content["verdict"] == "stop"
    (lost,) = [finding for finding in content["findings"] if finding["check"] == "rank"]
    assert (lost["host"], lost["rank"], lost["level"]) == ("there", 1, "stop")
    assert "never started" in lost["what"]


def test_an_occupied_port_is_named_with_who_has_it(tiny, tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert f"(process {os.getpid()})" in checks_host.port_in_use(port)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = doctor(tiny.config, f"train.run={tmp_path}/run", **meeting)
    assert done.returncode == 2, done.stderr
    assert f"port {port}, where the ranks meet, is in use by" in done.stdout
    assert checks_host.port_in_use(free_port()) == ""


def test_a_wrong_config_is_one_line(tiny):
    done = doctor(tiny.config, "model.heads=7")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "model.heads 7" in line


@pytest.fixture
def data(tiny, tmp_path) -> TinySet:
    """A copy of the tiny set to damage."""
    folder = tmp_path / "data"
    shutil.copytree(tiny.folder, folder)
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny.config.read_text().replace(str(tiny.folder), str(folder)))
    return TinySet(folder, config)


def looked_at(data: TinySet, *overrides: str) -> Local:
    local = Local("here", 0)
    checks_data.sets(load_config(str(data.config), list(overrides)), 3.0, local)
    return local


def first_shard(data: TinySet, kind: str = "shards/train", ending: str = ".tar") -> Path:
    return sorted((data.folder / kind).glob(f"*{ending}"))[0]


def test_a_well_set_has_no_fault(data):
    local = looked_at(data)
    assert worst(local.found) == 0, local.found
    assert "50 images" in found(local, "images", OK)
    assert "random images" in found(local, "digests", OK)


def test_images_to_judge_by_that_are_trained_on(data):
    """By their bytes, in the held-out and the labelled sets; shards and time for them are bounded."""
    assert "repeat the bytes of another: 0 of 50 images of data.images" in found(looked_at(data), "equal", OK)
    train, test = data.folder / "shards/train", data.folder / "shards/test"
    both = looked_at(data, f"data.heldout_images={train}", f"data.heldout_tokens={data.folder}/tokens/train")
    assert "50 of 50 images of data.heldout_images are byte for byte in data.images" in found(both, "equal", WARNING)
    labelled = looked_at(data, f"data.labelled_images={test}", f"data.labelled_test={test}")
    assert "10 of 10 images of data.labelled_test are byte for byte in data.labelled_images" in found(
        labelled, "equal", WARNING
    )


def test_a_missing_shard(data):
    first_shard(data).unlink()
    assert f"{first_shard(data).name[:3]}" in found(looked_at(data), "images", STOP)
    assert "is missing" in found(looked_at(data), "images", STOP)


def test_a_shard_cut_short(data):
    path = first_shard(data)
    os.truncate(path, path.stat().st_size - 512)
    assert "the manifest says" in found(looked_at(data), "images", STOP)


def test_a_stale_index(data):
    first, second = sorted((data.folder / "shards/train").glob("*.index.safetensors"))[:2]
    shutil.copy(second, first)
    assert f"{first} is not the index" in found(looked_at(data), "images", STOP)


def test_images_that_are_not_what_was_packed(data):
    """Same size, same index: only reading shows it."""
    for path in (data.folder / "shards/train").glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[700::1500] = bytes(byte ^ 1 for byte in content[700::1500])
        path.write_bytes(content)
    assert "checksum" in found(looked_at(data), "digests", WARNING)


def test_tokens_of_other_images(data):
    local = looked_at(data, f"data.tokens={data.folder}/tokens/test")
    assert "does not list the image set's shards" in found(local, "tokens", STOP)


def test_tokens_with_other_settings(data):
    assert "view.num_views" in found(looked_at(data, "view.num_views=4"), "tokens", STOP)


def test_a_token_file_cut_short(data):
    path = first_shard(data, "tokens/train", ".safetensors")
    os.truncate(path, path.stat().st_size - 8)
    assert str(path) in found(looked_at(data), "tokens", STOP)


def test_damaged_tokens(data):
    """One bit of every row; no tensor's shape or key shows it."""
    for path in (data.folder / "tokens/train").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + length])["tokens"]
        views, samples, patches = entry["shape"]
        for row in range(views * samples):
            content[8 + length + entry["data_offsets"][0] + 2 * patches * row] ^= 1
        path.write_bytes(content)
    assert "its checksum differs" in found(looked_at(data), "digests", STOP)


def test_labelled_sets_are_looked_at_too(data):
    """There, and whole."""
    where = [f"data.labelled_images={data.folder}/shards/train", f"data.labelled_test={data.folder}/shards/test"]
    assert found(looked_at(data, *where), "labelled", OK).count("opened") == 2
    first_shard(data, "shards/test").unlink()
    assert "is missing" in found(looked_at(data, *where), "labelled", STOP)
    assert "none" in found(looked_at(data, f"data.labelled_images={data.folder}/none"), "labelled", STOP)


def test_no_set_at_all(data):
    assert "nowhere does not exist" in found(looked_at(data, "data.images=nowhere"), "images", STOP)


def test_room_for_checkpoints(tiny, tmp_path, monkeypatch):
    """Two must fit, or it stops; all that are kept and one more, or it warns."""
    config = load_config(str(tiny.config), [f"train.run={tmp_path}/run"])
    free = [0.0]
    monkeypatch.setattr(checks_data.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free[0]))
    for free[0], level in ((1.5e6, STOP), (2.5e6, WARNING), (4e6, OK)):
        local = Local("here")
        checks_data.check_disk_space(config, 1_000_000, local)
        assert "a checkpoint takes" in found(local, "disk", level)


def test_what_nodes_read_of_a_remote_set(tiny, monkeypatch):
    """Three nodes of eight on lanes that they share read it three times; the number that cures it is the plan's, and
    the cache is what the simulation says."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for lanes, cache, lines in ((256, 100, ["lanes"]), (384, 100, []), (384, 1e-5, ["cache"])):
        config = load_config(str(tiny.config), [f"loader.lanes={lanes}", f"data.cache_gb={cache}"])
        source, place = (
            pretraining.pretraining(config),
            RankInfo(rank=0, size=24, local_rank=0, local_size=8, threads=0),
        )
        for folder, expected in ((source.stream.images.folder, []), (Remote("https://example.org/set"), lines)):
            local = Local("here")
            source.stream.images.folder = folder
            checks_data.check_lanes(config, source, place, local)
            assert [finding.check for finding in local.found] == expected
            if expected == ["lanes"]:
                assert "24 ranks, 8 a node, together read the set 3.0 times" in found(local, "lanes", WARNING)
                assert (
                    local.found[0].cure == f"set loader.lanes={suiting_lanes(256, 24, 8)} in a run that has not begun"
                )
            if expected == ["cache"]:
                assert "set data.cache_gb=1," in local.found[0].cure


def test_a_small_shm(monkeypatch):
    monkeypatch.setattr(checks_host.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 64 << 20))
    for ranks, gpus, level in ((1, True, OK), (2, True, STOP), (2, False, WARNING)):
        local = Local("here")
        checks_host.shared_memory(ranks, gpus, local)
        assert "64 MiB free" in found(local, "shm", level)


def test_the_hosts_own_name(monkeypatch):
    """127.0.1.1 stops gloo between hosts, and nothing else."""
    cases = (("127.0.1.1", True, True, {}, STOP), ("127.0.1.1", True, False, {}, WARNING))
    cases += (("127.0.1.1", False, True, {}, OK), ("10.0.0.1", True, True, {}, OK))
    cases += (("127.0.1.1", True, True, {"GLOO_SOCKET_IFNAME": "eth0"}, WARNING),)
    for address, several, gloo, environment, level in cases:
        monkeypatch.setattr(checks_host.socket, "gethostbyname", lambda _, address=address: address)
        local = Local("here")
        checks_host.own_address(several, gloo, environment, local)
        assert address in found(local, "host name", level)


def test_what_differs_between_hosts():
    """The minority is named; of two hosts the second; a driver warns, torch stops."""
    same = {"torch": "2.13", "driver": "570"}
    three = checks_host.compare_hosts({"a": same, "b": {**same, "torch": "2.12"}, "c": same})
    assert [(f.host, f.level) for f in three] == [("b", STOP)]
    assert three[0].what == "torch is 2.12 here and 2.13 on a, c"
    assert [(f.host, f.level) for f in checks_host.compare_hosts({"a": same, "b": {**same, "driver": "550"}})] == [
        ("b", WARNING)
    ]
    assert checks_host.compare_hosts({"a": same, "b": same}) == checks_host.compare_hosts({}) == []


def test_facts_are_those_of_the_config_and_the_code(tiny):
    facts = checks_host.facts(load_config(str(tiny.config), []))
    assert facts == checks_host.facts(load_config(str(tiny.config), []))
    other = checks_host.facts(load_config(str(tiny.config), ["train.zero_stage=3"]))
    assert {name for name in facts if facts[name] != other[name]} == {"config"}
    assert facts["torch"].startswith(torch.__version__.split("+")[0])


def test_clocks():
    offsets = {"a": (0.0, 0.5), "b": (-1.9, 0.5), "c": (-90.0, 0.5), "d": (400.0, 0.5)}
    assert [finding.level for finding in checks_host.clocks(offsets)] == [OK, OK, WARNING, STOP]


def test_signals_of_this_process():
    """A process that was started with SIGUSR1 blocked would never hear that its time is up."""
    code = "import os, signal; from beitforge.pipeline.doctor.host import Arrivals, own_signals\n"
    code += "from beitforge.pipeline.doctor.findings import *\n"
    code += "local = Local('here'); arrivals = Arrivals(); {}\n"
    code += "own_signals(arrivals, os.environ, local); print([f.what for f in local.found])"
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])"
    for line, words in (("pass", "[]"), (block, "SIGUSR1 blocked")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(line)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert words in done.stdout


def test_what_the_driver_says():
    """Rows as nvidia-smi prints them; what a card does not support it calls [N/A]."""
    cases = (("0", "0x0000000000000000", ""), ("[N/A]", "[N/A]", ""), ("3", "0x0000000000000004", "3 uncorrected ECC"))
    for errors, slowed, words in (*cases, ("0", "0x0000000000000048", "hardware slowdown, hardware thermal")):
        local = Local("here", 0)
        device.check_driver_row(["GPU-1", "80000", "81559", errors, slowed], local)
        assert words in " ".join(finding.what for finding in local.found)
        assert bool(local.found) == bool(words)


def test_memory_grows_with_the_batch_and_the_largest_that_fits_is_named(tiny):
    """What a few images take says what many do: of 8 it is what is measured of 8."""
    config = load_config(str(tiny.config), [])
    module = Beit(config.model, config.tokenizer.vocabulary, 0)
    cost = device.cost(config, module, CPU, 1)
    measured, _ = device._tried(config, module, CPU, 8)
    few, _ = device._tried(config, module, CPU, 2)
    assert measured - few == pytest.approx(6 * cost.image, rel=0.05)
    local = Local("here", 0)
    assert not device.fits(config, cost, 4096, 4096, cost.memory(2000), local)
    assert "a micro batch of 4096 takes about" in found(local, "memory", STOP)
    assert "train.micro_batch=1024 fits" in local.found[0].cure
    assert device.fits(config, cost, 512, 4096, cost.memory(2000), local)
    assert device.free_memory(ALONE, CPU) > 1e6


@pytest.mark.parametrize("ranks", [2, 3, 7, 8])
def test_every_pair_once_and_nobody_twice_a_round(ranks):
    rounds = network.rounds(list(range(ranks)))
    pairs = [pair for each in rounds for pair in each]
    assert sorted(pairs) == [(a, b) for a in range(ranks) for b in range(a + 1, ranks)]
    for each in rounds:
        assert len({rank for pair in each for rank in pair}) == 2 * len(each)


def speeds(rates: dict[tuple[int, int], float]) -> list[Speeds]:
    ranks = 1 + max(other for _, other in rates)
    mine = [[Pair(*pair, rate) for pair, rate in rates.items() if pair[0] == rank] for rank in range(ranks)]
    return [Speeds(1e9, 1e9, pairs) for pairs in mine]


def test_the_slow_host_is_named():
    """All pairs with it are slow; pairs within a host are not compared with those between hosts."""
    hosts = ["a", "a", "b", "c"]
    rates = {(0, 1): 2e11, (0, 2): 1e9, (1, 2): 1e9, (0, 3): 2e10, (1, 3): 2e10, (2, 3): 1.1e9}
    _, between, within = network.assess(speeds(rates), hosts)
    assert (between.level, between.host, within.level) == (WARNING, "b", OK)
    assert "rank 0 on a – rank 2 on b with 1.0 GB/s" in between.what
    rates |= {(0, 2): 1.5e10, (1, 2): 1.5e10, (2, 3): 1.5e10}
    assert worst(network.assess(speeds(rates), hosts)) == 0


def test_a_step_that_travels_more_than_it_computes():
    rates = speeds({(0, 1): 1e9})
    slow = network.share_of_step(rates, ["a", "b"], 1e9, 2, 1, 3.0)
    assert (slow.level, "a – b" in slow.what) == (WARNING, True)
    assert network.share_of_step(rates, ["a", "b"], 1e9, 2, 1, 9.0).level == OK


def test_ranks_by_host(monkeypatch):
    assert checks_host.hosts_by_rank({findings.HOSTS: "a=2,b=1"}, 3) == ["a", "a", "b"]
    assert checks_host.hosts_by_rank({}, 2) == ["", ""]


def test_findings_come_through_pdsh_as_they_were():
    """With the host's name before each line, among other lines; a first rank without a last word is a finding."""
    finding = Finding(level=WARNING, check="loader", host="b", what="slow – „10“", cure="faster", rank=3, value="1/s")
    report = Report(json=False)
    for line in (f"node1: {to_line(finding)}", "node1: something else", "x: doctor-line {broken"):
        assert not report.receive_line(line)
    assert report.found == [finding]
    report.close("node1")
    assert [f.check for f in report.found if f.level == STOP] == ["rank"]
    assert report.receive_line(f"node1: {findings.MARK}{findings.END}")
    assert from_line("doctor") is None


def test_the_report():
    """One row a node; the worst level is the verdict; what hosts have in common is one line; cures beside it."""
    slow = [Finding(level=WARNING, check="shm", host=host, what="small", cure="larger", value="1") for host in "ab"]
    well = [Finding(level=OK, check="step", host="a", rank=0, what="0.5 s for 8", value="0.50 s")]
    text = to_text([*slow, *well], 3.0)
    rows = [line.split() for line in text.splitlines()[1:3]]
    assert [row[0] for row in rows] == ["a", "b"]
    assert "0.50" in rows[0]
    assert "WARNING shm, a, b: small\n        → larger" in text
    assert text.endswith("GO WITH WARNINGS (looked for 3 s)")
    assert (worst(well), worst(slow), worst([])) == (0, 1, 0)
    content = json.loads(findings.to_json(slow, 3.0))
    assert (content["verdict"], content["exit_code"], len(content["findings"])) == ("go with warnings", 1, 2)


def test_a_made_up_batch_has_the_shapes_of_a_real_one(tiny):
    config = load_config(str(tiny.config), [])
    source = pretraining.pretraining(config)
    real = source.stream.batch(np.arange(4))
    made = device.synthetic_batch(config, 4, 0)
    for name, value in real._asdict().items():
        if torch.is_tensor(value) and name != "tokenizer_pixels":
            assert (value.shape, value.dtype) == (getattr(made, name).shape, getattr(made, name).dtype), name
    assert {n: (v.shape, v.dtype) for n, v in real.draws.items()} == {
        n: (v.shape, v.dtype) for n, v in made.draws.items()
    }
