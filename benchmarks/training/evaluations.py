"""What do the evaluations inside a run cost, and does training notice them? The demo's encoder on the demo's shards."""

import sys
import tempfile
from pathlib import Path

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.runs.jsonl import read_metrics
from benchmarks.results import launch, write

DEMO = Path(__file__).resolve().parents[2] / "runs" / "demo" / "pretrain"


def main() -> None:
    """The demo's pretraining, and the same evaluated at its end alone. Refuses unequal losses."""
    if not (DEMO / "config.yaml").exists():
        sys.exit("error: run ./launch.sh demo first; this reads what it left in runs/demo, and trains on its shards")
    config = load_config(str(DEMO / "config.yaml"), [])
    steps = config.train.duration.steps(0, config.train.global_batch)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        once = [f"train.run={run}", f"log.heldout_every={steps} steps", "log.tensorboard=false"]
        launch("pretrain", [str(DEMO / "config.yaml"), *once])
        logged = [{line["step"]: line["loss"] for line in read_metrics(each, "train")} for each in (DEMO, run)]
    assert len(read_metrics(DEMO, "start")) == 1, "the demo was interrupted: shares are of one start, run it anew"
    assert logged[0] == logged[1] and steps in logged[0], "training noticed the evaluations"
    rows = evaluated(DEMO)
    labelled, most = int(rows[-1]["_images"]), config.log.heldout_samples
    due = steps // config.log.heldout_every.steps(0, config.train.global_batch)
    note = (
        f"The demo's run of {steps} steps; evaluations were due every {config.log.heldout_every}, {len(rows)} of {due} "
        f"were made within log.evaluation_share {config.log.evaluation_share:g}. Each judges {most} held-out images, "
        f"as many seen ones in a trained and a new view (whose tokens it makes), and k-NN on {labelled} of the test "
        f"images among up to {10 * most} of the training set. Its {len(logged[0])} logged losses are, bit for bit, "
        f"those of a run that was only evaluated at its end."
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
                "_images": survey["knn_samples"],
            }
        )
    return rows


def reach(survey: dict) -> str:
    distances = [value for name, value in survey.items() if name.startswith("attention_distance_")]
    return f"{distances[0]:.1f}, {distances[-1]:.1f}"


if __name__ == "__main__":
    main()
