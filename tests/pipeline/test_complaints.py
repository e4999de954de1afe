"""Who says what went wrong, with real processes: what one rank meets alone is said, and nothing is said twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pipeline.test_doctor import free_port

HOST = os.uname().nodename


def ranks(verb: str, tiny, *words: str, second: tuple[str, ...], hosts: int = 2) -> list[tuple[int, str]]:
    """Exit code and stderr of two ranks, on so many hosts as far as they can see; the second with words of its own."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(2 // hosts), "GLOO_SOCKET_IFNAME": "lo"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, own in enumerate(((), second)):
        command = [sys.executable, "-m", "pipeline", verb, str(tiny.config), *words, *own]
        local = {"RANK": str(rank), "LOCAL_RANK": str(rank if hosts == 1 else 0)}
        environment = {**os.environ, **place, **local}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.fixture
def torn(tiny, tmp_path) -> Path:
    """The image set with every tar cut in half: opened as it should be, refused where it is read."""
    folder = shutil.copytree(tiny.folder / "shards" / "train", tmp_path / "torn")
    for tar in folder.glob("*.tar"):
        os.truncate(tar, tar.stat().st_size // 2)
    return folder


def trained(verb: str, tiny, tmp_path: Path, *words: str, second: str) -> list[tuple[int, str]]:
    section = {"pretrain": "train", "finetune": "finetune"}[verb]
    return ranks(verb, tiny, f"{section}.run={tmp_path}/run", *words, second=(second,))


@pytest.mark.parametrize(("verb", "setting"), [("pretrain", "data.images"), ("finetune", "data.labelled_images")])
def test_a_host_without_the_data(tiny, tmp_path, verb, setting):
    """The first rank names the host and the folder, and both end."""
    words = [f"data.labelled_images={tiny.folder}/shards/train"]
    first, other = trained(verb, tiny, tmp_path, *words, second=f"{setting}={tmp_path}/nowhere")
    assert (first[0], other[0]) == (2, 2), first[1] + other[1]
    (line,) = errors(first[1])
    assert line.startswith(f"error: host {HOST}: {tmp_path}/nowhere")
    assert "Traceback" not in first[1] + other[1] and errors(other[1]) == []


@pytest.mark.parametrize("setting", ["data.images", "train.init"])
def test_what_all_ranks_lack_is_said_once(tiny, tmp_path, setting):
    first, other = trained("pretrain", tiny, tmp_path, f"{setting}={tmp_path}/nowhere", second="data.seed=0")
    assert (first[0], other[0]) == (2, 2), first[1] + other[1]
    (line,) = errors(first[1])
    assert line.startswith(f"error: {tmp_path}/nowhere") and errors(other[1]) == []


def test_a_shard_that_one_rank_alone_cannot_read(tiny, tmp_path, torn):
    _, (code, said) = trained("pretrain", tiny, tmp_path, second=f"data.images={torn}")
    assert code == 2, said
    (line,) = errors(said)
    assert line.startswith(f"error: rank 1 on {HOST}: {torn}/shard-") and "Traceback" not in said


@pytest.mark.parametrize(
    ("differs", "named"),
    [("data.seed=5", "config"), ("data.images={folder}/other data.tokens=online", "image set and")],
    ids=["config", "images"],
)
def test_a_host_with_other_files(tiny, tmp_path, differs, named):
    """Each host's own would train well, and not on one permutation of one set."""
    shutil.copytree(tiny.folder / "shards" / "test", tmp_path / "other")
    second = differs.format(folder=tmp_path).split()
    first, other = ranks("pretrain", tiny, f"train.run={tmp_path}/run", second=tuple(second))
    assert (first[0], other[0]) == (2, 2), first[1] + other[1]
    (line,) = errors(first[1])
    assert line.startswith(f"error: host {HOST} has another {named}") and errors(other[1]) == []
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_tokenize_says_what_a_host_lacks(tiny, tmp_path):
    """Its processes never meet: the other host tells by itself, and a second process of the same host does not."""
    words = [f"data.tokens={tmp_path}/train", "data.heldout_images=", "data.heldout_tokens="]
    lacking = f"data.images={tmp_path}/nowhere"
    (_, whole), (code, said) = ranks("tokenize", tiny, *words, second=(lacking,))
    assert code == 2 and errors(whole) == []
    (line,) = errors(said)
    assert line.startswith(f"error: host {HOST}: {tmp_path}/nowhere")
    found = ranks("tokenize", tiny, *words, lacking, second=(), hosts=1)
    assert [code for code, _ in found] == [2, 2]
    ((line,), none) = [errors(said) for _, said in found]
    assert line.startswith(f"error: {tmp_path}/nowhere") and none == []


def test_tokenize_says_which_shard_it_could_not_read(tiny, tmp_path, torn):
    words = [f"data.tokens={tmp_path}/train", "data.heldout_images=", "data.heldout_tokens="]
    _, (code, said) = ranks("tokenize", tiny, *words, second=(f"data.images={torn}",))
    assert code == 2, said
    (line,) = errors(said)
    assert line.startswith(f"error: rank 1 on {HOST}: {torn}/shard-")
