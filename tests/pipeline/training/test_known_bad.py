"""What a set says of its images is known before the first step, in every verb that reads one; the budget is for what is
not."""

import json
from pathlib import Path

import pytest

from beitforge.pipeline.cli import main
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.known_bad import known_lines
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.doctor.data import sets
from beitforge.pipeline.doctor.findings import OK, Local
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.folder import BadSamples
from beitforge.pipeline.stages import tokenize
from beitforge.shards.format.manifest import read_token_manifest, unreadable
from beitforge.shards.pack.adopt import adopt
from beitforge.shards.stream.image_set import ImageSet
from tests.ranks import run_ranks
from tests.shards.pack.test_known_bad import spoiled

OWN = {"pretrain": "train", "tokenizer": "tokenizer", "finetune": "finetune"}
APART = ["data.heldout_images=", "data.heldout_tokens=", "log.evaluation_share=0", "loader.workers=0"]


@pytest.fixture(scope="module")
def adopted(tmp_path_factory) -> Path:
    """48 adopted images of which 19 do not decode."""
    folder = spoiled(tmp_path_factory.mktemp("adopted") / "set")
    adopt(folder, 1)
    return folder


def flip(folder: Path, shard: int, row: int) -> str:
    """Change an image that was good when it was indexed; its key."""
    images = ImageSet(folder)
    known = images.row(shard, row)
    with open(folder / f"{images.manifest.shards[shard].name}.tar", "r+b") as file:
        file.seek(known.image_offset + known.image_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return images.index(shard).key(row)


def replaced(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["shard"], line["key"]))


@pytest.mark.parametrize("verb", ["pretrain", "tokenizer", "finetune"])
def test_a_run_says_how_many_and_charges_none(tiny, adopted, tmp_path, verb):
    """With a budget of nothing, over more than an epoch, the same by one rank and by two."""
    lists = []
    for world in (1, 2) if verb == "pretrain" else (1,):
        run = tmp_path / str(world) / "training"
        given = [verb, "--rank", str(tiny.config), *APART, f"data.images={adopted}", "data.tokens=online"]
        given += ["data.bad_sample_budget=0", f"data.labelled_images={adopted}"]
        own = [f"{OWN[verb]}.{setting}" for setting in ("duration=8 steps", "global_batch=8", "micro_batch=4")]
        if verb == "pretrain":
            own += [f"train.run={run}", "data.labelled_images="]
        elif verb == "tokenizer":
            own += ["tokenizer.warmup=2 steps", f"data.tokenizer={run.parent}"]
        else:
            own += [f"finetune.{setting}" for setting in ("warmup=2 steps", "mixup=0", "cutmix=0", "randaugment=")]
            own += ["finetune.input_size=32", f"finetune.run={run}"]
        done = run_ranks("beitforge", *given, *own, processes=world)
        assert done.returncode == 0, done.stderr
        assert "19 of 48 images (39.58%) do not decode, known since it was indexed" in done.stderr
        assert all(line["known"] for line in replaced(run))
        lists.append([(line["shard"], line["key"], line["substitute"]) for line in replaced(run)])
    assert len(lists[0]) == 19 and all(each == lists[0] for each in lists)


def test_what_was_not_known_is_charged_through_stops_and_other_worlds(tiny, tmp_path):
    """Two images changed after the set was indexed: a budget of one is spent, by the same image in every world; raised,
    the run resumes with what the list says."""
    folder = spoiled(tmp_path / "set")
    adopt(folder, 1)
    keys = {flip(folder, 0, 5), flip(folder, 2, 9)}
    run = tmp_path / "run"
    given = ["beitforge", "pretrain", "--rank", str(tiny.config), *APART, f"data.images={folder}", f"train.run={run}"]
    given += ["data.tokens=online", "train.duration=8 steps", "checkpoint.every=2 steps", "log.every_steps=20"]
    for world in (2, 1):
        ended = run_ranks(*given, "data.bad_sample_budget=0.02", processes=world)  # of 48, rounded up: one
        assert ended.returncode == 2, ended.stderr
        assert "2 samples that were not known to be bad could not be used, more than the 1 of" in ended.stderr
        assert "`verify --decode` finds them all" in ended.stderr
    done = run_ranks(*given, "data.bad_sample_budget=0.04", processes=2)
    assert done.returncode == 0, done.stderr
    assert {line["key"] for line in replaced(run) if not line["known"]} == keys
    assert len(replaced(run)) == 21


def test_the_budget_is_as_the_list_says(tmp_path):
    """Lines of the version before say in words which were known; a line twice counts once; a cut one not at all."""
    lines = [
        {"shard": "0", "key": "a", "reason": "0 a: does not decode (known since it was indexed)"},
        {"shard": "0", "key": "b", "reason": "0 b: the bytes differ from what was packed (checksum)"},
        {"shard": "0", "key": "c", "reason": "x", "known": True},
        {"shard": "0", "key": "d", "reason": "x", "known": False},
        {"shard": "0", "key": "d", "reason": "x", "known": False},
        {"shard": "0", "key": "e", "reason": 3, "known": "yes"},
    ]
    (tmp_path / "bad_samples.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"shard": "0", "k'
    )
    kept = BadSamples(tmp_path, 100, 0.03)
    assert (kept.charged, kept.limit, kept.exhausted) == (3, 3, False)
    kept.add([lines[0], {"shard": "1", "key": "a", "reason": "", "known": True}])
    assert not kept.exhausted
    kept.add([{"shard": "2", "key": "a", "reason": "", "known": False}])
    assert kept.exhausted and "4 samples that were not known" in kept.over_budget()
    again = BadSamples(tmp_path, 100, 0.03)
    assert (again.charged, again.listed) == (4, kept.listed)


