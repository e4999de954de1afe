"""`watch`: the page of a run that goes, from a real server, asked over HTTP."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beitforge.pipeline.reports.components import Section
from beitforge.pipeline.runs.jsonl import JsonlTail
from beitforge.pipeline.runs.status import Follower, seconds_a_step
from beitforge.pipeline.watch.fragments import Fragments
from tests.conftest import ROOT
from tests.pipeline.watch.watching import (
    Watch,
    append,
    lines_of,
    snapshot,
    start,
    train_line,
    wait_for,
    watching,
    write_run,
)


def test_the_first_page(watch):
    page = watch.page()
    for words in (
        'data-state="running"',
        "<b>step 20 of 100 · 13 min 20 s left</b>",
        '<section id="curves">',
        'id="numbers"',
    ):
        assert words in page, words
    assert page.count('<figure class="chart') >= 6 and page.count("<script>") == 2
    news = watch.live()
    assert set(news["order"]) == set(news["sections"]) >= {"head", "numbers", "curves", "what-ran"}
    assert all(html in page or name in ("images", "notes") for name, html in news["sections"].items())
    assert news["status"]["state"] == "running" and news["status"]["title"] == "20 · run · running"


def test_what_the_server_says_about_itself(watch):
    for path in ("/", "/live", "/nothing"):
        answer, _ = watch.ask(path)
        policy = answer.getheader("Content-Security-Policy")
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Cache-Control") == "no-store"
        assert answer.getheader("Access-Control-Allow-Origin") is None
        assert "Python" not in answer.getheader("Server")


@pytest.mark.parametrize("path", ["/nothing", "/live/", "/../etc/passwd", "/%2e%2e/", "/config.yaml", "/?/live/x"])
def test_other_paths_are_not_there(watch, path):
    answer, content = watch.ask(path)
    assert answer.status == (200 if path.startswith("/?") else 404)
    assert answer.status == 200 or content == b"there is / and nothing else here\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_sent(watch, method):
    answer, _ = watch.ask("/live", method)
    assert answer.status == 405 and answer.getheader("Allow") == "GET, HEAD"


def test_head_has_the_headers_alone(watch):
    answer, content = watch.ask("/", "HEAD")
    assert answer.status == 200 and content == b"" and int(answer.getheader("Content-Length")) > 10_000


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost", 200),
        ("LOCALHOST:9000", 200),
        ("[::1]:8265", 200),
        ("evil.example", 421),
        ("evil.example:{port}", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("192.0.2.1", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_only_to_its_own_name(watch, host, status):
    """A page of another site whose name was pointed here (DNS rebinding) asks with that name."""
    answer, content = watch.ask(Host=host.format(port=watch.port))
    assert answer.status == status
    assert status == 200 or b"open the address" in content


def test_answers_are_compressed_for_who_can_read_it(watch):
    answer, content = watch.ask(**{"Accept-Encoding": "gzip"})
    assert answer.getheader("Content-Encoding") == "gzip" and b"</html>" in gzip.decompress(content)
    assert len(content) < 30_000


def test_torch_is_not_in_the_server(watch):
    watch.page()
    assert "libtorch" not in Path(f"/proc/{watch.process.pid}/maps").read_text()


def test_lines_that_are_appended_come_and_nothing_else(tmp_path):
    run = write_run(tmp_path, lines_of(20, 100))
    with watching(run) as watch:
        before = watch.until(lambda news: "images" in news["order"])["stamp"]
        assert watch.live(before)["sections"] == {}
        append(run, train_line(22, time.time(), loss=1.2345))
        watch.until(lambda news: "22 of 100" in news["status"]["words"])
        news = watch.until(lambda news: "1.234" in news["sections"]["numbers"])
        new = watch.live(before)
        assert {"curves", "numbers"} <= set(new["sections"]) and "images" not in new["sections"]
        assert new["order"] == news["order"] and new["status"]["seconds"] < 5
        append(run, '{"step": 24, "kind": "train", "ti')
        time.sleep(1.5)
        assert watch.live(new["stamp"])["sections"] == {}, "half a line is no news"
        append(run, f'me": {time.time()}, "loss": 1.0}}\n')
        watch.until(lambda news: "24 of 100" in news["status"]["words"])


def test_a_folder_is_waited_for(tmp_path):
    """Not there, empty, a config without a line, a start, a step."""
    made, run = write_run(tmp_path / "made", []), tmp_path / "run"
    with watching(run) as watch:
        assert "this folder is not there yet" in watch.page()
        assert watch.live()["status"]["seconds"] is None
        run.mkdir()
        watch.until(lambda news: "no run in this folder yet" in news["status"]["words"])
        shutil.copy(made / "config.yaml", run)
        watch.until(lambda news: "no line in metrics.jsonl yet" in news["status"]["words"])
        append(run, start(0, 100, time.time()))
        watch.until(lambda news: news["status"]["state"] == "started")
        append(run, train_line(2, time.time()))
        news = watch.until(lambda news: news["status"]["state"] == "running" and "<svg" in news["sections"]["curves"])
        assert "waiting" not in news["sections"]["head"]


def test_a_config_that_is_none_is_said(tmp_path):
    run = write_run(tmp_path, lines_of(20, 100))
    (run / "config.yaml").write_text("trian: {}\n")
    with watching(run) as watch:
        assert "cannot be read" in watch.page() and "trian" in watch.page()


@pytest.mark.parametrize("how", ["shorter", "renamed", "longer", "gone"])
def test_a_file_that_was_written_anew_is_read_anew(tmp_path, how):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    growing = JsonlTail(path)
    assert growing.read() and growing.lines == [{"a": 1}, {"a": 2}] and not growing.read()
    held, content = growing.lines, {"shorter": '{"b": 1}\n', "gone": ""}.get(how, '{"b": 1}\n' * 9)
    if how == "renamed":
        (tmp_path / "new").write_text(content)
        (tmp_path / "new").replace(path)
    elif how == "gone":
        path.unlink()
    else:
        path.write_text(content)
    assert growing.read() and growing.lines == [{"b": 1}] * content.count("\n") and not growing.read()
    assert held == [{"a": 1}, {"a": 2}], "who holds the old lines keeps them"


def test_only_new_bytes_are_read(tmp_path, monkeypatch):
    """Half a line waits; a line that a kill cut short is passed over."""
    path = tmp_path / "lines.jsonl"
    growing = JsonlTail(path)
    assert not growing.read() and growing.lines == []
    path.write_text('{"a": 1}\n{"a"')
    assert growing.read() and growing.lines == [{"a": 1}]
    assert not growing.read()
    parsed: list[bytes] = []
    monkeypatch.setattr(
        "beitforge.pipeline.runs.jsonl.parse_line", lambda text: parsed.append(text) or json.loads(text)
    )
    with open(path, "a") as file:
        file.write(": 2}\n")
    assert growing.read() and growing.lines == [{"a": 1}, {"a": 2}] and parsed == [b'{"a": 2}']
    monkeypatch.undo()
    with open(path, "a") as file:
        file.write('{"a": \n[3]\n{"a": 4}\n')
    assert growing.read() and growing.lines == [{"a": 1}, {"a": 2}, {"a": 4}]


def standing(run: Path):
    follower = Follower(run)
    follower.refresh()
    return follower.status()


def test_how_a_run_stands(tmp_path):
    """By its lines and its last word; a word that is older than the last line is about an earlier start."""
    now = time.time()
    run = write_run(tmp_path, lines_of(20, 100))
    stand = standing(run)
    assert (stand.state, stand.step, stand.planned) == ("running", 20, 100) and stand.silent < 5
    (run / "stop").touch()
    assert "asked to stop" in standing(run).summary
    (run / "stop").unlink()
    (run / "ended").write_text("20 SIGTERM\n")
    assert standing(run).state == "stopped" and "SIGTERM" in standing(run).summary
    time.sleep(0.02)
    append(run, start(18, 100, now))
    stand = standing(run)
    assert stand.state == "started" and "started again from step 18" in stand.summary
    append(run, train_line(20, now - 1000))
    stand = standing(run)
    assert stand.state == "silent" and stand.silent == pytest.approx(1000, abs=5) and "then no word" in stand.summary
    append(run, train_line(100, now))
    assert standing(run).state == "finished"


def test_silence_is_told_by_this_machines_clock(tmp_path):
    """Clocks of hosts differ: what comes while one looks is new, whatever time it says."""
    run = write_run(tmp_path, lines_of(20, 100))
    follower = Follower(run)
    follower.refresh()
    append(run, train_line(22, time.time() - 5000))
    assert follower.refresh() and follower.status().silent < 1
    append(run, train_line(24, time.time() + 5000))
    assert follower.refresh() and 0 <= follower.status().silent < 1
    assert 0 <= standing(run).silent < 1


def test_the_rate_is_of_the_last_start(tmp_path):
    lines = [*lines_of(20, 100), start(20, 100, 5000.0), train_line(22, 5100.0), train_line(32, 5120.0)]
    assert seconds_a_step(lines) == 2.0
    assert seconds_a_step(lines[:-1]) != seconds_a_step(lines[:-1]), "one line says nothing"


def test_sections_since_a_stamp():
    page = Fragments()
    page.show([Section("a", "1"), Section("b", "2")])
    first = page.stamp
    assert list(page.since("")["sections"]) == ["a", "b"] and page.since(first)["sections"] == {}
    page.show([Section("a", "1"), Section("b", "3"), Section("c", "4")])
    assert page.since(first)["sections"] == {"b": "3", "c": "4"}
    second = page.stamp
    page.show([Section("a", "1")])
    assert page.since(second) == {"stamp": page.stamp, "order": ["a"], "sections": {}}
    for other in ("0-0", "x", "-1", f"{page.server}-x", Fragments().stamp):
        assert list(page.since(other)["sections"]) == ["a"], "another server's stamp asks for everything"
    with pytest.raises(ValueError, match="must differ"):
        page.show([Section("a", "1"), Section("a", "2")])


# CAP_DAC_OVERRIDE would let root write anywhere; without it the mode of a folder holds for root, too.
DROP = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


def test_nothing_is_written_and_nothing_need_be_writable(tmp_path):
    run = write_run(tmp_path, lines_of(20, 100))
    (run / "checkpoints").mkdir()
    folders = [run, run / "checkpoints"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        before = snapshot(tmp_path)
        with watching(run, before=(sys.executable, "-c", DROP)) as watch:
            watch.page()
            watch.until(lambda news: "images" in news["order"])
        assert snapshot(tmp_path) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "{taken}"], "something else listens there"),
        (["--port", "70000"], "give one of 1 to 65535"),
        (["--host", "no.such.host.invalid"], "there is no such host"),
        (["--host", "192.0.2.1"], "that is no address of this machine"),
    ],
)
def test_what_it_cannot_listen_on_is_one_line(watch, tmp_path, words, said):
    words = [word.format(taken=watch.port) for word in words]
    command = [sys.executable, "-W", "ignore", "-m", "beitforge", "watch", str(tmp_path), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-W", "ignore", "-m", "beitforge", "watch", str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is a file" in done.stderr


def test_others_are_told_how_to_reach_it(tmp_path):
    with watching(tmp_path) as watch:
        assert f"ssh -L {watch.port}:127.0.0.1:{watch.port} " in watch.process.stdout.readline()
    with watching(tmp_path, "--host", "0.0.0.0") as watch:
        assert "anyone" in watch.process.stdout.readline()
        there = Watch(watch.process, "127.0.0.1", watch.port)
        for host, status in (("192.0.2.1:80", 200), ("evil.example", 421)):
            assert there.ask(Host=host)[0].status == status, host


def test_ten_thousand_steps(tmp_path, capsys):
    """Time is benchmarks/training/watch.py's matter; an update is a part of a page that stays small."""
    run = write_run(tmp_path, lines_of(200_000, 300_000, every=20))
    begun = time.perf_counter()
    with watching(run) as watch:
        listening = time.perf_counter() - begun
        size = len(watch.page())
        first = time.perf_counter() - begun
        stamp = watch.live()["stamp"]
        append(run, train_line(200_020, time.time()))
        watch.until(lambda news: news["stamp"] != stamp)
        _, content = watch.ask(f"/live?since={stamp}", **{"Accept-Encoding": "gzip"})
    with capsys.disabled():
        print(f" [listening {listening:.2f} s, page {first:.2f} s, {size:,} bytes, an update {len(content):,}]", end="")
    assert size < 1_000_000 and len(content) < 200_000 and len(content) < size


