"""The live page of a run, made from its folder as it is now."""

import hashlib
import json
import math
import sys
import threading
import time
from html import escape
from pathlib import Path

from beitforge.pipeline.reports import components, css, js
from beitforge.pipeline.reports.provenance import what_ran
from beitforge.pipeline.reports.report import body
from beitforge.pipeline.runs.formatting import duration
from beitforge.pipeline.runs.record import TokenUse, record_of
from beitforge.pipeline.runs.status import Follower, RunStatus
from beitforge.pipeline.watch import live_js
from beitforge.pipeline.watch.background import BackgroundJob
from beitforge.pipeline.watch.fragments import Fragment, Fragments, split

_LOOK_SECONDS = 1.0  # between looks into the folder, however many ask
_SHARE = 0.1  # of one core's time that making the page anew may take
_POLL = {"finished": 15_000, "stopped": 15_000}  # milliseconds until a page asks again
_POLL_ELSE = 3_000
_SLOT = '<section id="images"></section>'  # where the images come in, which are cut up once


def _words(stand: RunStatus) -> str:
    return f"{stand.summary} · {duration(stand.left)} left" if math.isfinite(stand.left) else stand.summary


class Site:
    """The page of a run as its folder is now. Its methods may be called from any thread."""

    def __init__(self, run_folder: Path):
        self.run = run_folder
        self.follower = Follower(run_folder)
        self.beside = BackgroundJob(
            [sys.executable, "-W", "ignore", "-m", "beitforge.pipeline.reports.gallery_worker", str(run_folder)]
        )
        self.parts = Fragments()
        self.look = hashlib.sha256((css.STYLE + js.SCRIPT + live_js.SCRIPT).encode()).hexdigest()[:12]
        self._lock = threading.Lock()
        self._look_at, self._make_at = 0.0, 0.0  # on the monotonic clock: not before
        self._shown = (-1, -1)
        self._images: list[Fragment] = []
        self._imaged = 0

    def page(self) -> str:
        """The whole document."""
        with self._lock:
            self._refresh()
            bar = self._bar()
            html = "\n".join([bar, *(part.html for part in self.parts.now)])
            title = self._title()
        return components.page(title, html, connect="'self'", script=live_js.SCRIPT)

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
        self.follower.refresh()
        if self.follower.config is not None:
            self.beside.request(self.follower.saved.step if self.follower.saved else 0)
        shown = (self.follower.changes, self.beside.changes)
        if shown != self._shown and begun >= self._make_at:
            self._shown = shown
            self.parts.show(self._made())
            ended = time.monotonic()
            self._make_at = ended + (ended - begun) / _SHARE

    def _made(self) -> list[Fragment]:
        """The parts of the page."""
        follower = self.follower
        if follower.config is None:
            where = self.run.resolve()
            lead = follower.refused or "This page fills itself as soon as a run writes into the folder."
            return split(components.header(str(where.parent), where.name, "waiting", False, lead))
        answer = json.loads(self.beside.result or b"{}")
        tokens = TokenUse(**answer["tokens"]) if answer.get("tokens") else None
        count = (lambda: tokens) if tokens is not None else None
        record = record_of(self.run, follower.config, follower.lines, follower.bad_samples.lines, count)
        record.notes.extend(answer.get("notes", []))
        record.notes.extend([f"Images: {self.beside.error}"] if self.beside.error else [])
        parts = split(body(record, _SLOT, what_ran(record, follower.saved, follower.passed_over)))
        if self._imaged != self.beside.changes:
            self._imaged, self._images = self.beside.changes, split(answer.get("images", ""))
        place = next(i for i, part in enumerate(parts) if part.name == "images")
        return [*parts[:place], *self._images, *parts[place + 1 :]]