def test_tokenize_holds_what_it_cannot_read_against_the_budget(tiny, tmp_path, capsys):
    """What the index knows is skipped. What it does not is named with its reason, and stops the set at the budget; a
    training then knows it, too, and is charged nothing for it."""
    folder = spoiled(tmp_path / "set")
    adopt(folder, 1)
    key = flip(folder, 0, 5)
    words = [*APART, f"data.images={folder}", f"data.tokens={tmp_path / 'tokens'}"]
    with pytest.raises(
        ConfigError, match=rf"1 images of .*\(the first: 0 {key}\), more than the 0 of .*remove 0.safete"
    ):
        tokenize.run(load_config(str(tiny.config), [*words, "data.bad_sample_budget=0"]))
    said = capsys.readouterr().err
    assert "19 of 48 images (39.58%) do not decode" in said
    assert f"0 {key}: cannot be read (0 {key}: the bytes differ" in said and said.count("cannot be read") == 1
    assert not (tmp_path / "tokens" / "manifest.json").exists()
    config = load_config(str(tiny.config), [*words, "data.bad_sample_budget=0.02"])
    assert tokenize.run(config) == 0
    assert unreadable(read_token_manifest(tmp_path / "tokens")) == 1
    assert [line.partition(": ")[2][:12] for line in known_lines(pretraining(config))] == [
        "19 of 48 ima",
        "1 more could",
    ]
    run = tmp_path / "run"
    given = ["pretrain", "--rank", str(tiny.config), *words, "train.duration=8 steps", f"train.run={run}"]
    done = run_ranks("beitforge", *given, "data.bad_sample_budget=0")
    assert done.returncode == 0, done.stderr
    assert "1 more could not be tokenized" in done.stderr
    paired = ["verify", str(tmp_path / "tokens"), "--images", str(folder), "--workers", "1"]
    assert main(paired) == 0  # a row without an image has no box to be held against it
    assert "48 samples in 3 shards, 1 of them without tokens" in capsys.readouterr().out
    reasons = [line["reason"] for line in replaced(run) if line["known"]]
    assert len(reasons) == 20 and sum("has no tokens" in reason for reason in reasons) == 1


def test_a_probe_leaves_them_out(tiny, adopted, tmp_path):
    """On both of its sets; a substitute would be the same image in the fit and in the test. One that nothing was known
    of is named, and counts against the budget."""
    run = tmp_path / "run"
    given = ["pretrain", "--rank", str(tiny.config), *APART, f"data.images={adopted}", "data.tokens=online"]
    assert run_ranks("beitforge", *given, "train.duration=2 steps", f"train.run={run}").returncode == 0
    done = run_ranks("beitforge", "probe", str(run), str(adopted), "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "19 of 48 images (39.58%) do not decode" in done.stderr and "left out" not in done.stderr
    verdict = json.loads((run / "probe.json").read_text())
    assert verdict["train_samples"] + verdict["test_samples"] == 29
    folder = spoiled(tmp_path / "set")
    adopt(folder, 1)
    keys = [flip(folder, 0, 5)]
    done = run_ranks("beitforge", "probe", str(run), str(folder), "--epochs", "1")  # of 48, one is allowed
    assert done.returncode == 0 and f"0 {keys[0]}: left out (0 {keys[0]}: the bytes differ" in done.stderr, done.stderr
    keys.append(flip(folder, 2, 9))
    done = run_ranks("beitforge", "probe", str(run), str(folder), "--epochs", "1")
    assert done.returncode == 2 and "2 images of " in done.stderr and "more than the 1 of data.bad" in done.stderr


def test_sets_to_judge_by_are_said_too_and_doctor_sees_them(tiny, adopted, tmp_path):
    given = [str(tiny.config), f"data.heldout_images={adopted}", "data.tokens=online", "data.heldout_tokens=online"]
    run = ["train.duration=1 steps", f"train.run={tmp_path / 'run'}", "loader.workers=0"]
    done = run_ranks("beitforge", "pretrain", "--rank", *given, *run)
    assert done.returncode == 0 and done.stderr.count("19 of 48 images") == 1, done.stderr
    local = Local("here", 0)
    assert sets(load_config(given[0], given[1:]), 3.0, local) is not None
    said = [finding for finding in local.found if "19 of 48 images (39.58%) do not decode" in finding.what]
    assert [(finding.level, finding.check) for finding in said] == [(OK, "held-out")]


def test_plan_says_it(tiny, adopted):
    done = run_ranks("beitforge", "plan", str(tiny.config), f"data.images={adopted}", "--gpus", "1")
    assert done.returncode == 0 and "of which 19 do not decode and are replaced" in done.stdout, done.stderr
