"""Masks: docs/recipe.md's statistics, the released algorithm sample by sample, and a function of the sample alone."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import xxhash

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Mask, Model
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.pipeline.model.masking import draw_masks
from beitforge.shards import counter_rng

MODEL = Model(drop_path=0.0)
PUBLISHED, EXACT = Mask(exact=False), Mask()


def masks_of(mask: Mask, samples: np.ndarray, seed: int = 0) -> np.ndarray:
    """Masks bool [samples, 14, 14] as the stream draws them."""
    return sample_draws(mask, MODEL, seed, samples)["mask"].reshape(-1, 14, 14)


def uniforms(seed: int, samples: np.ndarray) -> Callable[[np.ndarray, range], np.ndarray]:
    def uniform(which: np.ndarray, tries: range) -> np.ndarray:
        attempts = np.arange(tries.start, tries.stop)[:, None]
        return counter_rng.uniform(counter_rng.MASK, seed, samples[which, None, None], 0, attempts, np.arange(4))

    return uniform


def first_tries(seed: int, samples: int, tries: int) -> np.ndarray:
    """The uniforms of samples 0 … samples - 1, [samples, tries, 4]."""
    return uniforms(seed, np.arange(samples))(np.arange(samples), range(tries))


def plain_mask(mask: Mask, rows: int, columns: int, numbers: Iterator[np.ndarray]) -> tuple[np.ndarray, int]:
    """docs/recipe.md, "Mask", and the released MaskingGenerator, in loops: the mask and its number of blocks. `numbers`
    gives (area, aspect, top, left) of each try in turn, as uniforms in [0, 1)."""
    masked, blocks = np.zeros((rows, columns), dtype=bool), 0
    low, high = math.log(mask.aspect_min), math.log(1 / mask.aspect_min)
    while masked.sum() < mask.num_patches:
        left = mask.num_patches - int(masked.sum())
        added = 0
        for _ in range(10):
            u = next(numbers)
            left = min(left, mask.max_block or mask.num_patches)
            area = mask.min_block + (left - mask.min_block) * u[0]
            aspect = math.exp(low + (high - low) * u[1])
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < rows and width < columns:
                top, start = int(u[2] * (rows - height + 1)), int(u[3] * (columns - width + 1))
                new = 0
                for row in range(top, top + height):
                    for column in range(start, start + width):
                        new += not masked[row, column]
                if 0 < new <= left:
                    masked[top : top + height, start : start + width] = True
                    added, blocks = new, blocks + 1
            if added:
                break
        if not added:
            break
    return masked, blocks


@pytest.mark.parametrize(
    ("mask", "grid"),
    [
        (PUBLISHED, (14, 14)),
        (Mask(exact=False, num_patches=25, min_block=4), (8, 8)),
        (Mask(exact=False, num_patches=40, min_block=9, aspect_min=0.5), (6, 12)),
        (Mask(exact=False, num_patches=6, min_block=2, aspect_min=1.0), (4, 4)),
        (Mask(exact=False, num_patches=6, min_block=6), (3, 3)),
        (Mask(exact=False, max_block=20), (14, 14)),
        (Mask(exact=False, num_patches=40, min_block=9, max_block=9, aspect_min=0.5), (6, 12)),
        (Mask(exact=False, max_block=500), (14, 14)),
    ],
)
def test_equals_the_released_algorithm(mask, grid):
    """Driven by the same uniform numbers, each sample's mask is that of the plain algorithm."""
    samples = np.arange(300)
    found = draw_masks(mask, grid, len(samples), uniforms(5, samples), lambda which: np.zeros(0))
    tries = first_tries(5, 300, 120)
    for sample in samples:
        expected, _ = plain_mask(mask, *grid, iter(tries[sample]))
        assert np.array_equal(found[sample].reshape(grid), expected), f"sample {sample}"


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    return masks_of(PUBLISHED, np.arange(20_000))


