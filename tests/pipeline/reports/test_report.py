"""The report of a run folder: what it reads, what it shows, and what it says when something is not there."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from beitforge.pipeline.data.batches import evaluation_batches
from beitforge.pipeline.data.pretraining import heldout, pretraining
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.evaluation.reconstructions import greyed, predicted_tokens, reconstructions
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.reports.curves import curves
from beitforge.pipeline.reports.provenance import what_ran
from beitforge.pipeline.reports.summary import cards, data_wait, header, probe
from beitforge.pipeline.runs.formatting import duration
from beitforge.pipeline.runs.jsonl import read_lines
from beitforge.pipeline.runs.record import read_record, sessions, token_use
from beitforge.pipeline.stages import report
from beitforge.pipeline.tokenizers.dvae import Dvae, save_dvae
from tests.conftest import ROOT
from tests.pipeline.runs.made_runs import (
    config_of,
    images_of,
    lines_of,
    make_sets,
    start,
    words,
    write_checkpoint,
    write_run,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Real shards, tokens and a tokenizer, made once; the folder and its config."""
    folder = tmp_path_factory.mktemp("made")
    return folder, make_sets(folder)


@pytest.fixture
def run(made, tmp_path):
    """A copy of the made folder with a finished run in it."""
    shutil.copytree(made[0], tmp_path / "all")
    config = config_of(tmp_path / "all")
    folder = tmp_path / "all" / "run"
    write_run(folder, config, lines_of(20, 20))
    write_checkpoint(folder, config, 20)
    return folder


def test_a_finished_run_with_everything(run, capsys):
    assert report.run([run], data=True) == 0
    html = (run / "report.html").read_text()
    said = words(html)
    for expected in ("finished", "20", "6.667 epochs of 12", "2.500", "from 3.400 at step 2", "3 min 20 s"):
        assert expected in said, expected
    assert html.count("<svg") == 7 and images_of(html, "images") == 8 * 5
    assert images_of(html, "attention") == 4 * 5 and images_of(html, "neighbours") == 6 * (1 + 5 + 5)
    assert "first 8 images of the held-out set, at step 20" in said and "missing" not in said
    assert len(html) < 1_200_000 and "report of step 20" in capsys.readouterr().err
    assert [path.name for path in run.iterdir() if ".partial" in path.name] == []


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path):
    with pytest.raises(ConfigError, match="is neither a run folder"):
        report.run([tmp_path])
    command = [sys.executable, "-W", "ignore", "-m", "beitforge", "report", str(tmp_path / "nowhere")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(report.__file__).parents[2], check=False)
    assert found.returncode == 2
    assert [
        line for line in found.stderr.splitlines() if line.startswith("error: ")
    ] and "Traceback" not in found.stderr


def test_a_run_of_which_nothing_else_is_there(tmp_path):
    """Not started, no shards, no tokenizer: a page that says so."""
    folder = tmp_path / "run"
    write_run(folder, config_of(tmp_path / "gone"), [])
    (folder / "metrics.jsonl").unlink()
    (folder / "environment.json").unlink()
    assert report.run([folder], data=True) == 0
    said = words((folder / "report.html").read_text())
    for expected in ("not started", "No step has been logged yet", "Held-out images are missing: "):
        assert expected in said, expected
    assert "Images are missing: " in said and "Token statistics" in said and "nan" not in said


@pytest.mark.parametrize(
    ("lost", "images", "line"),
    [
        (["run/checkpoints"], 3, "Predictions are missing: "),
        (["tokenizer"], 2, "Decoded tokens are missing: "),
        (["heldout_images"], 5, "Held-out images are missing: "),
        (["heldout_tokens"], 5, "Held-out images are missing: "),
        (["heldout_images", "images"], 0, "Images are missing: "),
        (["images"], 5, "Training images: "),
    ],
)
def test_what_is_gone_is_named_and_the_rest_is_shown(run, lost, images, line):
    for name in lost:
        shutil.rmtree(run.parent / name)
    assert report.run([run], data=True) == 0
    html = (run / "report.html").read_text()
    assert images_of(html, "images") == 8 * images
    assert line in words(html)
    origin = "training set" if "heldout" in lost[0] else "held-out set"
    assert images == 0 or f"first 8 images of the {origin}" in words(html)


def test_another_tokenizer_or_encoder_is_not_shown_as_this_one(run):
    config = config_of(run.parent)
    save_dvae(run.parent / "tokenizer", Dvae(config.tokenizer, seed=9), config.tokenizer)
    weights = run / "checkpoints" / "step-20" / "mp_rank_00_model_states.pt"
    torch.save({"module": {"decoder.weight": torch.zeros(3)}}, weights)
    state = json.loads((weights.parent / "state.json").read_text())
    (weights.parent / "state.json").write_text(json.dumps({**state, "files": {}}))
    assert report.run([run], data=True) == 0
    said = words((run / "report.html").read_text())
    assert "is not the tokenizer that" in said and "are no pretraining's" in said


