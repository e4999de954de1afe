"""`watch RUN`: a run while it goes, as a page that changes by itself or in a terminal; from its folder alone."""

import hashlib
import json
import math
import signal
import socket
import sys
import threading
import time
from html import escape
from pathlib import Path

from pipeline import live_look, look, page, script, terminal
from pipeline.beside import Beside
from pipeline.config import ConfigError
from pipeline.document import body
from pipeline.following import Follower, Standing
from pipeline.live import Part, Parts, split
from pipeline.provenance import what_ran
from pipeline.record import TokenUse, record_of
from pipeline.serving import Server
from pipeline.words import duration

_LOOK_SECONDS = 1.0  # between looks into the folder, however many ask
_SHARE = 0.1  # of one core's time that making the page anew may take
_POLL = {"finished": 15_000, "stopped": 15_000}  # milliseconds until a page asks again
_POLL_ELSE = 3_000
_REDRAW_SECONDS = 1.0
_SLOT = '<section id="pictures"></section>'  # where the pictures come in, which are cut up once


def run(run_folder: Path, host: str, port: int, in_terminal: bool) -> int:
    """Serve or draw until Ctrl-C; returns the exit code. Raises ConfigError when it is no folder, or cannot listen.

    A folder that is not there yet is waited for.
    """
    if run_folder.exists() and not run_folder.is_dir():
        raise ConfigError(f"{run_folder} is a file: give the run's folder (train.run of its config)")
    if in_terminal:
        return _in_terminal(run_folder)
    site = Site(run_folder)
    server = Server(host, port, site.page, site.live)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _say_where(run_folder, host, server)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        site.beside.stop()
    return 0


def _say_where(run_folder: Path, host: str, server: Server) -> None:
    print(f"watching {run_folder} at {server.url} (Ctrl-C ends it)", flush=True)
    if server.open_to_others:
        print(f"anyone who reaches {server.host} can read it", flush=True)
    else:
        there = f"{server.server_port}:{host}:{server.server_port}"
        print(f"from another machine: ssh -L {there} {socket.gethostname()}, then open the same address", flush=True)


def _in_terminal(run_folder: Path) -> int:
    follower, plain = Follower(run_folder), not _can_write("█▁·")

    def draw(columns: int) -> list[str]:
        follower.look()
        return terminal.block(follower, columns, plain)

    terminal.show(draw, _REDRAW_SECONDS)
    return 0


def _can_write(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _words(stand: Standing) -> str:
    return f"{stand.told} · {duration(stand.left)} left" if math.isfinite(stand.left) else stand.told


class Site:
    """The page of a run as its folder is now. Its methods may be called from any thread."""

    def __init__(self, run_folder: Path):
        self.run = run_folder
        self.follower = Follower(run_folder)
        self.beside = Beside([sys.executable, "-W", "ignore", "-m", "pipeline.picturing", str(run_folder)])
        self.parts = Parts()
        self.look = hashlib.sha256((look.STYLE + script.SCRIPT + live_look.SCRIPT).encode()).hexdigest()[:12]
        self._lock = threading.Lock()
        self._look_at, self._make_at = 0.0, 0.0  # on the monotonic clock: not before
        self._shown = (-1, -1)
        self._pictures: list[Part] = []
        self._pictured = 0

    def page(self) -> str:
        """The whole document."""
        with self._lock:
            self._refresh()
            bar = self._bar()
            html = "\n".join([bar, *(part.html for part in self.parts.now)])
            title = self._title()
        return page.page(title, html, connect="'self'", script=live_look.SCRIPT)

    def live(self, since: str) -> dict:
        """What is new since the stamp of an earlier answer, and how the run stands."""
        with self._lock:
            self._refresh()
            stand = self.follower.standing()
            status = {
                "state": stand.state,
                "words": _words(stand),
                "seconds": round(stand.silent, 1) if math.isfinite(stand.silent) else None,
                "title": self._title(),
                "every": _POLL.get(stand.state, _POLL_ELSE),
            }
            return {"look": self.look, "status": status, **self.parts.since(since)}

    def _title(self) -> str:
        stand = self.follower.standing()
        name = self.run.resolve().name
        return f"{stand.step:,} · {name} · {stand.state}" if stand.step else f"{name} · {stand.state}"

    def _bar(self) -> str:
        stand = self.follower.standing()
        command = f"./launch.sh watch {self.run}"
        return (
            f'<div class="live" data-state="{stand.state}" data-stamp="{self.parts.stamp}" data-look="{self.look}" '
            f'data-command="{escape(command)}"><b>{escape(_words(stand))}</b><span></span></div>'
        )

    def _refresh(self) -> None:
        """Look into the folder, unless that was just done, and make anew what may be different."""
        begun = time.monotonic()
        if begun < self._look_at:
            return
        self._look_at = begun + _LOOK_SECONDS
        self.follower.look()
        if self.follower.config is not None:
            self.beside.want(self.follower.saved.step if self.follower.saved else 0)
        shown = (self.follower.changes, self.beside.changes)
        if shown != self._shown and begun >= self._make_at:
            self._shown = shown
            self.parts.show(self._made())
            ended = time.monotonic()
            self._make_at = ended + (ended - begun) / _SHARE

    def _made(self) -> list[Part]:
        """The parts of the page."""
        follower = self.follower
        if follower.config is None:
            where = self.run.resolve()
            lead = follower.refused or "This page fills itself as soon as a run writes into the folder."
            return split(page.header(str(where.parent), where.name, "waiting", False, lead))
        answer = json.loads(self.beside.answer or b"{}")
        tokens = TokenUse(**answer["tokens"]) if answer.get("tokens") else None
        count = (lambda: tokens) if tokens is not None else None
        record = record_of(self.run, follower.config, follower.lines, follower.bad_samples.lines, count)
        record.notes.extend(answer.get("notes", []))
        record.notes.extend([f"Pictures: {self.beside.complaint}"] if self.beside.complaint else [])
        parts = split(body(record, _SLOT, what_ran(record, follower.saved, follower.passed_over)))
        if self._pictured != self.beside.changes:
            self._pictured, self._pictures = self.beside.changes, split(answer.get("pictures", ""))
        place = next(i for i, part in enumerate(parts) if part.name == "pictures")
        return [*parts[:place], *self._pictures, *parts[place + 1 :]]
