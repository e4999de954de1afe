"""Is pretraining worth it where labels are few? The demo's encoder against the same one untrained, raw pixels, and
supervised training of the pretraining's length; with 1 %, 10 % and all labels, and three seeds.

Reads what `./launch.sh demo` left in runs/demo (shards, tokens, tokenizer, the first seed's pretraining); everything
else goes to runs/few_labels, and what is finished there is not done again. A run has one process of one thread; as many
run at a time as there are cores.
"""

import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.results import launch, write
from pipeline.checkpoint import newest
from pipeline.config import load_config
from pipeline.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
DEMO, OUT = ROOT / "runs" / "demo", ROOT / "runs" / "few_labels"
SEEDS, SHARES = (0, 1, 2), (0.01, 0.1, 1.0)
STEPS = 300  # of fine-tuning
KINDS = {"k-NN": "knn", "linear probe": "linear"}
PROBED = ("trained", "untrained", "raw pixels")

Found = dict[str, dict[float, list[float]]]  # the seeds' accuracies, by method and share


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
    path = run / ("probe.json" if share == 1 else f"probe-{share:g}-{seed}.json")
    if not path.exists():
        shards = [str(DEMO / "shards" / part) for part in ("train", "test")]
        launch("probe", [str(run), *shards, "--label-share", str(share), "--seed", str(seed)])
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


def all_probes(seed: int, length: int) -> dict[float, dict]:
    """The probe's results by share, one after the other: each writes into the run folder."""
    run = pretrained(seed, length)
    return {share: probed(run, seed, share) for share in SHARES}


def measured(length: int) -> tuple[Found, dict[float, int]]:
    """Everything, and how many pictures each share has."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        probes = list(pool.map(lambda seed: all_probes(seed, length), SEEDS))
        ways = {  # the longest first
            f"supervised, {length} steps": lambda seed, share: tuned("supervised", "", seed, share, length),
            "fine-tuned, untrained": lambda seed, share: tuned("untrained", "", seed, share, STEPS),
            "fine-tuned, trained": lambda seed, share: tuned(
                "tuned", str(pretrained(seed, length)), seed, share, STEPS
            ),
        }
        runs = {(n, s): [pool.submit(way, seed, s) for seed in SEEDS] for s in SHARES for n, way in ways.items()}
        found: Found = {
            f"{kind}, {who}": {s: [probe[s]["results"][who][key] for probe in probes] for s in SHARES}
            for kind, key in KINDS.items()
            for who in PROBED
        }
        found |= {n: {s: [run.result() for run in runs[n, s]] for s in SHARES} for n in reversed(ways)}
    return found, {share: probes[0][share]["train_samples"] for share in SHARES}


def main() -> None:
    """Rows are methods, columns shares of the labels."""
    config = load_config(settings(0)[0], settings(0)[1:])
    length = int(config.train.duration.count)
    if not done(DEMO / "pretrain", length):
        sys.exit("error: run ./launch.sh demo first; this uses its shards, tokens, tokenizer and pretraining")
    os.environ |= {"NPROC": "1", "OMP_NUM_THREADS": "1"}
    found, pictures = measured(length)
    rows = [{"": name} | {f"{s:.0%} ({pictures[s]})": cell(by[s]) for s in SHARES} for name, by in found.items()]
    rows += [
        {"": f"{kind}, gained"} | {f"{s:.0%} ({pictures[s]})": cell(gains(found, kind, s), "+") for s in SHARES}
        for kind in (*KINDS, "fine-tuned")
    ]
    write("few_labels", "is pretraining worth it where labels are few?", rows, {}, [note(config.train.global_batch)])


def cell(accuracies: list[float], sign: str = "") -> str:
    """Mean and standard deviation, in percent."""
    return f"{100 * statistics.mean(accuracies):{sign}.1f} ± {100 * statistics.stdev(accuracies):.1f}"


def gains(found: Found, kind: str, share: float) -> list[float]:
    """Each seed's accuracy with pretraining less that of the best of the methods without (by its mean) of the same
    kind. Fine-tuning is compared with both ways of training from scratch."""
    rivals = [n for n in found if n.startswith((kind, "supervised") if kind == "fine-tuned" else kind)]
    rivals.remove(trained := f"{kind}, trained")
    best = max(rivals, key=lambda name: statistics.mean(found[name][share]))
    return [ours - theirs for ours, theirs in zip(found[trained][share], found[best][share], strict=True)]


def note(batch: int) -> str:
    return (
        f"Accuracy in percent: mean and standard deviation over {len(SEEDS)} seeds, each with a pretraining, initial "
        f"weights and labelled pictures of its own; columns: share of each class's pictures that keep their label (how "
        f"many in all). Gained: over the best of its kind without pretraining, seed by seed. Tested on tiles of parts "
        f"of the photographs that no training saw. Fine-tuning: {STEPS} steps of {batch}, as the `finetune` section of "
        f"configs/demo.yaml says; from scratch with lr 2e-3 and no layer-wise decay. The trained encoder saw the "
        f"unlabelled training tiles."
    )


if __name__ == "__main__":
    main()
