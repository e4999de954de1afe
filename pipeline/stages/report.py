"""`report RUN`: RUN/report.html, one self-contained page: what was learned, how fast, what it looks like, what ran."""

from pathlib import Path

from pipeline import gallery, page
from pipeline.checkpoint import newest
from pipeline.document import body
from pipeline.metrics import say
from pipeline.provenance import what_ran
from pipeline.record import read_record
from pipeline.weights import run_config
from shards.files import write_text


def run(run_folders: list[Path], out: Path | None = None) -> int:
    """Write the page by rename; returns the exit code. Raises ConfigError when it is not a run folder."""
    run_folder = run_folders[0]
    record = read_record(run_folder, run_config(run_folder))
    passed_over: list[str] = []
    found = newest(run_folder, passed_over.append)
    state = found[1] if found else None
    html = body(record, gallery.pictures(record, state), what_ran(record, state, passed_over))
    path = out or run_folder / "report.html"
    write_text(path, page.page(f"{run_folder.resolve().name} · beitforge", html))
    say(f"report of step {record.step}: {path}")
    return 0
