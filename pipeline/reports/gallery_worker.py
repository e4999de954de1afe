"""`python -m beitforge.pipeline.reports.gallery_worker RUN THREADS OUT`: the expensive sections of a live page, made in
a process of its own from the sets that the run's config names, which the user has agreed to.

It has the lowest priority, uses THREADS threads and no GPU, and ends with the process that started it. Must not know
any stage.
"""

import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from beitforge.__main__ import forget_working_folder
from beitforge.pipeline.cluster.signals import end_with_launcher
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.components import Section
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import metric_line, read_lines
from beitforge.pipeline.runs.record import RunRecord, attempt, record_of, token_use


def main(run: Path, threads: int, out: Path) -> None:
    """Write {"images": [{"id", "html"}, …], "tokens": statistics of the token set or null, "notes": what is missing and
    why} into `out`."""
    os.nice(19)
    end_with_launcher()
    config, notes = load_config(str(run / "config.yaml"), [], run), list[str]()
    record = record_of(run, config, read_lines(run / "metrics.jsonl", run, metric_line).lines, [], None, data=True)
    tokens = attempt("Token statistics", notes, lambda: token_use(config)) if record.job == "pretrain" else None
    images = [asdict(section) for section in _images(record, threads)]
    result = {"images": images, "tokens": asdict(tokens) if tokens else None, "notes": notes}
    out.write_text(json.dumps(result), encoding="utf-8")


def _images(record: RunRecord, threads: int) -> list[Section]:
    """The image sections of the newest checkpoint."""
    missing = [name for name in ("torch", "deepspeed") if importlib.util.find_spec(name) is None]
    if missing:
        line = f"They need {' and '.join(missing)}, not installed on this machine; run `report` where training runs."
        return [components.section("images", "Images", "", components.notes([line]))]
    import torch

    from beitforge.pipeline.reports import gallery

    torch.set_num_threads(threads)
    found = newest(record.run, lambda _: None, whole=True)
    return gallery.render_gallery(record, found[1] if found else None)


if __name__ == "__main__":
    forget_working_folder()
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
