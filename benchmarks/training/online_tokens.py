"""What offline tokens save: one step of BEiT-Base with recorded tokens, and with the tokenizer inside the step."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.data.demo_images import write_tiles
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.tokenizers.dalle import DalleShape
from beitforge.pipeline.tokenizers.storage import save_tokenizer
from benchmarks.learning.tokenizer_precision import random_dalle
from benchmarks.results import launch, write

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, ROUNDS = 8, 3, 2
# multiply-adds of one image (docs/recipe.md, "Cost"): three times the encoder's forward, and the DALL-E encoder's
COSTS = {"base": 54.0, "tokenizer": 26.06}


def main() -> None:
    """Alternating runs of the same engine; images/s of the steps after the first, which warms up."""
    with tempfile.TemporaryDirectory() as folder:
        settings = prepared(Path(folder))
        rates: dict[str, list[float]] = {"recorded": [], "online": []}
        for turn in range(ROUNDS):
            for name, tokens in (("recorded", f"data.tokens={folder}/tokens"), ("online", "data.tokens=online")):
                run = Path(folder) / f"run-{name}-{turn}"
                launch("pretrain", [*settings, tokens, f"train.run={run}"])
                lines = read_metrics(run, "train")
                assert len(lines) == STEPS, f"{name}: {len(lines)} of {STEPS} steps were logged"
                rates[name] += [line["images_per_second"] for line in lines[1:]]
        rows = [
            {"tokens": name, "images/s": float(np.median(found)), "least": min(found), "most": max(found)}
            for name, found in rates.items()
        ]
    ratio = float(np.median(rates["recorded"]) / np.median(rates["online"]))
    expected = 1 + COSTS["tokenizer"] / COSTS["base"]
    notes = [
        f"BEiT-Base at 224 px, a DALL-E encoder of full size at 112 px (random weights cost the same), fp32, "
        f"{BATCH} images a step on 2 processes; median of {ROUNDS} × {STEPS - 1} steps. From multiply-adds alone the "
        f"ratio would be {expected:.2f}."
    ]
    write("online_tokens", "what do recorded tokens save?", rows, {"recorded / online": ratio}, notes)


def prepared(folder: Path) -> list[str]:
    """A few packed photographs, a tokenizer, its tokens; returns the settings of all runs."""
    write_tiles(folder / "images", 1, 1, seed=0)
    launch("pack", [str(folder / "images" / "train"), str(folder / "shards"), "--workers", "1"])
    shape = DalleShape(has_decoder=False)
    weights = random_dalle().state_dict()
    save_tokenizer(folder / "tokenizer", weights, "dalle", dataclasses.asdict(shape), Size(112, 112), "lanczos")
    settings = [str(ROOT / "configs" / "beit_base.yaml"), f"data.images={folder}/shards", "data.heldout_images="]
    settings += ["data.heldout_tokens=", f"data.tokenizer={folder}/tokenizer", "view.num_views=1", "loader.workers=0"]
    settings += [f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}", f"train.duration={STEPS} steps"]
    settings += ["optimizer.warmup=2 steps", "train.precision=fp32", "train.compile=false", "log.every_steps=1"]
    settings += ["log.tensorboard=false", "checkpoint.every=100 steps", "train.zero_stage=1"]
    launch("tokenize", [*settings, f"data.tokens={folder}/tokens"])
    return settings


if __name__ == "__main__":
    main()
