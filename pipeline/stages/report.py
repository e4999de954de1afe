"""`report RUN`: RUN/report.html, one self-contained page: results, curves, and what ran; with --data also the images.

Without --data nothing but the run folder is read: it may be somebody else's, and its config may name anything.
`report A B C`: comparison.html in the working folder, one page for all of them.
"""

from pathlib import Path

from beitforge.pipeline.console import say
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reports import comparison, components
from beitforge.pipeline.reports.provenance import what_ran
from beitforge.pipeline.reports.report import images_left_out, sections_of
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.record import read_config, read_record
from beitforge.shards.storage.files import write_text
from beitforge.shards.storage.staging import refuse_other_file

_PAGE = b"beitforge</title>"  # in the head of every page that is written here


def run(run_folders: list[Path], out: Path | None = None, data: bool = False) -> int:
    """Write the page atomically; returns the exit code. data: whether the sets and the tokenizer that the config names
    are read. Raises ConfigError when a folder is not a run folder."""
    return _report(run_folders[0], out, data) if len(run_folders) == 1 else _compare(run_folders, out)


def _report(run_folder: Path, out: Path | None, data: bool) -> int:
    path = out or run_folder / "report.html"
    refuse_other_file(path, _PAGE)
    record = read_record(run_folder, read_config(run_folder), data)
    passed_over: list[str] = []
    found = newest(run_folder, passed_over.append, whole=True)
    state = found[1] if found else None
    images = [images_left_out("report")]
    if data:
        from beitforge.pipeline.reports import gallery

        images = gallery.render_gallery(record, state)
    sections = sections_of(record, images, what_ran(record, state, passed_over))
    write_text(path, components.page(f"{run_folder.resolve().name} · beitforge", sections))
    weights = f"images by the weights of step {state.step}" if state is not None else "no complete checkpoint"
    weights = weights if data or state is None else f"newest checkpoint of step {state.step}"
    say(f"report of step {record.step}, {weights}: {path}")
    return 0


def _compare(run_folders: list[Path], out: Path | None) -> int:
    if len({folder.resolve() for folder in run_folders}) < len(run_folders):
        raise ConfigError(f"a run is given twice in {' '.join(map(str, run_folders))}; give each once")
    path = out or Path("comparison.html")
    refuse_other_file(path, _PAGE)
    records = [read_record(folder, read_config(folder)) for folder in run_folders]
    write_text(path, components.page("comparison · beitforge", comparison.sections_of(records)))
    say(f"comparison of {len(records)} runs: {path}")
    return 0