def test_a_torn_checkpoint_is_named_and_the_one_before_is_shown(run):
    write_checkpoint(run, config_of(run.parent), 30)
    next((run / "checkpoints" / "step-30").glob("*.pt")).write_bytes(b"")
    (run / "checkpoints" / "step-40").mkdir()
    assert report.run([run], data=True) == 0
    said = words((run / "report.html").read_text())
    assert "checkpoint step-30 is not used" in said and "held-out set, at step 20" in said
    assert "its save was never finished" in said


def test_text_from_files_is_escaped(run):
    hostile = '<img src=x onerror="alert(1)">'
    bad = [{"sample": i, "shard": "s", "key": hostile, "reason": hostile, "substitute": "k"} for i in range(30)]
    (run / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    (run / "environment.json").write_text(json.dumps({"host": hostile, "command": [hostile], "x": {hostile: hostile}}))
    result = {"knn": 0.5, "linear": 0.75, "features": hostile}
    (run / "probe.json").write_text(json.dumps({"step": 20, "results": {hostile: result}}))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"# {hostile}\n{text}")
    assert report.run([run], data=True) == 0
    html = (run / "report.html").read_text()
    assert hostile not in html and html.count("&lt;img src=x") >= 45
    assert "30 replaced" in html and "and 10 more" in html and "75.0%" in html


def test_damaged_files_are_noted(run):
    (run / "probe.json").write_text('{"results": ')
    (run.parent / "tokenizer" / "measured.json").write_bytes(b"\xff\xfe")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "kind": "tr')
    assert report.run([run], data=True) == 0
    said = words((run / "report.html").read_text())
    assert "probe.json is damaged" in said and "measured.json is damaged" in said and "finished" in said


def test_ten_thousand_lines_stay_small(tmp_path):
    folder, draw = tmp_path / "run", random.Random(0)
    lines = lines_of(200_000, 200_000, every=20)
    for line in lines:
        if line["kind"] == "train":
            line |= {"loss": line["loss"] + draw.random(), "gradient_norm": draw.choice([1.0, 2.0, 1e4, float("inf")])}
    write_run(folder, config_of(tmp_path), lines)
    assert report.run([folder], data=True) == 0
    html = (folder / "report.html").read_text()
    assert len(html) < 500_000 and " not finite</b>" in html


def test_restarts_are_marked_and_their_work_is_counted(tmp_path):
    lines = lines_of(12, 40, time=1000.0) + lines_of(20, 40, begin=8, time=2000.0)
    write_run(tmp_path / "run", config_of(tmp_path), lines)
    record = read_record(tmp_path / "run", config_of(tmp_path), data=True)
    assert [(s.first_step, s.last_step, s.ended - s.started) for s in record.sessions] == [(0, 12, 120), (8, 20, 120)]
    assert record.step == 20 and record.seconds == 240 and not record.finished and record.samples_seen == 80
    html = curves(record).html
    assert html.count('class="mark" d="M400.0 0V1000"') == 7 and "2 starts, 4 min 0 s running in 18 min 40 s" in html
    said = re.sub(r"\s+", " ", words(what_ran(record, None, []).html))
    assert "0 → 12 4 2" in said and "8 → 20 0 2" in said and ">step 20 of 40<" in header(record).html


def test_a_start_that_finds_the_run_finished_is_no_restart():
    lines = [*lines_of(20, 20), start(20, 20, 5e9)]
    assert len(sessions(lines)) == 1
    assert sessions([start(20, 20, 1.0)]) and sessions([]) == []
    assert [s.world for s in sessions(lines[1:])] == [1], "lines before any start are a session too"


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n\xff\n{"a": NaN}\n')
    assert [list(line) for line in read_lines(path).lines] == [["a"], ["a"]]
    assert read_lines(tmp_path / "none").lines == []


def test_cards_of_the_numbers_that_matter(tmp_path):
    config = config_of(tmp_path)
    write_run(tmp_path / "run", config, lines_of(20, 20))
    (tmp_path / "tokenizer").mkdir()
    measured = {"used": 21, "vocabulary": 24, "perplexity": 17.4}
    (tmp_path / "tokenizer" / "measured.json").write_text(json.dumps(measured))
    said = words(cards(read_record(tmp_path / "run", config, data=True)).html)
    for expected in (
        "111",
        "25.0% of the time",
        "1.0 GiB",
        "21 of 24",
        "perplexity 17",
        "25.0%",
        "2.000",
        "9 images",
    ):
        assert expected in said, expected


