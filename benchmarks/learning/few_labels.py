"""Is pretraining worth it where labels are few? The demo's encoder, pretrained three times as long, against the same
one untrained, raw pixels, and supervised training of equal length; 1 %, 10 % and all labels, two seeds.

Reads what `./launch.sh demo` left in runs/demo (shards, tokens, tokenizer); everything else goes to runs/few_labels,
and what is finished there is not done again. A run has one process of one thread; as many run at a time as there are
cores.
"""

import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.stages.probe import ProbeOptions
from benchmarks.results import launch, write

ROOT = Path(__file__).resolve().parents[2]
DEMO, OUT = ROOT / "runs" / "demo", ROOT / "runs" / "few_labels"
SEEDS = (0, 1)
SHARES = (0.01, 0.1, 1.0)  # of the labels
LENGTH = 2100  # steps of pretraining, and of fine-tuning and training from scratch
# the fastest on a CPU
FAST = ["train.precision=bf16", "model.kernels=reference", "train.micro_batch=64", "finetune.micro_batch=64"]
# of all supervised training, whatever the weights it begins with
SUPERVISED = [
    "finetune.lr=2e-3",
    "finetune.layer_decay=1",
    "finetune.mixup=0.8",
    "finetune.cutmix=1.0",
    "finetune.erase=0.25",
]
KINDS = {"k-NN": "knn", "linear probe": "linear"}
PROBED = ("trained", "untrained", "raw pixels")

Found = dict[str, dict[float, list[float]]]  # the seeds' accuracies, by method and share


def settings(seed: int) -> list[str]:
    """The demo's config and folders; the seed draws weights, order, masks, and which images keep their labels."""
    data = {"images": "shards/train", "tokens": "tokens/train", "tokenizer": "tokenizer"}
    data |= {"labelled_images": "shards/train", "labelled_test": "shards/test"}
    return [
        str(ROOT / "configs" / "demo.yaml"),
        *(f"data.{n}={DEMO / f}" for n, f in data.items()),
        f"data.seed={seed}",
        *FAST,
    ]


def done(run: Path, steps: int = LENGTH) -> bool:
    """Whether a run has saved its last step."""
    found = newest(run, lambda _: None)
    return found is not None and found[1].step == steps


def pretrained(seed: int) -> Path:
    """The run folder of a pretraining from this seed."""
    run = OUT / f"pretrain-{seed}"
    if not done(run):
        words = [f"train.run={run}", f"train.duration={LENGTH} steps", "log.evaluation_share=0"]
        launch("pretrain", [*settings(seed), *words])
    return run


def probed(run: Path, seed: int, share: float) -> dict:
    """The probe's results with a share of the labels."""
    path = run / ProbeOptions(label_share=share, seed=seed).file
    if not path.exists():
        shards = [str(DEMO / "shards" / part) for part in ("train", "test")]
        launch("probe", [str(run), *shards, "--label-share", str(share), "--seed", str(seed)])
    return json.loads(path.read_text())


def tuned(name: str, seed: int, share: float, init: str | Path = "", steps: int = LENGTH) -> float:
    """Accuracy on the test set after supervised training from `init`, or from drawn weights."""
    run = OUT / f"{name}-{seed}-{share}"
    if not done(run, steps):
        words = {"run": run, "label_share": share, "init": init, "duration": f"{steps} steps"}
        words |= {"warmup": f"{steps // 10} steps", "test_every": f"{steps} steps"}
        launch("finetune", [*settings(seed), *(f"finetune.{key}={word}" for key, word in words.items()), *SUPERVISED])
    (last,) = [line for line in read_metrics(run, "test") if line["step"] == steps]
    return last["accuracy"]


def fine_tuned(seed: int, share: float) -> float:
    """From the pretrained encoder."""
    return tuned("tuned", seed, share, pretrained(seed))


def supervised(seed: int, share: float) -> float:
    """From the same encoder untrained."""
    return tuned("supervised", seed, share)


WAYS = {"fine-tuned, untrained (supervised)": supervised, "fine-tuned, trained": fine_tuned}


def all_probes(seed: int) -> dict[float, dict]:
    """The probe's results by share."""
    run = pretrained(seed)
    return {share: probed(run, seed, share) for share in SHARES}


def measured() -> tuple[Found, dict[float, int]]:
    """Everything, and how many images each share has."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        probes = list(pool.map(all_probes, SEEDS))
        runs = {(n, s, x): pool.submit(way, x, s) for x in SEEDS for n, way in WAYS.items() for s in SHARES}
        found: Found = {
            f"{kind}, {who}": {s: [probe[s]["results"][who][key] for probe in probes] for s in SHARES}
            for kind, key in KINDS.items()
            for who in PROBED
        }
        found |= {n: {s: [runs[n, s, seed].result() for seed in SEEDS] for s in SHARES} for n in WAYS}
    return found, {share: probes[0][share]["train_samples"] for share in SHARES}


def prepare() -> None:
    """Processes of one thread, on the demo's data."""
    if not (DEMO / "tokens" / "train" / "manifest.json").exists():
        sys.exit("error: run ./launch.sh demo first; this uses its shards, tokens and tokenizer")
    os.environ |= {"NPROC": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Rows are methods, columns shares of the labels."""
    prepare()
    found, images = measured()
    rows = [{"": name} | {f"{s:.0%} ({images[s]})": cell(by[s]) for s in SHARES} for name, by in found.items()]
    rows += [
        {"": f"{kind}, gained"} | {f"{s:.0%} ({images[s]})": cell(gains(found, kind, s), "+") for s in SHARES}
        for kind in (*KINDS, "fine-tuned")
    ]
    write("few_labels", "is pretraining worth it where labels are few?", rows, {}, [NOTE])


def cell(accuracies: list[float], sign: str = "") -> str:
    """Of every seed, in percent."""
    return " / ".join(f"{100 * accuracy:{sign}.1f}" for accuracy in accuracies)


def gains(found: Found, kind: str, share: float) -> list[float]:
    """Each seed's accuracy with pretraining less that of the best method (by its mean) of the same kind without."""
    rivals = [name for name in found if name.startswith(kind)]
    rivals.remove(trained := f"{kind}, trained")
    best = max(rivals, key=lambda name: statistics.mean(found[name][share]))
    return [ours - theirs for ours, theirs in zip(found[trained][share], found[best][share], strict=True)]


NOTE = (
    f"Accuracy in percent of {len(SEEDS)} seeds, each with a pretraining, initial weights and labelled images of "
    f"its own; columns: share of each class's images that keep their label (how many in all). Gained: over the "
    f"best of its kind without pretraining, seed by seed. Tested on tiles of parts of the photographs that no "
    f"training saw. Pretraining: configs/demo.yaml for {LENGTH} steps of 64, on the training tiles without their "
    f"labels. Fine-tuning and supervised training differ in nothing but the weights they begin with: {LENGTH} steps "
    f"of 64, lr 2e-3, no layer-wise decay, mixup, cutmix, erasing; pretraining's own steps come on top. These settings "
    f"were chosen by the first seed's accuracy; the second seed had no say. All of it in bf16."
)


if __name__ == "__main__":
    main()