def pretrain(tiny, run: Path, *settings: str) -> subprocess.Popen:
    """One process, without a launcher."""
    words = [str(tiny.config), f"train.run={run}", *settings]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "beitforge", "pretrain", "--rank", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_a_job_that_is_killed_and_started_again(tiny, tmp_path):
    """Watched from before its first start to its end by one server, which leaves no trace in the run folder."""
    run = tmp_path / "run"
    settings = ["log.every_steps=1", "checkpoint.every=8 steps", "train.duration=400 steps"]
    with watching(run) as watch:
        assert watch.live()["status"]["state"] == "waiting"
        process = pretrain(tiny, run, *settings)
        news = watch.until(lambda news: news["status"]["state"] == "running", 120)
        wait_for(lambda: list((run / "checkpoints").glob("step-*/state.json")), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert "400" in news["status"]["words"] and 'class="mark' not in watch.live()["sections"]["curves"]
        process = pretrain(tiny, run, *settings)
        watch.until(lambda news: 'class="mark' in news["sections"]["curves"], 120)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        news = watch.until(lambda news: news["status"]["state"] == "finished")
        assert news["status"]["words"] == "finished: step 400 of 400"
        assert "2 starts" in news["sections"]["curves"] and "<summary>Starts<span>2<" in news["sections"]["what-ran"]
        watch.until(lambda news: "data:image/" in news["sections"].get("images", ""), 120)
    names = {path.name for path in run.iterdir()}
    assert names <= {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "ended", ".lock", "ranks.json"}
