"""`report A B C`: what differs, numbers side by side, a line a run; runs of any length and kind."""

import dataclasses
import json
import re

import pytest

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reports.comparison import names_of, sections_of, settings
from beitforge.pipeline.runs.record import read_record
from beitforge.pipeline.stages import report
from tests.pipeline.runs.made_runs import config_of, lines_of, measured, tuned_lines, words, write_run


@pytest.fixture
def runs(tmp_path):
    """Three runs: one with everything, a shorter one at another rate, a fine-tuning."""
    config = config_of(tmp_path)
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=7e-4))
    write_run(tmp_path / "a" / "run", config, measured(lines_of(200, 200)))
    write_run(tmp_path / "b" / "run", other, lines_of(60, 200))
    write_run(tmp_path / "tuned", config, tuned_lines(60))
    return [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "tuned"]


def records(runs):
    from beitforge.pipeline.weights.encoder import run_config

    return [read_record(run, run_config(run)) for run in runs]


def page_of(runs):
    return "\n".join(section.html for section in sections_of(records(runs)))


def rows(html, section):
    part = re.search(rf'(?s)<section id="{section}">.*?</section>', html).group()
    cells = [re.findall(r"(?s)<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"(?s)<tr>(.*?)</tr>", part)]
    return {row[0]: row[1:] for row in cells}


def test_only_what_differs_is_listed(runs):
    html = page_of(runs[:2])
    assert rows(html, "differences") == {"": ["a/run", "b/run"], "optimizer.lr": ["0.0015", "0.0007"]}
    (runs[1] / "environment.json").write_text(json.dumps({"host": "other", "versions": {"torch": "2.14"}}))
    found = rows(page_of(runs[:2]), "differences")
    assert found["host"] == ["box", "other"] and found["torch"] == ["2.13", "2.14"] and found["world"] == ["2", "–"]
    assert "train.run" not in settings(records(runs)[0]) and "finetune.lr" not in settings(records(runs)[0])


def test_numbers_stand_side_by_side_and_the_best_is_bold(runs):
    found = rows(page_of(runs), "numbers")
    assert found["steps"] == ["200", "60", "60"] and found["test accuracy"] == ["–", "–", "90.0%"]
    assert found["held-out loss"] == ["<b>2.600</b>", "2.700", "–"]
    assert found["k-NN inside the run"][1:] == ["–", "–"] and "linear probe" not in found


def test_probes_of_other_conditions_have_no_best(runs):
    def probed(run, fitted, linear):
        results = {"trained": {"linear": linear, "knn": 0.5}}
        (run / "probe.json").write_text(json.dumps({"train_samples": fitted, "test_samples": 50, "results": results}))

    probed(runs[0], 400, 0.6)
    probed(runs[1], 400, 0.7)
    assert rows(page_of(runs), "numbers")["linear probe"] == ["60.0%", "<b>70.0%</b>", "–"]
    probed(runs[1], 40, 0.7)
    found = rows(page_of(runs), "numbers")
    assert found["linear probe"] == ["60.0%", "70.0%", "–"]
    assert found["images the probe was fitted on"] == ["400", "40", "–"]


def test_every_chart_has_a_line_of_each_run_that_has_the_value(runs):
    html = page_of(runs)
    charts = {
        words(re.search("<h3>.*?</h3>", chart).group()).split(" nats")[0].strip(): chart
        for chart in re.findall(r"(?s)<figure.*?</figure>", html)
    }
    names = {title: re.findall(r'<li class="t(\d)">(.*?)</li>', chart) for title, chart in charts.items()}
    assert names["Training loss"] == [("1", "a/run"), ("2", "b/run"), ("3", "tuned")]
    assert names["Test accuracy"] == [("3", "tuned")] and names["Held-out loss"] == [("1", "a/run"), ("2", "b/run")]
    assert "Squared error" not in charts


def test_over_samples_where_batches_differ(runs):
    config = config_of(runs[2].parent)
    larger = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=8))
    write_run(runs[1], larger, lines_of(60, 200))
    html = page_of(runs[:2])
    assert '"x":"sample"' in html and "Over samples seen" in html and "from 3.49 at sample 16" in html
    assert '"x":"step"' in page_of([runs[0], runs[2]])


def test_names_that_clash_get_their_parents(tmp_path):
    places = [tmp_path / name for name in ("x/a/run", "x/b/run", "y/b/run", "z")]
    assert names_of(places) == ["a/run", "x/b/run", "y/b/run", "z"]
    assert names_of(places[:2]) == ["a/run", "b/run"] and names_of(places[:1]) == ["run"]


def test_the_page_is_written_where_it_was_asked_for(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.run(runs) == 0 and report.run(runs, tmp_path / "there.html") == 0
    assert (tmp_path / "comparison.html").read_text()[:9] == (tmp_path / "there.html").read_text()[:9] == "<!doctype"
    with pytest.raises(ConfigError, match="given twice"):
        report.run([runs[0], runs[0]])
    with pytest.raises(ConfigError, match="is neither a run folder"):
        report.run([runs[0], tmp_path])


def test_runs_that_have_not_begun_are_compared_too(tmp_path):
    config = config_of(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, config, [])
    html = page_of([tmp_path / "a", tmp_path / "b"])
    assert "All settings are the same" in html and "nan" not in words(html) and "<figure" not in html
