"""The samples that each rank actually read: positions/rank-R.jsonl in the run folder, with `log.positions`.

Serves to check that no sample was lost or repeated. Must not know torch, model, shards or any stage.
"""

import contextlib
import json
import os
from collections import defaultdict
from pathlib import Path

from beitforge.pipeline.runs.jsonl import end_cut_line
from beitforge.shards.errors import about_file


class SampleLog:
    """One line a step: {"session", "step", "samples"}, written after the update of the step."""

    def __init__(self, run: Path, rank: int, session: int):
        """session: a number that grows with every start of the run, the same on all ranks."""
        folder = run / "positions"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank}.jsonl"
        end_cut_line(path)
        self.session, self.file = session, open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()

    def write(self, step: int, samples: list[int]) -> None:
        """The samples this rank took for a step."""
        with about_file(self.file.name):
            self.file.write(json.dumps({"session": self.session, "step": step, "samples": samples}) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """Return when every line is on disk."""
        with about_file(self.file.name):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read_sample_log(run: Path) -> dict[int, list[int]]:
    """The samples of every step, over all ranks, sorted. Of a step repeated after a restart the last session counts; a
    line truncated by a kill is skipped."""
    done: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((run / "positions").glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                done[values["step"]][values["session"]] += values["samples"]
    return {step: sorted(sessions[max(sessions)]) for step, sessions in sorted(done.items())}
