"""How many stored views are enough: masked accuracy on never-seen views for K views an image, and for fresh ones."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from beitforge.pipeline.runs.jsonl import read_metrics
from benchmarks.results import launch, write

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "runs" / "demo"
VIEWS, SEEDS, STEPS = ("1", "4", "16", "online"), (0, 1, 2), 400


def main() -> None:
    """The demo's encoder on its 540 test tiles: few enough that every view is seen often. Three seeds."""
    if not (DEMO / "tokenizer" / "tokenizer.json").exists():
        sys.exit("error: run ./launch.sh demo first; this trains on its shards, with its tokenizer")
    images = DEMO / "shards" / "test"
    samples = sum(shard["samples"] for shard in json.loads((images / "manifest.json").read_text())["shards"])
    rows, epochs = [], STEPS * 64 / samples
    with tempfile.TemporaryDirectory() as folder:
        for views in VIEWS:
            ends = [trained(Path(folder), images, views, seed) for seed in SEEDS]
            seen = np.array([[end["train"], end["heldout"], end["accuracy"]] for end in ends])
            rows.append(
                {
                    "views an image": views,
                    "times each is seen": f"{epochs / int(views):.1f}" if views != "online" else "1",
                    "training loss": _spread(seen[:, 0]),
                    "loss on never-seen views": _spread(seen[:, 1]),
                    "masked accuracy on never-seen views": _spread(100 * seen[:, 2], "%"),
                }
            )
            print(rows[-1], file=sys.stderr)
    notes = [
        f"{samples} tiles, {STEPS} steps of 64, demo.yaml's encoder; mean ± standard deviation over {len(SEEDS)} seeds "
        "(order, masks and initial weights). Never-seen views are of the same images, drawn from another seed than "
        "any training view."
    ]
    write("view_ablation", "how many stored views are as good as fresh ones?", rows, {}, notes)


def _spread(values: np.ndarray, unit: str = "") -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}{unit}"


def trained(folder: Path, images: Path, views: str, seed: int) -> dict[str, float]:
    """Tokenize once per K, train, and return the last losses."""
    tokens = folder / f"tokens-{views}"
    run = folder / f"run-{views}-{seed}"
    settings = [f"data.images={images}", f"data.tokenizer={DEMO / 'tokenizer'}", f"data.heldout_images={images}"]
    settings += ["data.heldout_tokens=online", f"data.seed={seed}", f"train.run={run}"]
    settings += [f"train.duration={STEPS} steps", "optimizer.warmup=40 steps", f"checkpoint.every={STEPS} steps"]
    settings += [f"log.heldout_every={STEPS} steps", "log.heldout_samples=540", "log.tensorboard=false"]
    settings += ["data.tokens=online"] if views == "online" else [f"data.tokens={tokens}", f"view.num_views={views}"]
    if views != "online" and not (tokens / "manifest.json").exists():
        launch("tokenize", [str(ROOT / "configs" / "demo.yaml"), *settings])
    launch("pretrain", [str(ROOT / "configs" / "demo.yaml"), *settings])
    last, apart = read_metrics(run, "train")[-1], read_metrics(run, "heldout")[-1]
    assert last["step"] == STEPS, f"the run stopped at step {last['step']}"
    return {"train": last["loss"], "heldout": apart["loss"], "accuracy": apart["masked_accuracy"]}


if __name__ == "__main__":
    main()
