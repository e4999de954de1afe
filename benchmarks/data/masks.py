"""Are our masks BEiT's?"""

import math
from collections.abc import Iterator

import numpy as np

from beitforge.pipeline.config.settings import Mask, Model
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.shards import counter_rng
from benchmarks.results import write

SAMPLES, GRID, SEED, TRIES = 20_000, 14, 0, 10
# docs/recipe.md, "Mask": 20,000 draws of the released generator
PUBLISHED = (
    ("mean masked", "74.47"),
    ("exactly 75", "66.6%"),
    ("least", "64"),
    ("blocks a mask", "4.1"),
    ("masked, corner", "0.040"),
    ("masked, edge middle", "0.189"),
    ("masked, centre", "0.716"),
)


def main() -> None:
    """The statistics of 20,000 masks in both modes beside the published ones."""
    samples = np.arange(SAMPLES)
    most, exact = (masks_of(Mask(exact=mode), samples) for mode in (False, True))
    blocks = check(most, exact)
    columns = [statistics(most, f"{blocks:.2f}"), statistics(exact, f"{blocks:.2f} and single patches")]
    rows = [
        {"of 20,000 masks": name, "published": value, "exact: false": columns[0][i], "exact: true": columns[1][i]}
        for i, (name, value) in enumerate(PUBLISHED)
    ]
    differing = float((most != exact).any(axis=(1, 2)).mean())
    note = "The published generator, in loops and fed the same numbers, gives every one of the `exact: false` masks; a "
    note += f"completed mask keeps its blocks and adds patches anywhere ({differing:.1%} of the masks need that)."
    write("masks", "are our masks BEiT's?", rows, {}, [note])


def masks_of(mask: Mask, samples: np.ndarray) -> np.ndarray:
    """bool [B, 14, 14] as pretraining draws them."""
    return sample_draws(mask, Model(drop_path=0.0), SEED, samples)["mask"].reshape(-1, GRID, GRID)


def statistics(masks: np.ndarray, blocks: str) -> tuple[str, ...]:
    """The cells of a column, in the order of PUBLISHED."""
    counts, share = masks.sum(axis=(1, 2)), masks.mean(axis=0)
    middle = slice(GRID // 2 - 1, GRID // 2 + 1)
    corner = np.mean([share[0, 0], share[0, -1], share[-1, 0], share[-1, -1]])
    edge = np.mean([share[0, middle], share[-1, middle], share[middle, 0], share[middle, -1]])
    places = [f"{value:.3f}" for value in (corner, edge, share[middle, middle].mean())]
    return f"{counts.mean():.2f}", f"{(counts == 75).mean():.1%}", str(counts.min()), blocks, *places


def check(most: np.ndarray, exact: np.ndarray) -> float:
    """Refuse masks that are not the published generator's, or completed ones without 75; returns blocks a mask."""
    attempts = 10 * TRIES
    numbers = np.stack(
        [
            counter_rng.uniform(counter_rng.MASK, SEED, np.arange(SAMPLES)[:, None], 0, i, np.arange(4))
            for i in range(attempts)
        ],
        1,
    )
    total = 0
    for sample in range(SAMPLES):
        expected, blocks = published_mask(Mask(exact=False), iter(numbers[sample].tolist()))
        assert np.array_equal(most[sample], expected), f"sample {sample} is not the published generator's"
        total += blocks
    assert (exact.sum(axis=(1, 2)) == 75).all(), "a completed mask does not have 75"
    assert not (most & ~exact).any(), "completing a mask uncovered a patch"
    return total / SAMPLES


def published_mask(mask: Mask, numbers: Iterator[list[float]]) -> tuple[np.ndarray, int]:
    """BEiT's MaskingGenerator as released: the mask bool [14, 14] and its number of blocks. `numbers` gives area,
    aspect, top and left of each try as uniforms in [0, 1)."""
    masked, blocks, added = np.zeros((GRID, GRID), dtype=bool), 0, 1
    while added and masked.sum() < mask.num_patches:
        left, added = mask.num_patches - int(masked.sum()), 0
        for _ in range(TRIES):
            u = next(numbers)
            area = mask.min_block + (left - mask.min_block) * u[0]
            aspect = math.exp(math.log(1 / mask.aspect_min) * (2 * u[1] - 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= GRID or width >= GRID:
                continue
            top, start = int(u[2] * (GRID - height + 1)), int(u[3] * (GRID - width + 1))
            block = masked[top : top + height, start : start + width]
            added = block.size - int(block.sum())
            if 0 < added <= left:
                block[:], blocks = True, blocks + 1
                break
            added = 0
    return masked, blocks


if __name__ == "__main__":
    main()