def test_data_wait_is_a_share_of_time_not_of_lines():
    """100 samples at 100/s waiting half of it, 100 samples at 10/s waiting never: 0.5 s of 11 s."""
    assert data_wait([(100.0, 0.5), (10.0, 0.0)]) == pytest.approx(0.5 / 11)


def test_a_path_that_leads_elsewhere_is_one_line(tmp_path):
    """Through the front door; so it is for a rank of a job that meets it alone."""
    write_run(tmp_path / "run", config_of(tmp_path), lines_of(20, 20))
    command = [sys.executable, "-m", "beitforge", "report", str(tmp_path / "run"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {tmp_path}" in done.stderr and "is a folder" in done.stderr
    place = {"LOCAL_RANK": "1", "RANK": "1"}
    alone = subprocess.run(command, cwd=ROOT, env={**os.environ, **place}, capture_output=True, text=True, check=False)
    assert alone.returncode == 2 and f"error: rank 1 on {os.uname().nodename}: {tmp_path}" in alone.stderr


def test_the_probe_table(tmp_path):
    write_run(tmp_path / "run", config_of(tmp_path), [])
    assert probe(read_record(tmp_path / "run", config_of(tmp_path), data=True)).html == ""
    results = {
        who: {"knn": k, "linear": n, "features": "f"} for who, k, n in (("trained", 0.5, 0.6), ("raw", 0.2, 0.3))
    }
    content = {"step": 5, "test_samples": 1234, "classes": 7, "majority_class": 0.125, "results": results}
    (tmp_path / "run" / "probe.json").write_text(json.dumps(content))
    said = words(probe(read_record(tmp_path / "run", config_of(tmp_path), data=True)).html)
    for expected in ("1,234", "7 classes", "60.0%", "50.0%", "30.0%", "12.5%", "majority class"):
        assert expected in said, expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "7 s"), (250, "4 min 10 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h"), (-1, "0 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_majority_token_is_chosen_by_training_and_judged_apart(made):
    folder, config = made
    use = token_use(config)
    trained = np.concatenate([batch.tokens.flatten() for batch in epochs(config, pretraining(config), 2)])
    apart = np.concatenate([batch.tokens.flatten() for batch in epochs(config, heldout(config), 1)])
    counts = np.bincount(trained, minlength=24)
    assert use.used == (counts > 0).sum() and use.vocabulary == 24 and use.measured_apart
    share = counts[counts > 0] / counts.sum()
    assert use.perplexity == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    # one of the two views of each held-out image is in a pass; the statistic is over both
    assert use.majority == pytest.approx((apart == counts.argmax()).mean(), abs=0.1)
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout_tokens=str(folder / "none")))
    assert token_use(alone).majority == pytest.approx(share.max()) and not token_use(alone).measured_apart


def epochs(config, source, count):
    samples = source.samples * count
    return evaluation_batches(config, source, samples=samples, micro=4, rank=0, world=1)


def first_batch(config):
    return next(evaluation_batches(config, heldout(config), samples=6, micro=6, rank=0, world=1))


def test_predicted_tokens_are_the_likeliest_at_masked_patches_and_true_elsewhere(made):
    """A head that always says 7; masks of fewer patches than num_patches, so that some of its rows do not count."""
    _, config = made
    beit = Beit(config.model, config.tokenizer.vocabulary, seed=0)
    with torch.no_grad():
        beit.head.weight.zero_()
        beit.head.bias.zero_()[7] = 1.0
    batch = first_batch(config)
    mask = batch.draws["mask"]
    mask[0] = False
    mask[0, 3] = True
    assert torch.equal(predicted_tokens(config, beit, batch), torch.where(mask, 7, batch.tokens))
    dvae = Dvae(config.tokenizer, seed=0).eval()
    rebuilt = reconstructions(config, batch, dvae, beit)
    assert [sample.right for sample in rebuilt] == ((batch.tokens == 7) & mask).sum(dim=1).tolist()
    assert [sample.num_masked for sample in rebuilt] == mask.sum(dim=1).tolist()
    changed = [not np.array_equal(sample.decoded, sample.predicted) for sample in rebuilt]
    assert changed == ((batch.tokens != 7) & mask).any(dim=1).tolist()
    assert rebuilt[0].image.shape == (64, 64, 3) and rebuilt[0].decoded.shape == (32, 32, 3)
    without = reconstructions(config, batch, None, None)[0]
    assert without.decoded is without.predicted is without.right is None
    assert np.array_equal(without.masked, rebuilt[0].masked)


def test_masked_patches_show_nothing_of_the_image():
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.rand(2, 3, 12, 16, generator=draw) for _ in range(2))
    mask = torch.rand(2, 12, generator=draw) < 0.5
    spread = mask.view(2, 3, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)
    first, second = greyed(one, mask, 4), greyed(other, mask, 4)
    assert torch.equal(first[spread], second[spread]) and torch.equal(first[~spread], one[~spread])