def test_published_statistics(many):
    """docs/recipe.md: of 20,000, mean 74.47, exactly 75 in 66.6 %, least 64. Draws are fixed, so this never flakes."""
    counts = many.sum(axis=(1, 2))
    assert counts.mean() == pytest.approx(74.47, abs=0.05)
    assert (counts == 75).mean() == pytest.approx(0.666, abs=0.01)
    assert counts.max() == 75
    assert counts.min() >= 60


def test_published_places(many):
    """docs/recipe.md: masked with probability 0.040 in a corner, 0.189 mid-edge, 0.716 in the centre; the same
    on all sides."""
    share = many.mean(axis=0)
    corners = [share[0, 0], share[0, -1], share[-1, 0], share[-1, -1]]
    edges = [share[0, 6:8], share[-1, 6:8], share[6:8, 0], share[6:8, -1]]
    assert np.mean(corners) == pytest.approx(0.040, abs=0.003)
    assert np.mean(edges) == pytest.approx(0.189, abs=0.006)
    assert share[6:8, 6:8].mean() == pytest.approx(0.716, abs=0.01)
    for turned in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - turned).max() < 0.025


def test_published_blocks():
    """docs/recipe.md: 4.1 blocks a mask, as the plain algorithm counts them."""
    tries = first_tries(0, 2000, 120)
    blocks = [plain_mask(PUBLISHED, 14, 14, iter(tries[sample]))[1] for sample in range(2000)]
    assert np.mean(blocks) == pytest.approx(4.1, abs=0.1)


def test_no_block_is_larger_than_its_limit():
    """More and smaller blocks, each of at most max_block new patches; the default is no limit of its own."""
    tries = first_tries(0, 400, 240)
    small = Mask(exact=False, max_block=20)
    counts = [plain_mask(small, 14, 14, iter(tries[sample])) for sample in range(400)]
    assert np.mean([blocks for _, blocks in counts]) > 6 > 4.1
    assert all(masked.sum() <= 20 * blocks for masked, blocks in counts)
    same = [masks_of(Mask(exact=False, max_block=limit), np.arange(400)) for limit in (0, 75, 196)]
    assert np.array_equal(same[0], same[1]) and np.array_equal(same[0], same[2])


def test_exact_masks_have_exactly_that_many():
    """The default: always 75, which fixed shapes need."""
    counts = masks_of(EXACT, np.arange(20_000)).sum(axis=(1, 2))
    assert counts.tolist() == [75] * 20_000


def test_exact_only_adds_to_the_published_mask(many):
    """BEiT v2's completion: whatever the blocks left open is filled with patches anywhere, all alike."""
    exact = masks_of(EXACT, np.arange(20_000))
    assert (exact | ~many).all()
    added = (exact & ~many).sum(axis=0)
    open_patches = (~many[many.sum(axis=(1, 2)) < 75]).mean(axis=0)
    share = added / added.sum() / (open_patches / open_patches.sum())
    assert added.sum() == (75 - many.sum(axis=(1, 2))).sum()
    assert share[:4].mean() == pytest.approx(1, abs=0.1)
    assert share[5:9, 5:9].mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("mask", [PUBLISHED, EXACT])
def test_a_mask_depends_on_its_sample_alone(mask):
    """Alone, in any batch, in any order, next to anything: the same mask."""
    samples = np.array([0, 7, 2**40, 12, 3])
    together = masks_of(mask, samples)
    assert np.array_equal(masks_of(mask, samples[::-1])[::-1], together)
    for place, sample in enumerate(samples):
        assert np.array_equal(masks_of(mask, np.array([sample]))[0], together[place])
    assert len({row.tobytes() for row in together}) == len(samples)
    assert not np.array_equal(masks_of(mask, samples, seed=1), together)


def test_golden_masks():
    """sample_draws(Mask(), Model(), 0, np.array([0, 2**40]))["mask"], packed. A change breaks every run's resume."""
    found = sample_draws(Mask(), Model(), 0, np.array([0, 2**40]))["mask"]
    assert [np.packbits(row).tobytes().hex() for row in found] == [
        "000000000000000f003c00ffc3ff0ffc0ff03fc07f01fc07f0",
        "00000007811e007801e7879e1e7879e1e787861e187861e000",
    ]


