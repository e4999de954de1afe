"""Curves of a run folder: what is drawn of what was logged, for every kind of training, and what is said of it."""

import re

import pytest

from beitforge.pipeline.reports.components import Section
from beitforge.pipeline.reports.curves import curves, gaps, survey, time_line
from beitforge.pipeline.reports.report import sections_of
from beitforge.pipeline.reports.summary import cards, header
from beitforge.pipeline.runs import record as record_module
from beitforge.pipeline.runs.record import TokenUse, by_kind, job_of, read_record
from tests.pipeline.runs.made_runs import config_of, lines_of, measured, start, tuned_lines, words, write_run


def record_of(tmp_path, lines, environment=None):
    write_run(tmp_path / "run", config_of(tmp_path), lines)
    if environment is not None:
        (tmp_path / "run" / "environment.json").write_text(environment)
    return read_record(tmp_path / "run", config_of(tmp_path), data=True)


def whole_page(record):
    return "\n".join(section.html for section in sections_of(record, [], Section("what-ran", "")))


def titles(html):
    return [" ".join(words(title).split()) for title in re.findall(r"<h3>(.*?)</h3>", html)]


def test_everything_that_is_measured_is_drawn(tmp_path):
    record = record_of(tmp_path, measured(lines_of(200, 200)))
    assert titles(curves(record).html)[1:] == [
        "Loss nats",
        "Masked accuracy",
        "Learning rate",
        "Gradient norm",
        "Throughput images/s",
        "Data wait share of time",
        "Memory GiB",
    ]
    assert titles(gaps(record).html) == ["Loss by what is new nats", "What being new costs nats"]
    assert titles(survey(record).html) == [
        "k-NN accuracy",
        "Entropy of predictions nats",
        "Codes in use perplexity",
        "Codes that occur",
        "Attention distance px",
    ]
    said = words(survey(record).html)
    assert "20 surveys inside the run, 4.0% of its time" in said and "step 200" in said and "step 10" in said
    said = words(cards(record).html)
    assert "4.0% of it evaluating" in said and "64.6%" in said and "perplexity of the predictions" in said


def test_what_was_not_measured_leaves_nothing(tmp_path):
    record = record_of(tmp_path, lines_of(20, 20))
    assert gaps(record).html == survey(record).html == time_line(record) == ""
    lines = [line for line in measured(lines_of(20, 20)) if line["kind"] != "new_view"]
    assert gaps(record_of(tmp_path, lines)).html == ""
    bare = [{"step": 10, "kind": "survey", "time": 1e9 + 60, "entropy": 2.0}]
    assert titles(survey(record_of(tmp_path, lines_of(20, 20) + bare)).html) == ["Entropy of predictions nats"]


@pytest.mark.parametrize(
    ("new", "seen", "heldout", "words_said"),
    [
        (2.01, 2.0, 2.5, "the 2 stored views of an image are enough so far"),
        (2.1, 2.0, 2.5, "more than 2 views of each would help little"),
        (2.4, 2.0, 2.5, "it memorises the 2 stored views"),
        (
            1.9,
            2.0,
            2.5,
            "costs −0.100 nats against one it was trained on, a held-out image +0.600 against a new view: the 2",
        ),
    ],
)
def test_the_gaps_say_whether_the_views_are_enough(tmp_path, new, seen, heldout, words_said):
    lines = lines_of(20, 20)
    for kind, loss in (("new_view", new), ("seen_view", seen), ("heldout", heldout)):
        lines.append({"step": 20, "kind": kind, "time": 1e9 + 200, "loss": loss, "samples": 9})
    assert words_said in words(gaps(record_of(tmp_path, lines)).html)


def test_the_time_line_shows_evaluations_skips_and_returns(tmp_path):
    """A run of 100 s that evaluated from 40 s to 50 s, left an update out at 60 s and went back at 80 s."""
    lines = [start(0, 40, 1000.0), {"step": 9, "kind": "train", "time": 1100.0, "loss": 1.0}]
    lines.insert(1, {"step": 4, "kind": "survey", "time": 1050.0, "seconds": 10.0, "share": 0.1, "entropy": 1.0})
    lines.insert(2, {"step": 5, "kind": "skip", "time": 1060.0, "row": 1.0})
    lines.insert(3, {"step": 7, "kind": "return", "time": 1080.0, "to": 2.0})
    html = time_line(record_of(tmp_path, lines))
    assert 'class="running" style="left:0.00%;width:100.00%"' in html
    assert 'class="evaluating" style="left:40.00%;width:10.00%"' in html
    assert 'class="skip" style="left:60.00%"' in html and 'class="return" style="left:80.00%"' in html
    assert "went back to step 2, went on with step 7" in html
    expected = "1 start, 1 min 40 s running in 1 min 40 s, 10.0% of it evaluating, 1 update left out, 1 return"
    assert expected in words(html)


