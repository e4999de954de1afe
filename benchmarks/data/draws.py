"""What do masks and drop path cost, by the micro batch?"""

import functools
import statistics
import time

import numpy as np

from beitforge.pipeline.config.settings import Mask, Model
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.shards.format.levels import without_tones
from beitforge.shards.format.views import ViewPolicy, draw_views
from beitforge.shards.stream.batch_plan import BatchPlan, Draw, plan
from beitforge.shards.stream.order import Order, OrderPolicy, RankBatches
from benchmarks.data.masks import SEED, published_mask
from benchmarks.results import write

SAMPLES, WORLD, WORKERS, TURNS, LOOPED = 4096, 8, 8, 5, 500
MICRO = 4, 16, 64, 256
NOTE = (
    f"A worker of {WORKERS} draws for a thousand samples of its next batches at once. Masks of 75 of 196 patches, "
    "completed, and 24 branches; their bits are those of draws for single samples. The generator of the released code "
    "in Python, given its random numbers, not counted. Views are drawn by fine-tuning, tokenizer training and "
    "with online tokens; recorded ones are read."
)
OURS = "masks and drop path, µs a sample"
DRAW = functools.partial(sample_draws, Mask(), Model(drop_path=0.1), SEED)


def main() -> None:
    """CPU µs a sample, as a worker draws for its batches, and where it draws for each batch by itself."""
    check()
    order = Order([1000] * 1281, OrderPolicy())
    rows: list[dict] = []
    released = looped()
    for micro in MICRO:
        numbers = RankBatches(0, micro * WORLD, micro, 3, WORLD, WORKERS * SAMPLES // micro)
        turns: list[tuple[float, ...]] = []
        for _ in range(TURNS):
            drawn, located = (planned(order, draw, numbers) for draw in (DRAW, None))
            turns.append((drawn - located, located, alone(numbers)))
        ahead, located, each = (statistics.median(column) for column in zip(*turns, strict=True))
        rows.append(
            {
                "micro batch": micro,
                OURS: ahead,
                "drawn for each batch alone": each,
                "the released generator, masks alone": released,
                "places in the order, µs a sample": located,
                "a view drawn afresh": statistics.median(view(micro) for _ in range(TURNS)),
            }
        )
    ratios = {"a sample at a micro batch of 4 against 256": rows[0][OURS] / rows[-1][OURS]}
    write("draws", "what do masks and drop path cost, by the micro batch?", rows, ratios, [NOTE])


def planned(order: Order, draw: Draw | None, numbers: RankBatches) -> float:
    """µs a sample of the batches of one worker."""
    batches = BatchPlan(order, draw, numbers, WORKERS)
    started = time.process_time()
    for number in range(0, len(numbers), WORKERS):
        batches[number]
    return 1e6 * (time.process_time() - started) / SAMPLES


def alone(numbers: RankBatches) -> float:
    """µs a sample where every batch is drawn by itself; a quarter of the batches."""
    batches = [numbers[number] for number in range(0, len(numbers), 4 * WORKERS)]
    started = time.process_time()
    for samples in batches:
        DRAW(samples)
    return 1e6 * (time.process_time() - started) / sum(map(len, batches))


def view(micro: int) -> float:
    """µs a sample of the views of batches, drawn batch by batch: they take what the index says of each image."""
    keys, sides = np.arange(micro, dtype=np.uint64), np.full(micro, 500)
    greys = without_tones(np.full(micro, 100, np.float32))
    started = time.process_time()
    for number in range(1024 // micro):
        draw_views(ViewPolicy(), keys, number, sides, sides, greys)
    return 1e6 * (time.process_time() - started) / 1024


def looped() -> float:
    """µs a sample of BEiT's MaskingGenerator as released."""
    numbers = np.random.default_rng(0).random((LOOPED, 200, 4)).tolist()
    started = time.process_time()
    for each in numbers:
        published_mask(Mask(exact=False), iter(each))
    return 1e6 * (time.process_time() - started) / LOOPED


def check() -> None:
    """The same draws for single samples, or no numbers."""
    numbers = RankBatches(0, 64, 8, 1, 2, 4)
    batches = [numbers[number] for number in range(len(numbers))]
    for batch, samples in zip(plan(Order([1000], OrderPolicy()), DRAW, batches), batches, strict=True):
        for i, sample in enumerate(samples):
            for name, value in DRAW(np.array([sample])).items():
                assert np.array_equal(value[0], batch.draws[name][i]), f"sample {sample}: {name} differs"


if __name__ == "__main__":
    main()
