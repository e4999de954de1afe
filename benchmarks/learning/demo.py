"""What does the demo's encoder learn? Reads the finished run of ./launch.sh demo."""

import json
import sys
from pathlib import Path

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.runs.record import token_use
from benchmarks.results import write

RUN = Path(__file__).resolve().parents[2] / "runs" / "demo" / "pretrain"


def main() -> None:
    """The demo's closing numbers as a table; refuses an unfinished run."""
    if not (RUN / "probe.json").exists():
        sys.exit("error: run ./launch.sh demo first; this reads what it left in runs/demo")
    config = load_config(str(RUN / "config.yaml"), [])
    probe = json.loads((RUN / "probe.json").read_text())
    steps = config.train.duration.steps(0, config.train.global_batch)
    assert probe["step"] == steps and probe["label_share"] == 1, "the probe is of another step, or of few labels"
    rows = [
        {"encoder": who, "linear probe": f"{result['linear']:.1%}", "k-NN": f"{result['knn']:.1%}"}
        for who, result in probe["results"].items()
    ]
    apart, use = read_metrics(RUN, "heldout")[-1], token_use(config)
    codes = json.loads((Path(config.data.tokenizer) / "measured.json").read_text())
    note = f"{probe['classes']} photographs as classes, {probe['train_samples']} tiles to fit, {probe['test_samples']} "
    note += (
        f"of unseen parts to test; one seed. After {steps} steps: held-out loss {apart['loss']:.3f}, masked accuracy "
    )
    note += f"{apart['masked_accuracy']:.1%} (always the commonest token: {use.majority:.1%}). Tokenizer: "
    note += f"{codes['used']} of {codes['vocabulary']} codes used, perplexity {codes['perplexity']:.0f}, "
    note += f"{codes['psnr_db']:.1f} dB."
    write("demo", "what does ten minutes of pretraining on two cores teach?", rows, {}, [note])


if __name__ == "__main__":
    main()
