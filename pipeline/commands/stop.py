"""`stop RUN`: ask a run to finish its step, save and end, under whatever launcher and on whatever host it runs."""

import argparse
import contextlib
import json
from pathlib import Path

from beitforge.pipeline.cluster.signals import FINISHED, STOP_FILE, read_ended
from beitforge.pipeline.errors import ConfigError

HELP = "ask a run to finish its step, save and end, under whatever launcher"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or a tokenizer's folder")


def run(arguments: argparse.Namespace) -> int:
    """Write RUN/stop. Raises ConfigError where there is no run, or nothing left to stop."""
    folder = arguments.run
    if not (folder / "config.yaml").exists() and (folder / "training" / "config.yaml").exists():
        folder = folder / "training"  # a tokenizer's folder
    if not (folder / "config.yaml").exists() and not any((folder / "slurm").glob("*.sbatch")):
        raise ConfigError(f"{folder} holds no run; give the folder that train.run names, or a tokenizer's")
    ended = read_ended(folder)
    if (ended and ended[1] == FINISHED) or _finished(folder):
        print(f"{folder} is finished; there is nothing to stop")
        return 0
    partial = folder / f"{STOP_FILE}.partial"
    partial.touch()
    partial.replace(folder / STOP_FILE)
    print(
        f"{folder} will finish its step, save and end; it looks once a second (over NFS the file may take a minute to "
        f"be seen). Started again, it resumes, which also withdraws this request."
    )
    return 0


def _finished(folder: Path) -> bool:
    """Whether the checkpoint of the last step is complete."""
    steps = 0
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    for line in lines:
        if '"start"' in line:
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
                steps = json.loads(line).get("steps", steps)
    return steps > 0 and (folder / "checkpoints" / f"step-{steps}" / "state.json").exists()
