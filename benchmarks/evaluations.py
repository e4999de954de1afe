"""What do the evaluations inside a run cost, and does training notice them? The demo's encoder on the demo's shards."""

import sys
import tempfile
from pathlib import Path

from benchmarks.results import launch, write
from pipeline.config import load_config
from pipeline.metrics import read_metrics

DEMO = Path(__file__).resolve().parents[1] / "runs" / "demo" / "pretrain" / "config.yaml"


def main() -> None:
    """The demo's pretraining twice: evaluated as often as it is, and only at the end. Refuses unequal losses."""
    if not DEMO.exists():
        sys.exit("error: run ./launch.sh demo first; this trains on its shards")
    config = load_config(str(DEMO), [])
    steps = config.train.duration.steps(0, config.train.global_batch)
    with tempfile.TemporaryDirectory() as folder:
        runs = {"as configured": Path(folder) / "often", "at the end": Path(folder) / "once"}
        for run, settings in zip(runs.values(), ([], [f"log.heldout_every={steps} steps"]), strict=True):
            launch("pretrain", [str(DEMO), f"train.run={run}", "log.every_steps=1", "log.tensorboard=false", *settings])
        often, once = ([line["loss"] for line in read_metrics(run, "train")] for run in runs.values())
        rows = evaluated(runs["as configured"])
    assert len(often) == steps, f"the run logged {len(often)} of {steps} steps"
    assert often == once, "training noticed the evaluations"
    labelled, most = int(rows[-1].pop("_pictures")), config.log.heldout_samples
    due = steps // config.log.heldout_every.steps(0, config.train.global_batch)
    note = (
        f"2 processes, {steps} steps; evaluations were due every {config.log.heldout_every}, {len(rows)} of {due} were "
        f"made within log.evaluation_share {config.log.evaluation_share:g}. Each judges {most} held-out pictures, as "
        f"many seen ones in a trained and a new view (whose tokens it makes), and k-NN on {labelled} of the test "
        f"pictures among up to {10 * most} of the training set. The {steps} losses are those of a run that is only "
        f"evaluated at its end, bit for bit."
    )
    ratios = {"share of the run's time": rows[-1]["share so far"]}
    write("evaluations", "what do the evaluations inside a run cost?", rows, ratios, [note])


def evaluated(run: Path) -> list[dict]:
    """A row for each evaluation."""
    kinds = ("survey", "heldout", "seen_view", "new_view")
    rows = []
    for lines in zip(*(read_metrics(run, kind) for kind in kinds), strict=True):
        survey, heldout, seen, new = lines
        rows.append(
            {
                "after step": survey["step"],
                "seconds": survey["seconds"],
                "share so far": survey["share"],
                "loss, held-out": heldout["loss"],
                "seen view": seen["loss"],
                "new view of the same": new["loss"],
                "k-NN": f"{survey['knn']:.1%}",
                "attention reaches (px), first and last block": reach(survey),
                "_pictures": survey["knn_samples"],
            }
        )
    return rows


def reach(survey: dict) -> str:
    distances = [value for name, value in survey.items() if name.startswith("attention_distance_")]
    return f"{distances[0]:.1f}, {distances[-1]:.1f}"


if __name__ == "__main__":
    main()
