"""`python -m beitforge.pipeline.reports.gallery_worker RUN OUT`: what of a live page takes long, made in a process of
its own.

It yields to everything else on the node, uses few threads and no GPU, and ends with whoever started it. Must not know
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
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.record import RunRecord, attempt, json_lines, record_of, token_use
from beitforge.pipeline.watch.background import THREADS


def main(run: Path, out: Path) -> None:
    """Write {"images": HTML, "tokens": statistics of the token set or null, "notes": why not} into `out`."""
    os.nice(19)
    end_with_launcher()
    config, notes = load_config(str(run / "config.yaml"), []), list[str]()
    record = record_of(run, config, json_lines(run / "metrics.jsonl"), [], None)
    tokens = attempt("Token statistics", notes, lambda: token_use(config)) if record.job == "pretrain" else None
    answer = {"images": _images(record), "tokens": asdict(tokens) if tokens else None, "notes": notes}
    out.write_text(json.dumps(answer), encoding="utf-8")


def _images(record: RunRecord) -> str:
    """Those of the newest checkpoint."""
    missing = [name for name in ("torch", "deepspeed") if importlib.util.find_spec(name) is None]
    if missing:
        line = (
            f"They need {' and '.join(missing)}, which this machine has not; `report` makes them where training runs."
        )
        return components.section("images", "Images", "", components.notes([line]))
    import torch

    from beitforge.pipeline.reports import gallery

    torch.set_num_threads(THREADS)
    found = newest(record.run, lambda _: None)
    return gallery.render_gallery(record, found[1] if found else None)


if __name__ == "__main__":
    forget_working_folder()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
