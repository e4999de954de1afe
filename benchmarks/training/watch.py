"""What does watching a run cost: until the page is there, for every line that is logged, and over the network?"""

import contextlib
import gzip
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from beitforge.pipeline.config.loading import to_yaml
from beitforge.pipeline.config.settings import Config
from benchmarks.results import write

STEPS, EVERY, TIMES = (100, 1000, 10_000), 20, 5


def main() -> None:
    """By logged steps: the server's first page, the work and the bytes of an update, and the page in a browser."""
    with tempfile.TemporaryDirectory() as folder, browsers() as browser:
        rows = [measure(Path(folder) / str(logged), logged, browser) for logged in STEPS]
    question = "what does watching a run cost, by the number of steps it has logged?"
    note = (
        "First page: from starting the command to the whole page, of a folder never read before. Ready: from asking a "
        "server just started to the load event with every chart responding, in headless Chromium at 1280 pixels. "
        "Update: the answer to a page that asks after one more line was logged: the new bytes are read, the page's "
        "parts made again, those that differ sent. Nothing new: the usual answer, every three seconds. The median of "
        f"{TIMES}; the first page and ready once each."
    )
    write("watch", question, rows, {}, [note])


def measure(folder: Path, logged: int, browser: object) -> dict:
    """A row."""
    run = make_run(folder, logged)
    begun = time.perf_counter()
    with served(run) as (port, _):
        page, _ = asked(port, "/")
        first = time.perf_counter() - begun
        assert f"step {logged * EVERY:,} of" in page.decode(), "the page does not show the last step"
        while "images" not in json.loads(asked(port, "/live?since=")[0])["order"]:
            time.sleep(1)
        updates = [update(run, port, (logged + i) * EVERY) for i in range(1, TIMES + 1)]
        stamp = json.loads(asked(port, "/live?since=")[0])["stamp"]
        idle = statistics.median(asked(port, f"/live?since={stamp}")[1] for _ in range(20))
    with served(run) as (port, _):
        shown = ready(browser, port) if browser is not None else math.nan
    return {
        "logged steps": logged,
        "first page, s": first,
        "page, KB gzip": len(gzip.compress(page, 3)) / 1000,
        "ready in a browser, s": shown if math.isfinite(shown) else "–",
        "update, ms": 1000 * statistics.median(seconds for seconds, _ in updates),
        "update, KB gzip": statistics.median(size for _, size in updates) / 1000,
        "nothing new, ms": 1000 * idle,
    }


def make_run(folder: Path, logged: int) -> Path:
    """A run as pretraining logs it, that is still going on."""
    run, draw, now = folder / "run", random.Random(0), time.time()
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(Config()))
    lines = [{"step": 0, "kind": "start", "time": now - logged, "world": 8, "steps": 300_000, "epoch_samples": 1281167}]
    for i in range(1, logged + 1):
        lines.append(line(i * EVERY, now - logged + i, draw))
        if i % 50 == 0:
            apart = {"loss": 7 - 4 * i / logged, "masked_accuracy": 0.3 * i / logged, "samples": 4096.0}
            lines.append({"step": i * EVERY, "kind": "heldout", "time": now - logged + i, **apart})
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return run


def line(step: int, when: float, draw: random.Random) -> dict:
    """One of training, with the digits of a real one."""
    values = {"loss": 3 + 4 * math.exp(-step / 50_000) + 0.1 * draw.random(), "masked_accuracy": 0.3 * draw.random()}
    values |= {
        "data_wait_share": 0.02 * draw.random(),
        "lr": 1.5e-3 * math.exp(-step / 1e5),
        "mfu": 0.4 * draw.random(),
    }
    values |= {"gradient_norm": 1 + draw.random(), "images_per_second": 9000 + 100 * draw.random()}
    values |= {"memory_bytes": 40 * 2**30, "forward_seconds": draw.random(), "forward_seconds_slowest": draw.random()}
    values |= {"slowest_rank": 3.0, "data_wait_worst": draw.random(), "hungriest_rank": 2.0, "loss_jump": draw.random()}
    return {"step": step, "kind": "train", "time": round(when, 3), **values}


@contextlib.contextmanager
def served(run: Path) -> Iterator[tuple[int, subprocess.Popen]]:
    """A `watch` process and its port."""
    command = [sys.executable, "-W", "ignore", "-m", "beitforge", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/", process.stdout.readline())
        assert found is not None, "watch does not say where it listens"
        yield int(found[1]), process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def asked(port: int, path: str) -> tuple[bytes, float]:
    """An answer, unpacked, and the seconds it took."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    content = answer.read()
    taken = time.perf_counter() - begun
    connection.close()
    assert answer.status == 200
    return gzip.decompress(content) if answer.getheader("Content-Encoding") == "gzip" else content, taken


def update(run: Path, port: int, step: int) -> tuple[float, int]:
    """Log one more step; the seconds of the answer that brings it, and its bytes on the wire. The server makes the page
    anew a tenth of the time at most; answers before it does are not this one."""
    stamp = json.loads(asked(port, "/live?since=")[0])["stamp"]
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line(step, time.time(), random.Random(step))) + "\n")
    while True:
        content, taken = asked(port, f"/live?since={stamp}")
        news = json.loads(content)
        if news["sections"]:
            break
        time.sleep(0.1)
    assert f"step {step:,} of" in news["status"]["words"] and {"curves", "numbers"} <= set(news["sections"])
    assert "images" not in news["sections"], "what did not change was sent again"
    return taken, len(gzip.compress(content, 3))


@contextlib.contextmanager
def browsers() -> Iterator[object]:
    """Headless Chromium, or None where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        yield None
        return
    path = shutil.which("chromium")
    if path is None:
        yield None
        return
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield running
        running.close()


def ready(browser, port: int) -> float:
    """Seconds to the load event with all charts bound."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    begun = time.perf_counter()
    page.goto(f"http://127.0.0.1:{port}/", wait_until="load")
    while page.evaluate("shared.charts.length") < 6:
        page.wait_for_timeout(5)
    taken = time.perf_counter() - begun
    page.close()
    return taken


if __name__ == "__main__":
    main()
