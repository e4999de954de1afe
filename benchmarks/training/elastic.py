"""Does a training that changes its number of processes and ZeRO stage on the way lose what an unbroken one loses?"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from beitforge.pipeline.runs.jsonl import read_metrics
from benchmarks.results import write

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "runs" / "demo"
STEPS = 40
PARTS = ((1, 0), (2, 1), (4, 3), (2, 2))  # processes and stage, ten steps each
SETTINGS = ["train.global_batch=32", "train.micro_batch=8", "log.every_steps=1", f"train.duration={STEPS} steps"]
SETTINGS += ["optimizer.warmup=5 steps", "data.heldout_images=", "data.heldout_tokens=", "checkpoint.every=10 steps"]
SETTINGS += ["checkpoint.keep=9"]


def main() -> None:
    """The demo's encoder with its two parameter groups, in fp32, by the command itself."""
    config_file = DEMO / "pretrain" / "config.yaml"
    if not config_file.exists():
        sys.exit("error: run ./launch.sh demo first; this trains on its shards")
    with tempfile.TemporaryDirectory() as folder:
        whole, run = Path(folder) / "whole", Path(folder) / "run"
        _pretrain(config_file, whole, 2, 2)
        for part, (processes, stage) in enumerate(PARTS):
            _pretrain(config_file, run, processes, stage)
            for late in range(10 * (part + 2), STEPS + 1, 10):  # as if it had ended after its ten steps
                (run / "checkpoints" / f"step-{late}" / "state.json").unlink()
        broken, unbroken = ([line["loss"] for line in read_metrics(path, "train")] for path in (run, whole))
    assert len(broken) == len(unbroken) == STEPS, f"{len(broken)} and {len(unbroken)} steps were logged"
    rows = []
    for part, (processes, stage) in enumerate(PARTS):
        steps = range(10 * part, 10 * part + 10)
        rows.append(
            {
                "steps": f"{steps[0] + 1}–{steps[-1] + 1}",
                "processes": processes,
                "ZeRO": stage,
                "last loss": f"{broken[steps[-1]]:.7f}",
                "unbroken": f"{unbroken[steps[-1]]:.7f}",
                "largest difference": max(abs(broken[i] - unbroken[i]) for i in steps),
            }
        )
    notes = [
        "One training of the demo's encoder in fp32, decay and no-decay groups as always, stopped and started three "
        "times with another number of processes under another ZeRO stage; beside it 2 processes under ZeRO-2 in one "
        "go. Every start lays the checkpoint out anew by itself. What differs is the order of sums over processes."
    ]
    write("elastic", "are the losses those of an unbroken run?", rows, {}, notes)


def _pretrain(config_file: Path, run: Path, processes: int, stage: int) -> None:
    environment = {**os.environ, "BEITFORGE_PYTHON": sys.executable, "NPROC": str(processes)}
    command = [str(ROOT / "launch.sh"), "pretrain", str(config_file), *SETTINGS, f"train.run={run}"]
    done = subprocess.run(
        [*command, f"train.zero_stage={stage}"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    main()
