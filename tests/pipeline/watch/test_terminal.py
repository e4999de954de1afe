"""`watch --terminal`: what it says, and how it treats a real terminal (a pseudo-terminal)."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from beitforge.pipeline.runs.status import Follower
from beitforge.pipeline.watch.terminal import cut, render, sparkline
from tests.conftest import ROOT
from tests.pipeline.watch.watching import append, lines_of, snapshot, start, train_line, write_marker, write_run


def make_run(folder: Path) -> Path:
    return write_run(folder, lines_of(40, 100))


def said(run: Path, width: int = 100, plain: bool = False) -> str:
    follower = Follower(run)
    follower.refresh()
    return "\n".join(render(follower, width, plain))


def test_what_it_says(tmp_path):
    run = make_run(tmp_path)
    write_marker(run, 40)
    append(run, {"step": 40, "kind": "survey", "time": time.time(), "knn": 0.4321})
    (run / "bad_samples.jsonl").write_text('{"shard": "a", "key": "b"}\n')
    text = said(run)
    for words in (
        "run  (", "step 40 of 100 · wrote 0 s ago", "40.0% 40 / 100", "130.7 images/s", "10 s a step",
        "10 min 0 s, until ",
        "loss       3.1      █", "held-out   2.6 · 10.0% of tokens · step 40", "k-NN       43.2% · step 40",
        "20.0% of tokens", "lr 0.001 · norm 2", "1 GiB", "20.0% (mean of ranks)", "0 restarts · 1 bad sample",
        "step 40, 0 s ago",
    ):  # fmt: skip
        assert words in text, f"{words}\n{text}"


def test_what_is_not_there_is_not_made_up(tmp_path):
    assert said(tmp_path / "run").endswith("waiting: this folder is not there yet")
    write_run(tmp_path, [start(0, 100, time.time())])
    text = said(tmp_path / "run")
    assert "started, no step logged yet · wrote 0 s ago" in text and "loss" not in text
    append(tmp_path / "run", {"step": 2, "kind": "train", "time": time.time(), "loss": float("nan")})
    text = said(tmp_path / "run")
    for words in ("rate       –", "loss       nan", "checkpoint none yet"):
        assert words in text, text
    assert "left " not in text and "k-NN" not in text and "held-out" not in text


def test_no_time_is_left_where_nothing_goes_on(tmp_path):
    run = make_run(tmp_path)
    assert "left " in said(run)
    (run / "ended").write_text("40 SIGTERM\n")
    assert "left " not in said(run) and "stopped at step 40 of 100 (SIGTERM)" in said(run)


def test_restarts_and_updates_left_out(tmp_path):
    run, now = make_run(tmp_path), time.time()
    append(run, start(36, 100, now), train_line(38, now), {"step": 39, "kind": "skip", "time": now, "row": 1.0})
    assert "1 restart · 0 bad samples · 1 update left out" in said(run)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_what_ranks_wait(tmp_path, count):
    """Each of a few; of many the median and the worst four."""
    run = make_run(tmp_path)
    ranks = [
        {"rank": i, "host": f"n{i // 8}", "data_wait": i / 200, "forward_seconds": 1.0, "memory_bytes": i * 2**30}
        for i in range(count)
    ]
    (run / "ranks.json").write_text(json.dumps({"step": 40, "time": time.time(), "ranks": ranks}))
    text = said(run)
    lines = re.findall(r"([\d.]+%)  rank (\d+) on (\S+)", text)
    assert [int(rank) for _, rank, _ in lines] == list(range(count - 1, -1, -1))[:4]
    assert ("24.8%  median of 100 ranks" in text) == (count == 100)
    assert text.count("data wait") == 1 and (f"{max(0, count - 1)} GiB" in text)
    assert ("49.5%", "99", "n12") in lines or count < 100


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"ranks": 3}', '{"ranks": [1, {"rank": 0}]}'])
def test_ranks_that_cannot_be_read(tmp_path, damaged):
    run = make_run(tmp_path)
    (run / "ranks.json").write_text(damaged)
    assert "20.0% (mean of ranks)" in said(run) and "1 GiB" in said(run)


@pytest.mark.parametrize("width", [0, 10, 40, 60, 80, 200])
def test_no_line_is_too_long(tmp_path, width):
    follower = Follower(make_run(tmp_path))
    follower.refresh()
    lines = render(follower, width)
    assert max(map(len, lines)) <= min(110, max(40, width)) and "until" in "\n".join(lines)


def test_a_terminal_without_utf_8(tmp_path):
    assert said(make_run(tmp_path), plain=True).isascii()


def test_sparklines():
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 0.0, 8.0, 8.0], 2) == "▁█" and sparkline([5.0] * 3, 8) == "▁▁▁" and sparkline([], 8) == ""
    assert sparkline([1.0, float("nan"), 2.0], 3) == "▁ █" and sparkline([float("inf")], 3) == " "
    assert len(sparkline([float(i) for i in range(1001)], 60)) == 60


def test_nothing_a_terminal_would_obey():
    assert (
        cut("a\x1b[2Jb\n\x9bc", 80) == "a?[2Jb??c"
        and cut("日本語", 5) == "日本"
        and cut("e\u0301e\u0301x", 2) == "e\u0301e\u0301"
    )


def command(run: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "beitforge", "watch", str(run), "--terminal"]


def test_without_a_terminal_it_says_it_once(tmp_path):
    run = make_run(tmp_path)
    before = snapshot(tmp_path)
    done = subprocess.run(command(run), cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    assert "step 40 of 100" in done.stdout and done.stdout.count("loss") == 1 and snapshot(tmp_path) == before


class Terminal:
    """A process in a pseudo-terminal, and what a person would see there."""

    def __init__(self, words: list[str], columns: int, rows: int = 30):
        self.master, slave = pty.openpty()
        self.slave, self.text = slave, ""
        self.resize(columns, rows)
        self.before = termios.tcgetattr(slave)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, words: str, seconds: float = 20) -> str:
        """What was written since the last time, up to `words`."""
        end = time.monotonic() + seconds
        while words not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"no {words!r} in {self.text!r}"
            if select.select([self.master], [], [], min(left, 0.2))[0]:
                with contextlib.suppress(OSError):
                    self.text += os.read(self.master, 1 << 16).decode("utf-8", "replace")
        place = self.text.index(words) + len(words)
        found, self.text = self.text[:place], self.text[place:]
        return found

    def key(self, typed: bytes) -> None:
        os.write(self.master, typed)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            assert kind is not None or self.process.wait(timeout=10) == 0
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.master)
            os.close(self.slave)


def rows_of(drawn: str) -> list[str]:
    """The lines of one drawing, without what only a terminal sees."""
    text = drawn.rpartition("\x1b[H")[2].partition("\x1b[J")[0]
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("\r+\n", text)]


@pytest.mark.parametrize(("columns", "key"), [(40, b"q"), (60, b"\x03"), (80, b"Q"), (200, b"\x03")])
def test_a_real_terminal(tmp_path, columns, key):
    run = make_run(tmp_path)
    with Terminal(command(run), columns) as terminal:
        rows = rows_of(terminal.until("\x1b[J"))
        assert rows[1].startswith("step 40 of 100") and max(map(len, rows)) <= columns and len(rows) <= terminal.rows
        append(run, train_line(42, time.time()))
        terminal.until("step 42 of 100")
        terminal.key(key)
        rest = terminal.until("\x1b[?25h\x1b[?1049l")
        assert rest.count("\x1b[?25l") == 0 and "Traceback" not in rest
        left = terminal.until("checkpoint none yet")
        assert "step 42 of 100" in left and "\x1b" not in left, "what it said last stays"
        assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_terminal_that_changes_its_size(tmp_path):
    with Terminal(command(make_run(tmp_path)), 100) as terminal:
        assert max(map(len, rows_of(terminal.until("\x1b[J")))) > 50
        for columns, rows in ((44, 30), (44, 5), (120, 40)):
            terminal.resize(columns, rows)
            terminal.text = ""
            terminal.until("\x1b[J")
            shown = rows_of(terminal.until("\x1b[J"))
            assert max(map(len, shown)) <= columns and len(shown) <= rows and shown[0].startswith("run")
        terminal.key(b"q")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_terminal_back(tmp_path, number):
    with Terminal(command(make_run(tmp_path)), 80) as terminal:
        terminal.until("\x1b[J")
        terminal.process.send_signal(number)
        terminal.until("\x1b[?25h\x1b[?1049l")
        assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_pause_gives_the_terminal_back(tmp_path):
    """Ctrl-Z and fg."""
    with Terminal(command(make_run(tmp_path)), 80) as terminal:
        terminal.until("\x1b[J")
        terminal.key(b"\x1a")
        terminal.until("\x1b[?25h\x1b[?1049l")
        end = time.monotonic() + 10
        while Path(f"/proc/{terminal.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end
            time.sleep(0.02)
        assert termios.tcgetattr(terminal.slave) == terminal.before
        terminal.process.send_signal(signal.SIGCONT)
        terminal.until("\x1b[?25l")
        terminal.until("step 40 of 100")
        terminal.key(b"q")
