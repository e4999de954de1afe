"""The live page in a real browser: it changes by itself, keeps what the reader did to it, and asks only its server."""

import time
from pathlib import Path

import pytest

from tests.pipeline.watch.watching import Watch, append, lines_of, train_line, watching, write_run

SECONDS = 60.0  # that a change may take to be seen; three are usual, and other tests share the machine


class Open:
    """A page of a browser at a server, and what it complained about and asked for."""

    def __init__(self, browser, url: str, width: int = 1280):
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 800})
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.bar = self.page.locator(".live")
        says(self.page, ".live span", "wrote")

    def __enter__(self) -> "Open":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, lines_of(40, 1000, seconds=0.5))


def seen(opened: Open, step: int) -> None:
    """Wait until the curves show a step that was logged."""
    says(opened.page, ".live", f"step {step:,} of")
    says(opened.page, "#numbers .card:first-child .value", f"{step:,}")


def until(page, holds: str, *given: object) -> None:
    """Wait for something to be true in the page. Playwright's wait_for_function evaluates text inside the page, which
    its content policy forbids."""
    end = time.monotonic() + SECONDS
    while not page.evaluate(holds, list(given)):
        assert time.monotonic() < end, (holds, given)
        page.wait_for_timeout(20)


def says(page, where: str, words: str) -> None:
    """Wait until what a selector finds has these words."""
    found = "([where, words]) => [...document.querySelectorAll(where)].some((one) => one.textContent.includes(words))"
    until(page, found, where, words)


def mark(opened: Open, *names: str) -> None:
    """Remember which elements these are."""
    opened.page.evaluate("names => names.forEach(name => document.getElementById(name).known = true)", list(names))


def same(opened: Open, name: str) -> bool:
    return bool(opened.page.evaluate("name => document.getElementById(name).known === true", name))


@pytest.mark.parametrize("width", [1280, 375])
def test_it_opens_and_changes(browser, run, width):
    with watching(run) as watch:
        watch.until(lambda news: "images" in news["order"])
        with Open(browser, watch.url, width) as opened:
            mark(opened, "images", "curves", "numbers")
            append(run, train_line(42, time.time(), loss=1.2345))
            seen(opened, 42)
            assert same(opened, "images") and not same(opened, "numbers") and not same(opened, "curves")
            assert opened.bar.get_attribute("data-state") == "running"
            assert opened.page.title().startswith("42 · run")
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            assert opened.complaints == [] and {url.partition("?")[0] for url in opened.asked} == {
                watch.url,
                f"{watch.url}live",
            }


def test_what_the_reader_did_stays(browser, run):
    """Zoom, unfolded parts, the place scrolled to, the focus; and charts respond after an update as before it."""
    with watching(run) as watch:
        watch.until(lambda news: "images" in news["order"])
        with Open(browser, watch.url) as opened:
            page = opened.page
            page.locator("#what-ran details summary").nth(2).click()
            area = page.locator("#curves .area").first
            area.scroll_into_view_if_needed()
            box = area.bounding_box()
            assert box is not None
            across = [box["x"] + box["width"] * share for share in (0.25, 0.5, 0.75)]
            page.mouse.move(across[0], box["y"] + 40)
            page.mouse.down()
            for x in across[1:]:
                page.mouse.move(x, box["y"] + 40)
            page.mouse.up()
            zoomed, scrolled = page.evaluate("shared.range"), page.evaluate("scrollY")
            assert zoomed is not None and scrolled > 0
            area.focus()
            mark(opened, "curves", "what-ran")
            append(run, train_line(42, time.time()))
            says(opened.page, ".live", "step 42 of")
            until(page, "document.getElementById('curves').known !== true")
            assert page.evaluate("shared.range") == zoomed
            assert page.locator("#what-ran details").nth(2).get_attribute("open") is not None and not same(
                opened, "what-ran"
            )
            assert abs(page.evaluate("scrollY") - scrolled) < 2
            assert page.evaluate("document.activeElement === document.querySelector('#curves .area')")
            assert page.locator("#curves .area.part").count() > 0, "drawn zoomed"
            page.mouse.move(across[1] + 3, box["y"] + 50)
            assert page.locator("#curves .read").first.is_visible()
            assert opened.complaints == []


def test_nothing_is_taken_from_under_a_selection(browser, run):
    with watching(run) as watch, Open(browser, watch.url) as opened:
        watch.until(lambda news: "images" in news["order"])
        until(opened.page, "document.getElementById('images') !== null")
        opened.page.evaluate("getSelection().selectAllChildren(document.querySelector('#numbers .value'))")
        mark(opened, "numbers", "curves")
        append(run, train_line(42, time.time()))
        until(opened.page, "document.getElementById('curves').known !== true")
        opened.page.wait_for_timeout(1500)
        assert same(opened, "numbers") and opened.page.evaluate("getSelection().toString().trim()") == "40"
        opened.page.evaluate("getSelection().removeAllRanges()")
        seen(opened, 42)


def test_a_server_that_is_gone_and_comes_back(browser, run):
    with watching(run) as watch:
        port = watch.port
        opened = Open(browser, watch.url)
    with opened:
        says(opened.page, ".live b", "No answer from this page's server")
        assert opened.bar.get_attribute("data-state") == "gone" and "./launch.sh watch" in opened.bar.inner_text()
        mark(opened, "what-ran")
        append(run, train_line(42, time.time()))
        with watching(run, port=port):
            seen(opened, 42)
            assert opened.bar.get_attribute("data-state") == "running"


def test_a_hidden_page_asks_nothing(browser, run):
    with watching(run) as watch, Open(browser, watch.url) as opened:
        hide = "hidden => { Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });"
        hide += " document.dispatchEvent(new Event('visibilitychange')); }"
        opened.page.evaluate(hide, True)
        opened.page.wait_for_timeout(500)
        opened.asked.clear()
        append(run, train_line(42, time.time()))
        opened.page.wait_for_timeout(5000)
        assert opened.asked == []
        opened.page.evaluate(hide, False)
        opened.page.wait_for_timeout(300)
        assert len(opened.asked) == 1, "at once when it is looked at again"
        seen(opened, 42)


def test_a_run_that_is_not_there_yet_fills_the_page(browser, tmp_path):
    with watching(tmp_path / "run") as watch:
        page = browser.new_page()
        page.goto(watch.url)
        says(page, ".live", "this folder is not there yet")
        write_run(tmp_path, lines_of(40, 1000, seconds=0.5))
        until(page, "document.querySelector('#curves figure') !== null")
        says(page, ".live", "step 40 of 1,000")
        parts = page.evaluate("[...document.querySelectorAll('main > [id]')].map((one) => one.id)")
        assert parts[:2] == ["head", "numbers"] and parts[-1] == "footer"
        page.close()


def ready_in(browser, watch: Watch) -> float:
    """Seconds from asking for the page to its load event with every chart bound."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    begun = time.perf_counter()
    page.goto(watch.url, wait_until="load")
    until(page, "shared.charts.length > 5")
    taken = time.perf_counter() - begun
    page.close()
    return taken


def test_ten_thousand_steps(browser, tmp_path, capsys):
    """Every chart is bound, at once and again; the times are said here and stated by benchmarks/training/watch.py."""
    with watching(write_run(tmp_path, lines_of(200_000, 300_000, every=20, seconds=0.5))) as watch:
        first, again = ready_in(browser, watch), ready_in(browser, watch)
    with capsys.disabled():
        print(f" [ready in {first:.2f} s, again in {again:.2f} s]", end="")
