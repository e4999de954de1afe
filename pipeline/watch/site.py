"""The live page of a run, made from its folder as it is now."""

import hashlib
import json
import math
import sys
import threading
import time
from html import escape
from pathlib import Path

from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.components import Section, asset
from beitforge.pipeline.reports.provenance import what_ran
from beitforge.pipeline.reports.report import images_left_out, sections_of
from beitforge.pipeline.runs.formatting import DURATION_UNITS, duration
from beitforge.pipeline.runs.record import TokenUse, record_of
from beitforge.pipeline.runs.status import Follower, RunStatus
from beitforge.pipeline.watch.background import THREADS, BackgroundJob
from beitforge.pipeline.watch.fragments import Fragments

_REFRESH_SECONDS = 1.0  # between reads of the folder, however many readers ask
_SHARE = 0.1  # of one core's time that rendering the page may take
_POLL = {"finished": 15_000, "stopped": 15_000}  # milliseconds until a page asks again
_POLL_ELSE = 3_000
_ASSETS = (
    ("beitforge.pipeline.reports", "report.css"),
    ("beitforge.pipeline.reports", "charts.js"),
    ("beitforge.pipeline.watch", "live.css"),
    ("beitforge.pipeline.watch", "live.js"),
)


def _headline(status: RunStatus) -> str:
    left = f" · {duration(status.left)} left" if math.isfinite(status.left) else ""
    return f"{status.summary}{left}"


class Site:
    """The live page of a run. Its methods may be called from any thread."""

    def __init__(self, run_folder: Path, data: bool = False):
        """data: whether the sets and the tokenizer that the config names are read, for images."""
        self.run, self.data = run_folder, data
        self.follower = Follower(run_folder)
        worker = [sys.executable, "-W", "ignore", "-m", "beitforge.pipeline.reports.gallery_worker"]
        self.background = BackgroundJob([*worker, str(run_folder), str(THREADS)])
        self.fragments = Fragments()
        # of the assets: a page that was loaded with other ones reloads itself
        self.version = hashlib.sha256("".join(asset(*each) for each in _ASSETS).encode()).hexdigest()[:12]
        self._lock = threading.Lock()
        self._next_refresh, self._next_render = 0.0, 0.0  # on the monotonic clock
        self._shown = (-1, -1)

    def page(self) -> str:
        """The whole document."""
        with self._lock:
            self._refresh()
            bar = self._bar()
            sections, title = self.fragments.now, self._title()
        script, style = asset(__package__, "live.js"), asset(__package__, "live.css")
        return components.page(title, sections, bar_html=bar, connect="'self'", script=script, style=style)

    def live(self, since: str) -> dict:
        """The run's status, and the sections that are new since the stamp of an earlier answer."""
        with self._lock:
            self._refresh()
            status = self.follower.status()
            answer = {
                "state": status.state,
                "words": _headline(status),
                "seconds": round(status.silent, 1) if math.isfinite(status.silent) else None,
                "title": self._title(),
                "every": _POLL.get(status.state, _POLL_ELSE),
            }
            return {"version": self.version, "status": answer, **self.fragments.since(since)}

    def _title(self) -> str:
        status = self.follower.status()
        name = self.run.resolve().name
        return f"{status.step:,} · {name} · {status.state}" if status.step else f"{name} · {status.state}"

    def _bar(self) -> str:
        status = self.follower.status()
        command = f"./launch.sh watch {self.run}"
        data = {
            "state": status.state,
            "stamp": self.fragments.stamp,
            "version": self.version,
            "units": json.dumps(DURATION_UNITS),
            "command": command,
        }
        attributes = " ".join(f'data-{name}="{escape(text)}"' for name, text in data.items())
        return f'<div class="live" {attributes}><b>{escape(_headline(status))}</b><span></span></div>'

    def _refresh(self) -> None:
        """Read the folder, unless that was just done, and render the sections again when something has changed."""
        begun = time.monotonic()
        if begun < self._next_refresh:
            return
        self._next_refresh = begun + _REFRESH_SECONDS
        self.follower.refresh()
        if self.follower.config is not None and self.data:
            self.background.request(self.follower.saved.step if self.follower.saved else 0)
        shown = (self.follower.changes, self.background.changes)
        if shown != self._shown and begun >= self._next_render:
            self._shown = shown
            self.fragments.show(self._sections())
            ended = time.monotonic()
            self._next_render = ended + (ended - begun) / _SHARE

    def _sections(self) -> list[Section]:
        """The sections of the page as the folder is now."""
        follower = self.follower
        if follower.config is None:
            where = self.run.resolve()
            lead = follower.refused or "This page updates itself as soon as a run writes into the folder."
            return [components.header(str(where.parent), where.name, "waiting", False, lead)]
        result = json.loads(self.background.result or b"{}")
        tokens = TokenUse(**result["tokens"]) if result.get("tokens") else None
        count = (lambda: tokens) if tokens is not None else None
        bad = follower.bad_samples.lines
        record = record_of(self.run, follower.config, follower.lines, bad, count, self.data)
        record.notes.extend([*follower.notes, *result.get("notes", [])])
        record.notes.extend([f"Images: {self.background.error}"] if self.background.error else [])
        images = [Section(**section) for section in result.get("images", [])]
        images = images if self.data else [images_left_out("watch")]
        return sections_of(record, images, what_ran(record, follower.saved, follower.passed_over))
