"""`stop RUN`: ask a run to finish its step, save and end, under whatever launcher and on whatever host it runs."""

import argparse
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
    from beitforge.pipeline.runs.jsonl import count, read_metrics

    starts = read_metrics(folder, "start")
    steps = count(starts[-1], "steps") if starts else 0
    return steps > 0 and (folder / "checkpoints" / f"step-{steps}" / "state.json").exists()