@pytest.mark.parametrize(
    ("mask", "model", "golden"),
    [
        (EXACT, Model(), "4e3d11c8b52c2040"),
        (PUBLISHED, Model(), "b4e42ae5497375d2"),
        (Mask(num_patches=300, max_block=40), Model(input_size=Size(128, 1280)), "09e0ebdc13610aa2"),
    ],
    ids=["exact", "published", "wide"],
)
def test_golden_draws_of_a_thousand(mask, model, golden):
    """xxh3 of the packed masks, and of the branches kept, of 500 samples from 0 on and 500 far away."""
    samples = np.concatenate([np.arange(500), 2**40 + 3 * np.arange(500)])
    drawn = sample_draws(mask, model, 5, samples)
    assert xxhash.xxh3_64_hexdigest(np.packbits(drawn["mask"]).tobytes()) == golden
    assert xxhash.xxh3_64_hexdigest(np.packbits(drawn["keep"]).tobytes()) == "ee6b9456a169b95e"


def test_completion_is_drawn_where_it_is_needed():
    """fill() is asked once, for the samples whose blocks left patches open, and only when masks are to be exact."""
    asked: list[int] = []

    def fill(which: np.ndarray) -> np.ndarray:
        asked.extend(which.tolist())
        return np.zeros((len(which), 196))

    published = draw_masks(PUBLISHED, (14, 14), 30, uniforms(0, np.arange(30)), fill)
    assert not asked
    draw_masks(EXACT, (14, 14), 30, uniforms(0, np.arange(30)), fill)
    assert asked == np.flatnonzero(published.sum(axis=1) < 75).tolist() != []


def test_no_more_tries_are_drawn_than_are_made():
    """Of samples that are complete nothing more is drawn: on average some ten tries, where the slowest makes thirty."""
    drawn = []

    def uniform(which: np.ndarray, tries: range) -> np.ndarray:
        drawn.append(len(which) * len(tries))
        return uniforms(0, np.arange(1000))(which, tries)

    draw_masks(EXACT, (14, 14), 1000, uniform, lambda which: np.zeros((len(which), 196)))
    assert len(drawn) > 3
    assert sum(drawn) < 0.6 * 1000 * 8 * len(drawn)


def test_held_out_masks_are_apart_from_those_of_training():
    from beitforge.pipeline.data.pretraining import _heldout_draws

    samples = np.arange(50)
    drawn = _heldout_draws(EXACT, Model(), 3, samples)
    assert drawn.keys() == {"mask"}
    same = (drawn["mask"] == sample_draws(EXACT, Model(), 3, samples)["mask"]).all(axis=1)
    assert not same.any()
    assert np.array_equal(drawn["mask"], _heldout_draws(EXACT, Model(), 3, samples)["mask"])


def test_drop_path_keeps_as_the_model_divides():
    """keep [B, L, 2]: layer l drops a branch with probability drop_path · l / (L - 1), drawn from (seed, sample)."""
    model, samples = Model(drop_path=0.3, layers=4), np.arange(20_000)
    keep = sample_draws(EXACT, model, 1, samples)["keep"]
    assert keep.shape == (20_000, 4, 2)
    assert keep.dtype == bool
    assert keep[:, 0].all()
    assert keep.mean(axis=0) == pytest.approx(np.array([1, 0.9, 0.8, 0.7])[:, None].repeat(2, 1), abs=0.01)
    flat = keep[:, 1:].reshape(20_000, 6)
    assert np.abs(np.corrcoef(flat.T) - np.eye(6)).max() < 0.03
    again = sample_draws(EXACT, model, 1, samples[::-1][:7])["keep"]
    assert np.array_equal(again, keep[::-1][:7])
    assert "keep" not in sample_draws(EXACT, Model(drop_path=0.0), 1, samples[:2])
    assert sample_draws(EXACT, Model(drop_path=0.3, layers=1), 1, samples[:99])["keep"].all()
