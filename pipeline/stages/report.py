"""`report RUN`: RUN/report.html, one self-contained page: what was learned, how fast, what it looks like, what ran.

`report A B C`: comparison.html in the working folder, one page for all of them.
"""

import time
from pathlib import Path

from pipeline import comparison, gallery, page
from pipeline.checkpoint import newest
from pipeline.config import ConfigError
from pipeline.document import body
from pipeline.metrics import say
from pipeline.provenance import what_ran
from pipeline.record import read_record
from pipeline.weights import run_config
from pipeline.words import clock
from shards.storage.files import write_text


def run(run_folders: list[Path], out: Path | None = None) -> int:
    """Write the page by rename; returns the exit code. Raises ConfigError when it is not a run folder."""
    return _report(run_folders[0], out) if len(run_folders) == 1 else _compare(run_folders, out)


def _report(run_folder: Path, out: Path | None) -> int:
    record = read_record(run_folder, run_config(run_folder))
    passed_over: list[str] = []
    found = newest(run_folder, passed_over.append)
    state = found[1] if found else None
    html = body(record, gallery.pictures(record, state), what_ran(record, state, passed_over))
    path = out or run_folder / "report.html"
    write_text(path, page.page(f"{run_folder.resolve().name} · beitforge", html))
    say(f"report of step {record.step}: {path}")
    return 0


def _compare(run_folders: list[Path], out: Path | None) -> int:
    if len({folder.resolve() for folder in run_folders}) < len(run_folders):
        raise ConfigError(f"a run is given twice in {' '.join(map(str, run_folders))}; give each once")
    records = [read_record(folder, run_config(folder)) for folder in run_folders]
    html = comparison.body(records) + page.footer(f"Written {clock(time.time())} by beitforge.")
    path = out or Path("comparison.html")
    write_text(path, page.page("comparison · beitforge", html))
    say(f"comparison of {len(records)} runs: {path}")
    return 0
