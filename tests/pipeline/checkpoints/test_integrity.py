"""A checkpoint is what was saved, bit for bit, or is not used: digests, who checks them, and what cannot be a state."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.checkpoints.choice import share
from beitforge.pipeline.cli import main
from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.checkpoints import STATE, NotWhole, SavedFile, State, damage, newest, read_state, sealed
from beitforge.pipeline.weights.encoder import trained_weights
from beitforge.shards.storage.reading import file_digest
from tests.pipeline.training.test_trainer import trained
from tests.ranks import run_ranks

NIGHTLY = bool(os.environ.get("BEITFORGE_NIGHTLY"))
SHORT = ["data.heldout_images=", "data.heldout_tokens=", "train.duration=4 steps", "optimizer.warmup=1 steps"]
SHORT += ["checkpoint.every=2 steps", "log.every_steps=1"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Two processes under ZeRO-2, with checkpoints of steps 2 and 4. Not to be changed."""
    run = tmp_path_factory.mktemp("saved") / "run"
    trained(tiny, run, *SHORT)
    return run


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def newest_of(run: Path) -> Path:
    return run / "checkpoints" / "step-4"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_a_weight(folder: Path, rank: int = 1) -> str:
    """Flip the top bit of the exponent of a number in the middle of a rank's part; the file's name."""
    path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    flip(path, 8 * (path.stat().st_size // 2 // 4 * 4 + 3) + 5)
    return path.name


def whole(folder: Path) -> bool:
    try:
        state = read_state(folder)
    except NotWhole:
        return False
    return not list(damage(folder, state, state.files, whole=True))


def test_every_flipped_bit_is_noticed(copy):
    """1,000 places: 100 in each file, and the others by size."""
    folder, random_ = newest_of(copy), random.Random(0)
    sizes = {path: 8 * path.stat().st_size for path in sorted(folder.iterdir())}
    assert len(sizes) == 4 and whole(folder)
    places = [(path, random_.randrange(bits)) for path, bits in sizes.items() for _ in range(100)]
    chosen = random_.choices(list(sizes), sizes.values(), k=1000 - len(places))
    places += [(path, random_.randrange(sizes[path])) for path in chosen]
    missed = []
    for path, bit in places:
        flip(path, bit)
        if whole(folder):
            missed.append((path.name, bit))
        flip(path, bit)
    assert len(places) == 1000 and missed == []
    assert whole(folder)


def test_no_flip_in_the_state_makes_another_state(copy):
    """All bits of its end, where its own digest is, and a good part of the others."""
    path = newest_of(copy) / STATE
    content = path.read_bytes()
    bits = 8 * len(content)
    for bit in {*range(bits - 8 * 60, bits), *random.Random(1).sample(range(bits), 500)}:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(NotWhole, match=STATE):
            read_state(path.parent)


@pytest.mark.parametrize("processes", [1, 2], ids=["laid out anew", "same shape"])
def test_a_restart_takes_the_one_before(tiny, run, copy, processes):
    """And ends where it would have ended; the file of the last rank, which the first does not read."""
    name = flip_a_weight(newest_of(copy))
    output = trained(tiny, copy, *SHORT, processes=processes)
    assert f"checkpoint step-4 is not used: {name} is damaged" in output and "from step 2" in output
    if processes == 2:  # the last save of a resumed run is that of an unbroken one
        assert all((newest_of(copy) / name).read_bytes() == (newest_of(run) / name).read_bytes() for name in files(run))


def files(run: Path) -> list[str]:
    return sorted(path.name for path in newest_of(run).iterdir())


def test_every_reader_takes_the_one_before(tiny, copy, capsys, tmp_path):
    name = flip_a_weight(newest_of(copy))
    line = f"checkpoint step-4 is not used: {name} is damaged"
    assert main(["export", str(copy), str(tmp_path / "out")]) == 0
    assert line in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["step"] == 2
    assert main(["report", str(copy), "--data"]) == 0
    assert line.partition(" is")[2] in (copy / "report.html").read_text(encoding="utf-8")
    sets = [str(tiny.folder / "shards" / part) for part in ("train", "test")]
    assert main(["probe", str(copy), *sets]) == 0
    assert json.loads((copy / "probe.json").read_text())["step"] == 2
    assert line in capsys.readouterr().err
    tuning = [f"data.labelled_images={sets[0]}", f"finetune.init={copy}", "finetune.duration=1 steps"]
    tuning += ["finetune.global_batch=8", "finetune.warmup=0 steps", "finetune.input_size=32", "data.labelled_test="]
    output = trained(tiny, tmp_path / "tuned", *tuning, "finetune.randaugment=", verb="finetune")
    assert line in output and f"starting from step 2 of {copy}" in output


def test_a_run_does_not_begin_anew_over_damaged_checkpoints(tiny, copy):
    flip_a_weight(newest_of(copy), rank=0)
    flip(copy / "checkpoints" / "step-2" / STATE, 100)
    output = trained(tiny, copy, *SHORT, code=2)
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert (
        "has no checkpoint to resume from (step-4: zero_pp_rank_0" in line
        and "step-2: its state.json is damaged" in line
    )
    assert f"remove {copy / 'checkpoints'} to begin again from step 0" in line
    assert output.count("error: ") == 1 and "Traceback" not in output
    with pytest.raises(ConfigError, match="no checkpoint that can be used"):
        trained_weights(copy)
    shutil.rmtree(copy / "checkpoints")
    assert "from step 0" in trained(tiny, copy, *SHORT)


def test_a_save_that_never_ended_is_no_damage(tiny, copy):
    """Killed in its first save, a run begins again."""
    for folder in (copy / "checkpoints").glob("step-*"):
        (folder / STATE).unlink()
    assert "from step 0" in trained(tiny, copy, *SHORT, processes=1)


def test_a_version_without_digests_is_read_and_said(copy, capsys):
    """Sizes alone, as before; whoever reads it says so."""
    for folder in (copy / "checkpoints").glob("step-*"):
        content = json.loads((folder / STATE).read_text())
        del content["digest"]
        content["files"] = {name: about["bytes"] for name, about in content["files"].items()}
        (folder / STATE).write_text(json.dumps(content, indent=1))
    said: list[str] = []
    found = newest(copy, said.append, whole=True)
    assert found is not None and found[1].step == 4
    assert said == [
        "checkpoint step-4 was saved by a version that took no digests: only the sizes of its files are checked"
    ]
    assert main(["verify", str(copy)]) == 0
    assert capsys.readouterr().out.count("took no digests") == 2


def test_each_file_is_one_ranks_to_check():
    names = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(64))]
    for world in (1, 3, 64, 100):
        shares = [share(names, rank, world) for rank in range(world)]
        assert sorted(name for mine in shares for name in mine) == sorted(names)
        assert max(map(len, shares)) <= -(-64 // world) + 1
    assert "zero_pp_rank_5_mp_rank_00_optim_states.pt" in share(names, 5, 64)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_digests_are_of_what_is_on_disk(tmp_path, asynchronous):
    """Taken while a file is written; torch.save writes it from its beginning to its end."""
    quiet_deepspeed()
    from beitforge.pipeline.distributed.file_writer import Writer

    writer = Writer()
    writer.asynchronous = asynchronous
    for number, size in enumerate((0, 1, 70_000, 3_000_000)):
        writer.save({"some": torch.arange(size), "name": "x" * size}, str(tmp_path / f"{number}.pt"))
    assert writer.wait() == ""
    taken = writer.take_written(tmp_path)
    assert taken == {
        path.name: SavedFile(bytes=path.stat().st_size, xxh3=file_digest(path)) for path in tmp_path.iterdir()
    }
    assert len(taken) == 4 and writer.take_written(tmp_path) == {}


@pytest.mark.parametrize("stage", range(4) if NIGHTLY else [3])
def test_the_same_run_gives_the_same_bytes(tiny, tmp_path, stage):
    """Every file of a checkpoint of three ranks, by whom nothing divides, whatever was in memory before."""
    settings = [*SHORT, "train.duration=2 steps", "train.global_batch=6", "train.micro_batch=2", "model.width=30"]
    contents = []
    for poison in ("7", "nan"):
        run = tmp_path / poison
        words = ["beitforge", "pretrain", "--rank", tiny.config, f"train.run={run}", f"train.zero_stage={stage}"]
        done = run_ranks("tests.pipeline.checkpoints.poisoned", poison, *words, *settings, processes=3)
        assert done.returncode == 0, done.stderr
        contents.append({path.name: path.read_bytes() for path in (run / "checkpoints" / "step-2").iterdir()})
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


BF16, OFFLOAD = "train.precision=bf16", "train.offload_optimizer=true"
SHAPES = [[BF16, "train.zero_stage=0"], [OFFLOAD, BF16, "train.zero_stage=3"], [OFFLOAD, "train.zero_stage=1"]]
SHAPES += [["train.zero_stage=0"], [BF16, "train.zero_stage=1"], ["train.zero_stage=3"]] if NIGHTLY else []


@pytest.mark.parametrize("settings", SHAPES, ids=" ".join)
def test_what_is_saved_after_a_restart_is_the_same_bytes(tiny, tmp_path, settings):
    """A run resumed from the checkpoint before writes what an unbroken one writes."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    trained(tiny, whole, *SHORT, *settings)
    shutil.copytree(whole, run)
    shutil.rmtree(newest_of(run))
    assert "from step 2" in trained(tiny, run, *SHORT, *settings)
    assert files(run) == files(whole)
    assert all((newest_of(run) / name).read_bytes() == (newest_of(whole) / name).read_bytes() for name in files(run))


# What cannot be a checkpoint, whoever wrote it.

GOOD = State(step=4, samples_seen=32, world=2, zero_stage=2, precision="fp32", images="", tokens="", config="")


def written(folder: Path, content: object) -> Path:
    """A checkpoint's folder with this as its state, its digest as it should be."""
    folder.mkdir(parents=True, exist_ok=True)
    body = json.dumps(content, indent=1).removesuffix("\n}")
    (folder / STATE).write_bytes(_with_seal(body.encode()))
    return folder


def _with_seal(body: bytes) -> bytes:
    from beitforge.pipeline.runs.checkpoints import _with_seal

    return _with_seal(body)


FIELDS = {
    "step": [-1, 1.5, True, "4", None, [], 10**30, 5],
    "samples_seen": [-1, 1e99, {}, 2**64],
    "world": [0, -3, "2"],
    "zero_stage": [4, -1, None],
    "precision": [1, None, "x" * 5000, []],
    "images": [{}, 0],
    "order": ["1", -1],
    "groups": ["ab", [1], [[1]], {"a": 1}, None],
    "files": [[], "x", {"a": -1}, {"a": "1"}, {"a": True}, {"a": {"bytes": 1}}, {"a": {"bytes": 1, "xxh3": "z" * 32}}],
    "another": [1],
}
OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "./a", "a/", STATE, "a\nb", "a\0b", "x" * 5000]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_a_state_of_another_kind_is_refused(tmp_path, name, value):
    content = json.loads(sealed(GOOD))
    del content["digest"]
    with pytest.raises(NotWhole) as caught:
        read_state(written(tmp_path / "step-4", {**content, name: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_outside_is_refused(tmp_path, name):
    content = json.loads(sealed(GOOD))
    content["files"] = {name: {"bytes": 0, "xxh3": "0" * 32}}
    del content["digest"]
    with pytest.raises(NotWhole, match="no file of a checkpoint"):
        read_state(written(tmp_path / "step-4", content))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"step":' * 50_000, b'{"step": ' + b"9" * 50_000 + b"}", b"null"],
    ids=lambda raw: str(raw[:9]),
)
def test_what_is_no_state_is_refused_in_a_line(tmp_path, raw):
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / STATE).write_bytes(raw)
    with pytest.raises(NotWhole) as caught:
        read_state(tmp_path / "step-4")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def _pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _link(path: Path, before: Path) -> None:
    path.symlink_to(before)


def _folder(path: Path, _: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("odd", [_pipe, _link, _folder])
@pytest.mark.parametrize("name", [STATE, "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_what_is_no_regular_file_is_not_opened(copy, tmp_path, odd, name):
    """Nor waited for: a pipe that nobody writes to. A link leads to the very bytes, outside of the folder."""
    path = newest_of(copy) / name
    path.rename(tmp_path / "before")
    odd(path, tmp_path / "before")
    said: list[str] = []
    found = newest(copy, said.append, whole=True)
    assert found is not None and found[1].step == 2
    assert len(said) == 1 and name in said[0] and "step-4 is not used" in said[0]


def test_a_file_behind_a_linked_folder_is_not_opened(tmp_path):
    folder = tmp_path / "step-4"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(b"secret")
    state = State(
        **{**vars(GOOD), "files": {"sub/a": SavedFile(bytes=6, xxh3=file_digest(tmp_path / "elsewhere" / "a"))}}
    )
    folder.mkdir()
    (folder / STATE).write_bytes(sealed(state))
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    (problem,) = damage(folder, read_state(folder), state.files, whole=True)
    assert "sub/a leads out of" in problem and "it was not read" in problem


def test_a_file_that_is_not_listed_is_not_read(copy):
    """Neither a part of a rank that there was none of, nor one that its state has lost."""
    folder, names = newest_of(copy), set(files(copy))
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(b"nothing")
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"nothing")
    state = read_state(folder)
    saved = zero_layout.open_checkpoint(folder, 2, state.groups, state.files)
    assert all(tensor.isfinite().all() for _, tensor in saved.weights())
    for lost in names - {STATE}:
        with pytest.raises(ConfigError, match="damaged"):
            dict(zero_layout.open_checkpoint(folder, 2, state.groups, names - {lost, STATE}).weights())


# verify RUN


def test_verify_finds_nothing_in_what_was_saved(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert "6 files of 2 checkpoints" in capsys.readouterr().out
    assert main(["verify", str(newest_of(run))]) == 0
    assert "3 files of 1 checkpoint, 0 lines of logs, clean" in capsys.readouterr().out


def test_verify_names_everything_that_is_wrong(copy, capsys):
    name = flip_a_weight(newest_of(copy))
    (newest_of(copy) / "stranger.pt").write_bytes(b"x")
    (copy / "checkpoints" / "step-2" / "mp_rank_00_model_states.pt").unlink()
    (copy / "checkpoints" / "step-3").mkdir()
    with open(copy / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('nonsense\n{"cut')
    os.mkfifo(copy / "skipped.jsonl")
    assert main(["verify", str(copy)]) == 2
    out = capsys.readouterr().out
    findings = [line for line in out.splitlines() if "never finished" not in line]
    assert f"{newest_of(copy)}: {name} is damaged (it holds other bytes than were saved)" in findings
    assert any("stranger.pt is not of this checkpoint" in line for line in findings)
    assert any("mp_rank_00_model_states.pt is missing" in line for line in findings)
    assert any("metrics.jsonl: line" in line and "no JSON object" in line for line in findings)
    assert f"{copy / 'skipped.jsonl'} is a FIFO: give a regular file" in findings
    assert len(findings) == 6 and findings[-1].startswith(f"{copy}: 5 findings in 6 files of 2 checkpoints")
    assert "step-3: its save was never finished" in out


def test_verify_of_a_run_takes_no_options_of_sets(run, capsys):
    assert main(["verify", str(run), "--decode"]) == 2
    assert "--images and --decode are for shard sets" in capsys.readouterr().err