def test_thousands_of_skips_do_not_fill_the_page(tmp_path):
    lines = [start(0, 9000, 1000.0)]
    lines += [{"step": i, "kind": "skip", "time": 1000.0 + i, "row": 1.0} for i in range(1, 9000)]
    assert len(time_line(record_of(tmp_path, lines))) < 100_000


def test_a_fine_tuning_is_reported_as_one(tmp_path):
    record = record_of(tmp_path, tuned_lines(60))
    assert record.job == "finetune" and record.tokens is None and record.notes == []
    assert titles(curves(record).html)[:3] == ["Loss nats", "Accuracy", "Learning rate"]
    said = words(header(record).html) + words(cards(record).html)
    for expected in ("BEiT fine-tuning", "It names 90.0% of 9 test images right", "top 5 95.0%", "at step 60"):
        assert expected in said, expected
    assert "masked" not in said
    whole = words(whole_page(record))
    assert "nan" not in whole and "Masked" not in whole


def test_a_tokenizer_training_is_reported_as_one(tmp_path):
    lines = [line for line in lines_of(20, 20) if line["kind"] != "heldout"]
    lines = [{**line, "reconstruction_mse": 0.01, "kl": 1.0, "usage_kl": 2.0} for line in lines]
    record = record_of(tmp_path, lines)
    assert record.job == "tokenizer"
    assert titles(curves(record).html)[:4] == ["Loss", "Squared error", "KL to uniform nats", "KL of code use nats"]
    assert "20.0 dB" in words(cards(record).html) and "dVAE training" in words(header(record).html)


def test_the_job_is_what_the_environment_says():
    tested = {"test": [{"loss": 1.0}], "train": [{"loss": 1.0}]}
    assert job_of({"job": "pretrain"}, tested) == "pretrain" and job_of({"job": "finetune"}, {}) == "finetune"
    assert job_of({}, tested) == "finetune" and job_of({"job": "?"}, {}) == job_of({}, {}) == "pretrain"


def test_of_a_step_logged_twice_the_last_line_counts():
    lines = [{"step": 4, "kind": "train", "x": 1}, {"step": 2, "kind": "train"}, {"step": 4, "kind": "train", "x": 2}]
    assert [line.get("x") for line in by_kind(lines)["train"]] == [None, 2]


def test_lines_that_are_not_what_they_should_be_are_passed_over(tmp_path):
    lines = [*lines_of(20, 20), {"kind": "train"}, {"step": "7", "kind": "train"}, {"step": 8, "time": "now"}]
    lines += [{"step": 9, "kind": "train", "time": 1e9, "loss": None}, {"step": 10, "kind": 3, "time": 1e9}]
    assert "nan" not in words(whole_page(record_of(tmp_path, lines))).lower()


def test_ten_thousand_steps_stay_a_small_page(tmp_path):
    """How long they take is benchmarks/training/watch.py's matter."""
    write_run(tmp_path / "run", config_of(tmp_path), measured(lines_of(200_000, 200_000, every=20), every=2000))
    html = whole_page(read_record(tmp_path / "run", config_of(tmp_path), data=True))
    assert len(html) < 1_000_000 and html.count("<figure") > 5


def test_who_has_counted_the_tokens_says_so(tmp_path):
    record = record_of(tmp_path, lines_of(20, 20))
    assert record.tokens is None and [note for note in record.notes if note.startswith("Token statistics")]
    use = TokenUse(used=3, vocabulary=8, entropy=1.0, majority=0.5, measured_apart=False)
    counted = record_module.record_of(tmp_path / "run", config_of(tmp_path), lines_of(20, 20), [], lambda: use)
    assert counted.tokens is use and not [note for note in counted.notes if note.startswith("Token statistics")]
