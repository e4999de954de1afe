"""Is pretraining worth it where labels are few? The demo's encoder against the same one untrained, raw pixels, and
supervised training of the pretraining's length; with 1 %, 10 % and all labels, and three seeds.

Reads what `./launch.sh demo` left in runs/demo (shards, tokens, tokenizer); everything else goes to runs/few_labels,
and what is finished there is not done again.
"""

import json
import statistics
import sys
from pathlib import Path

from benchmarks.results import launch, write
from pipeline.checkpoint import newest
from pipeline.config import load_config
from pipeline.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
DEMO, OUT = ROOT / "runs" / "demo", ROOT / "runs" / "few_labels"
SEEDS, SHARES = (0, 1, 2), (0.01, 0.1, 1.0)
STEPS = 300  # of fine-tuning
PROBED = ("trained", "untrained", "raw pixels")


def settings(seed: int) -> list[str]:
    """The demo's config and folders; the seed draws weights, order, masks, and which pictures keep their labels."""
    data = {"images": "shards/train", "tokens": "tokens/train", "tokenizer": "tokenizer"}
    data |= {"labelled_images": "shards/train", "labelled_test": "shards/test"}
    return [
        str(ROOT / "configs" / "demo.yaml"),
        *(f"data.{n}={DEMO / f}" for n, f in data.items()),
        f"data.seed={seed}",
    ]


def done(run: Path, steps: int) -> bool:
    """Whether a run has saved its last step."""
    found = newest(run, lambda _: None)
    return found is not None and found[1].step == steps


def pretrained(seed: int, length: int) -> Path:
    """The run folder of a pretraining from this seed."""
    run = OUT / f"pretrain-{seed}" if seed else DEMO / "pretrain"  # whose seed is 0
    if not done(run, length):
        launch("pretrain", [*settings(seed), f"train.run={run}", "log.evaluation_share=0"])
    return run


def probed(run: Path, seed: int, share: float) -> dict:
    """The probe's results with a share of the labels."""
    path = OUT / f"probe-{seed}-{share}.json"
    if not path.exists():
        shards = [str(DEMO / "shards" / part) for part in ("train", "test")]
        launch("probe", [str(run), *shards, "--label-share", str(share), "--seed", str(seed)])
        path.write_text((run / "probe.json").read_text())
    return json.loads(path.read_text())


def tuned(name: str, init: str, seed: int, share: float, steps: int) -> float:
    """Accuracy on the test set after supervised training of so many steps."""
    run = OUT / f"{name}-{seed}-{share}"
    if not done(run, steps):
        words = [f"finetune.run={run}", f"finetune.init={init}", f"finetune.label_share={share}"]
        words += [f"finetune.duration={steps} steps", f"finetune.warmup={steps // 10} steps"]
        words += [] if init else ["finetune.lr=2e-3", "finetune.layer_decay=1"]  # no layer has learned anything yet
        launch("finetune", [*settings(seed), *words, f"finetune.test_every={steps} steps"])
    (last,) = [line for line in read_metrics(run, "test") if line["step"] == steps]
    return last["accuracy"]


def trained_and_tested(seed: int, length: int, found: dict[str, dict[float, list[float]]]) -> dict[float, int]:
    """All of one seed, added to `found`: accuracies by method and share. Returns how many pictures each share has."""
    run, pictures = pretrained(seed, length), {}
    for share in SHARES:
        probe = probed(run, seed, share)
        pictures[share] = probe["train_samples"]
        each = {f"{kind}, {who}": probe["results"][who][key] for kind, key in KINDS for who in PROBED}
        each["fine-tuned, trained"] = tuned("tuned", str(run), seed, share, STEPS)
        each["fine-tuned, untrained"] = tuned("untrained", "", seed, share, STEPS)
        each[f"supervised, {length} steps"] = tuned("supervised", "", seed, share, length)
        for name, accuracy in each.items():
            found.setdefault(name, {}).setdefault(share, []).append(accuracy)
    return pictures


def main() -> None:
    """Everything for every seed and share; rows are methods, columns shares of the labels."""
    config = load_config(settings(0)[0], settings(0)[1:])
    if not (DEMO / "tokens" / "train" / "manifest.json").exists():
        sys.exit("error: run ./launch.sh demo first; this uses its shards, tokens and tokenizer")
    if sys.argv[1:2] == ["--seed"]:  # only its runs, for those who have a machine for each
        trained_and_tested(int(sys.argv[2]), int(config.train.duration.count), {})
        return
    length = int(config.train.duration.count)
    found: dict[str, dict[float, list[float]]] = {}
    pictures: dict[float, int] = {}
    for seed in SEEDS:
        pictures |= trained_and_tested(seed, length, found)
    rows = [{"": name} | {f"{s:.0%} ({pictures[s]})": cell(v) for s, v in by.items()} for name, by in found.items()]
    ratios = {f"{kind} − best without pretraining, {s:.0%}": gain(found, kind, s) for kind in GAINS for s in SHARES}
    write(
        "few_labels", "is pretraining worth it where labels are few?", rows, ratios, [note(config.train.global_batch)]
    )


KINDS = (("k-NN", "knn"), ("linear probe", "linear"))
GAINS = ("k-NN", "linear probe", "fine-tuned")


def cell(accuracies: list[float]) -> str:
    return f"{statistics.mean(accuracies):.1%} ± {statistics.stdev(accuracies):.1%}"


def gain(found: dict[str, dict[float, list[float]]], kind: str, share: float) -> float:
    """Of the trained encoder's mean accuracy over the best of the others of its kind; 0.1 is ten points. Fine-tuning is
    compared with both ways of training from scratch."""
    others = [name for name in found if name.startswith((kind, "supervised") if kind == "fine-tuned" else kind)]
    means = {name: statistics.mean(found[name][share]) for name in others}
    trained = means.pop(f"{kind}, trained")
    return trained - max(means.values())


def note(batch: int) -> str:
    return (
        f"Mean and standard deviation over {len(SEEDS)} seeds, each with a pretraining, initial weights and labelled "
        f"pictures of its own; columns: share of each class's pictures that keep their label (how many in all)."
        f" Accuracy on tiles of parts of the photographs that no training saw. Fine-tuning: {STEPS} steps of {batch}, "
        f"as the `finetune` section of configs/demo.yaml says. The trained encoder saw the unlabelled training tiles."
    )


if __name__ == "__main__":
    main()
