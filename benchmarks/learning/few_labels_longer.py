"""What if supervised training had pretraining's steps too? The supervised runs of few_labels, twice as long.

Needs and keeps what few_labels does, and none of its runs.
"""

import os
from concurrent.futures import ThreadPoolExecutor

from benchmarks.learning.few_labels import LENGTH, SEEDS, SHARES, cell, prepare, tuned
from benchmarks.results import write


def longer(seed: int, share: float) -> float:
    """Test accuracy from drawn weights, after the steps of a pretraining and of a fine-tuning."""
    return tuned("longer", seed, share, steps=2 * LENGTH)


def main() -> None:
    """One row, columns shares of the labels."""
    prepare()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {share: [pool.submit(longer, seed, share) for seed in SEEDS] for share in SHARES}
        found = {share: [run.result() for run in of_share] for share, of_share in runs.items()}
    row = {"": f"supervised, {2 * LENGTH} steps"} | {f"{share:.0%}": cell(found[share]) for share in SHARES}
    write("few_labels_longer", "what if supervised training had pretraining's steps too?", [row], {}, [NOTE])


NOTE = (
    f"Accuracy in percent of {len(SEEDS)} seeds; columns: share of the labels. As few_labels' supervised training, "
    f"with the steps of pretraining and fine-tuning together. All {2 * LENGTH} of them use labels; of those two, "
    f"{LENGTH} do, and one pretraining serves every task and share."
)


if __name__ == "__main__":
    main()
