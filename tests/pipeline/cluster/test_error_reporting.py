"""Who says what went wrong, with real processes: what one rank meets alone is said, and nothing is said twice."""

import os
import shutil
from pathlib import Path

import pytest

from tests.ranks import free_port, run_each, run_ranks

HOST = os.uname().nodename


def ranks(verb: str, tiny, *words: str, second: tuple[str, ...], hosts=2, grace=15) -> list[tuple[int, str]]:
    """Exit code and stderr of two ranks, on as many hosts as they are told; the second with words of its own.

    Where one ended and the other waits for it, that one is killed after `grace` seconds, as by a launcher.
    """
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(2 // hosts), "GLOO_SOCKET_IFNAME": "lo"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    jobs = []
    for rank, own in enumerate(((), second)):
        local = {"RANK": str(rank), "LOCAL_RANK": str(rank if hosts == 1 else 0)}
        jobs.append((("beitforge", verb, "--rank", tiny.config, *words, *own), {**place, **local}))
    return [(done.returncode, done.stderr) for done in run_each(jobs, grace=grace)]


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.fixture
def torn(tiny, tmp_path) -> Path:
    """The image set with every tar but the first cut in half: opened as it should be, refused where it is read."""
    folder = shutil.copytree(tiny.folder / "shards" / "train", tmp_path / "torn")
    for tar in sorted(folder.glob("*.tar"))[1:]:
        os.truncate(tar, tar.stat().st_size // 2)
    return folder


def trained(verb: str, tiny, tmp_path: Path, *words: str, second: str) -> list[tuple[int, str]]:
    section = {"pretrain": "train", "finetune": "finetune"}[verb]
    return ranks(verb, tiny, f"{section}.run={tmp_path}/run", *words, second=(second,))


@pytest.mark.parametrize(("verb", "setting"), [("pretrain", "data.images"), ("finetune", "data.labelled_images")])
def test_a_host_without_the_data(tiny, tmp_path, verb, setting):
    """The first rank names the host and the folder, and both end."""
    words = [f"data.labelled_images={tiny.folder}/shards/train", "finetune.randaugment="]
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
    [
        (
            ["train.global_batch=7", "train.init=/nowhere", "checkpoint.every=7 steps"],
            [
                "train.global_batch is '7' and not '8'",
                "train.init is '/nowhere' and not ''",
                "checkpoint.every is '7 steps' and not '4 steps'",
            ],
        ),
        (["deepspeed.steps_per_print=7"], ["deepspeed is '{{\"steps_per_print\": 7}}' and not '{{}}'"]),
        (["data.images={folder}/other", "data.tokens=online"], ["image set is '", "token set is 'online"]),
        (
            ["data.heldout_images=", "data.heldout_tokens=", "data.labelled_images={tiny}/shards/train"],
            ["held-out image set is 'none' and not '", "labelled image set is '"],
        ),
    ],
    ids=["settings", "deepspeed", "images", "judged"],
)
def test_a_host_with_other_files(tiny, tmp_path, differs, named):
    """Each host's own would train well, and not on one permutation of one set; or ranks would wait for each other."""
    shutil.copytree(tiny.folder / "shards" / "test", tmp_path / "other")
    places = {"folder": tmp_path, "tiny": tiny.folder}
    second = tuple(word.format(**places) for word in differs)
    first, other = ranks("pretrain", tiny, f"train.run={tmp_path}/run", second=second)
    assert (first[0], other[0]) == (2, 2), first[1] + other[1]
    (line,) = errors(first[1])
    assert line.startswith(f"error: host {HOST}: ") and all(word.format(**places) in line for word in named)
    assert f"as on {HOST}, the host of the first rank" in line and errors(other[1]) == []
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_a_host_has_to_itself_may_differ(tiny, tmp_path):
    """The same sets elsewhere, loaded in another way; and the tokenizer, which only new views need."""
    shutil.copytree(tiny.folder / "shards", tmp_path / "there")
    second = (f"data.images={tmp_path}/there/train", f"data.heldout_images={tmp_path}/there/test", "loader.prefetch=3")
    second = (*second, f"data.tokenizer={tmp_path}/nowhere")
    found = ranks("pretrain", tiny, f"train.run={tmp_path}/run", "train.duration=4 steps", second=second)
    assert [code for code, _ in found] == [0, 0], found


def test_a_config_that_one_host_alone_has_wrong(tiny, tmp_path):
    """It cannot wait to meet the others: what to wait for is in the config."""
    run = f"train.run={tmp_path}/run"
    _, (code, said) = ranks("pretrain", tiny, run, second=("data.sed=3",), grace=1)
    assert code == 2
    (line,) = errors(said)
    assert line.startswith(f"error: host {HOST}: ") and "data.sed" in line and "Traceback" not in said


def test_a_run_folder_of_another_run_is_said_once(tiny, tmp_path):
    """The first rank alone looks at it, and the others end with it."""
    words = [f"train.run={tmp_path}/run", "train.duration=4 steps"]
    assert [code for code, _ in ranks("pretrain", tiny, *words, second=())] == [0, 0]
    first, other = ranks("pretrain", tiny, *words, "optimizer.lr=2e-3", second=("optimizer.lr=2e-3",))
    assert (first[0], other[0]) == (2, 2), first[1] + other[1]
    (line,) = errors(first[1])
    assert "optimizer.lr=0.001" in line and errors(other[1]) == [] and "Traceback" not in other[1]


def test_a_batch_that_does_not_divide_is_said_once(tiny, tmp_path):
    first, other = trained("pretrain", tiny, tmp_path, "train.global_batch=9", second="data.seed=0")
    assert (first[0], other[0]) == (2, 2), first[1] + other[1]
    (line,) = errors(first[1])
    assert "train.global_batch" in line and errors(other[1]) == []


@pytest.mark.parametrize("verb", ["pretrain", "tokenize"])
@pytest.mark.parametrize("rank", ["abc", "3"])
def test_a_rank_that_cannot_be_is_one_line(tiny, tmp_path, verb, rank):
    words = [f"train.run={tmp_path}/run", f"data.tokens={tmp_path}/tokens", "data.heldout_images="]
    command = ("beitforge", verb, "--rank", tiny.config, *words, "data.images=/nowhere")
    done = run_ranks(*command, environment={"RANK": rank, "WORLD_SIZE": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = errors(done.stderr)
    assert f"RANK is {rank!r}" in line if rank == "abc" else "RANK is 3 and WORLD_SIZE 1" in line


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


def test_tokenize_says_what_it_could_not_read(tiny, tmp_path, torn):
    """Each process says it of the shard it took."""
    words = [f"data.tokens={tmp_path}/train", "data.heldout_images=", "data.heldout_tokens=", f"data.images={torn}"]
    found = ranks("tokenize", tiny, *words, second=())
    assert [code for code, _ in found] == [2, 2], found
    ((first,), (second,)) = [errors(said) for _, said in found]
    assert first.startswith(f"error: {torn}/shard-") and second.startswith(f"error: rank 1 on {HOST}: {torn}/shard-")


@pytest.mark.parametrize("hosts", [1, 2])
def test_tokenize_says_whose_tokens_it_found(tiny, hosts):
    """Once a host: another view policy on both, or on the second alone."""
    words = [f"data.tokens={tiny.folder}/tokens/train", "data.heldout_images=", "data.heldout_tokens="]
    own = "view.area_min=0.5"
    first, second = ranks("tokenize", tiny, *words, *([own] if hosts == 1 else []), second=(own,), hosts=hosts)
    assert (first[0], second[0]) == (2 if hosts == 1 else 0, 2), first[1] + second[1]
    (line,) = errors(first[1]) + errors(second[1])
    assert "other view settings" in line
    assert line.startswith("error: /" if hosts == 1 else f"error: host {HOST}: ")
