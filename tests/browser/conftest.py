"""A real headless Chromium (install.sh), and pages of real runs to open in it.

BEITFORGE_BROWSER=1 says that what it needs has been installed: then a skip is a failure.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from beitforge.pipeline.stages import report
from tests.pipeline.runs.made_runs import (
    config_of,
    lines_of,
    make_sets,
    measured,
    tuned_lines,
    write_checkpoint,
    write_classifier,
    write_run,
)

REQUIRED = os.environ.get("BEITFORGE_BROWSER") == "1"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    said = outcome.get_result()
    if said.skipped and REQUIRED:
        said.outcome = "failed"
        said.longrepr = f"{item.nodeid} was skipped, but BEITFORGE_BROWSER=1 says that a browser is installed"


@pytest.fixture(scope="package")
def browser() -> Iterator:
    """Chromium, driven by playwright, which brings no browser of its own here."""
    programme = next(filter(None, map(shutil.which, _NAMES)), None)
    if programme is None:
        pytest.skip("no Chromium here; tests/browser/install.sh installs one, as root")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it is in the extra `test`")
    with api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        running = playwright.chromium.launch(executable_path=programme, args=sandbox)
        yield running
        running.close()


@dataclass
class Opened:
    """A page in the browser, with what it complained of and what it asked for."""

    page: object
    said: list[str]
    asked: list[str]


@pytest.fixture
def opened(browser):
    """Open a file at a width, in a colour scheme; with touch below 500 px. Closed after the test."""
    contexts = []

    def open_page(path: Path, width: int = 1280, scheme: str = "light", script: bool = True) -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            has_touch=width < 500,
            java_script_enabled=script,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        found = Opened(page, [], [])
        page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.said.append(f"error: {error}"))
        page.on("request", lambda request: found.asked.append(request.url))
        page.goto(path.as_uri())
        return found

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Reports by name: of a run with everything, of one not begun, of a fine-tuning, a tokenizer, several runs."""
    folder = tmp_path_factory.mktemp("browser")
    make_sets(folder)
    config = config_of(folder)
    whole, begun = folder / "run", folder / "begun" / "run"
    first = measured(lines_of(200, 400, time=1e9))
    write_run(whole, config, first + measured(lines_of(400, 400, begin=160, time=1e9 + 9000)))
    write_checkpoint(whole, config, 400)
    write_run(begun, config, [])
    tuned, tokenizer = folder / "tuned", folder / "tokenizer" / "training"
    write_run(tuned, config, tuned_lines(60))
    write_classifier(tuned, config, 60)
    write_run(tokenizer, config, tokenizer_lines())
    made = {"whole": whole, "begun": begun, "tuned": tuned, "tokenizer": tokenizer}
    found = {name: run / "report.html" for name, run in made.items()}
    for run in made.values():
        assert report.run([run], data=True) == 0
    write_run(folder / "other" / "run", config, lines_of(100, 100))
    found["compared"] = folder / "comparison.html"
    assert report.run([whole, folder / "other" / "run", tuned], found["compared"]) == 0
    return found


def tokenizer_lines() -> list[dict]:
    return [
        {**line, "reconstruction_mse": 1 / (line["step"] + 5), "kl": 2.0, "usage_kl": 0.5}
        for line in lines_of(40, 40)
        if line["kind"] != "heldout"
    ]


@pytest.fixture(scope="session")
def long(tmp_path_factory) -> Path:
    """The report of a run of ten thousand logged steps of which nothing else is left."""
    folder = tmp_path_factory.mktemp("long")
    lines = lines_of(200_000, 200_000, every=20)
    for line in lines:
        line |= {"loss": line["loss"] + 0.1 * (line["step"] % 7)} if "loss" in line else {}
    write_run(folder / "run", config_of(folder), measured(lines, every=2000))
    assert report.run([folder / "run"], data=True) == 0
    return folder / "run" / "report.html"
