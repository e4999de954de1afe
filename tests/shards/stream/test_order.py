"""The order: every sample once an epoch, arithmetic alone, the same for any shape of the run, and well mixed."""

import dataclasses
import math
import pickle
import tracemalloc

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from beitforge.shards import counter_rng
from beitforge.shards.errors import ShardError
from beitforge.shards.stream.order import Chunks, Order, OrderPolicy, RankBatches, rank_batches

SMALL = OrderPolicy(seed=3, chunk=8, window=2, lanes=4)
SHARDS = [100, 3, 0, 57]  # uneven, one of them empty


def plain_order(shard_samples: list[int], policy: OrderPolicy, epoch: int) -> list[tuple[int, int]]:
    """Shard and row of every position of an epoch, as docs/formats.md, "The order of samples", says it, in lists."""
    chunks = [
        [(shard, row) for row in range(start, min(start + policy.chunk, samples))]
        for shard, samples in enumerate(shard_samples)
        for start in range(0, samples, policy.chunk)
    ]
    shuffle = counter_rng.Shuffle(len(chunks), counter_rng.CHUNK_ORDER, policy.seed, epoch)
    order = shuffle.forward(np.arange(len(chunks))).tolist()
    sequence = [place for chunk in order for place in chunks[chunk]]
    lanes, end = [], 0
    for lane in range(policy.lanes):
        start, end = end, end + len(range(lane, len(sequence), policy.lanes))
        cut, size = sequence[start:end], policy.chunk * policy.window
        windows = [cut[first : first + size] for first in range(0, len(cut), size)]
        permuted = [
            [
                window[i]
                for i in counter_rng.permutation(
                    len(window), counter_rng.WINDOW_ORDER, policy.seed, epoch, lane, number
                )
            ]
            for number, window in enumerate(windows)
        ]
        lanes.append([place for window in permuted for place in window])
    return [lanes[p % policy.lanes][p // policy.lanes] for p in range(len(sequence))]


def places(order: Order, samples: np.ndarray) -> list[tuple[int, int]]:
    _, shards, rows = order.locate(samples)
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def everything(shard_samples: list[int]) -> set[tuple[int, int]]:
    return {(shard, row) for shard, samples in enumerate(shard_samples) for row in range(samples)}


def test_golden_positions():
    """Order([100, 3, 0, 57], OrderPolicy(seed=3, chunk=8, window=2, lanes=4)).locate(np.arange(155, 165)): the last
    five positions of epoch 0 and the first five of epoch 1. If this changes, no run can be continued."""
    epochs, shards, rows = Order(SHARDS, SMALL).locate(np.arange(155, 165))
    assert epochs.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert shards.tolist() == [0, 0, 0, 3, 0, 0, 3, 0, 0, 0]
    assert rows.tolist() == [34, 70, 91, 32, 33, 67, 19, 87, 92, 68]


def test_golden_defaults():
    """OrderPolicy() is what a config without a word about the loader runs with."""
    assert OrderPolicy() == OrderPolicy(seed=0, chunk=64, window=16, lanes=256)


@pytest.mark.parametrize(
    ("shard_samples", "policy"),
    [
        (SHARDS, SMALL),
        (SHARDS, OrderPolicy(chunk=1, window=5, lanes=3)),
        ([7], OrderPolicy()),
        ([1], OrderPolicy(lanes=1)),
        ([300, 1, 2, 299, 64], OrderPolicy(seed=-1, chunk=16, window=1, lanes=7)),
        ([1000, 1, 999], OrderPolicy(seed=2**64 - 1)),
    ],
)
def test_equals_the_plain_definition(shard_samples, policy):
    order, total = Order(shard_samples, policy), sum(shard_samples)
    for epoch in (0, 1, 5):
        expected = plain_order(shard_samples, policy, epoch)
        assert places(order, np.arange(epoch * total, (epoch + 1) * total)) == expected


@pytest.mark.parametrize("multiple", [2, 7, 32, 160])
def test_an_epoch_may_leave_out_its_last_samples(multiple):
    """Every epoch is its whole order up to the last multiple, and the next begins right behind: what is left out is
    another rest in each."""
    policy = dataclasses.replace(SMALL, multiple=multiple)
    order, taken = Order(SHARDS, policy), 160 // multiple * multiple
    assert order.samples == taken
    left_out = []
    for epoch in range(4):
        found = order.locate(np.arange(epoch * taken, (epoch + 1) * taken))
        whole = plain_order(SHARDS, SMALL, epoch)
        assert found[0].tolist() == [epoch] * taken
        assert list(zip(found[1].tolist(), found[2].tolist(), strict=True)) == whole[:taken]
        left_out.append(whole[taken:])
    assert multiple != 7 or len(set(map(tuple, left_out))) == 4
    assert places(pickle.loads(pickle.dumps(order)), np.arange(5)) == plain_order(SHARDS, SMALL, 0)[:5]


def test_a_set_of_less_than_a_batch_leaves_nothing():
    with pytest.raises(ShardError, match=r"holds 160 samples, fewer than the 161 of one global batch.*drop_last"):
        Order(SHARDS, OrderPolicy(multiple=161))


@pytest.mark.parametrize("total", [1, 2, 7, 255, 256, 257, 1023, 10_000])
@pytest.mark.parametrize("policy", [OrderPolicy(), OrderPolicy(chunk=1), OrderPolicy(chunk=7, window=3, lanes=10)])
def test_each_sample_once_an_epoch(total, policy):
    """Any size, of uneven shards: a large, a tiny, an empty, the rest."""
    shard_samples = [total // 2, min(1, total - total // 2), 0, max(0, total - total // 2 - 1)]
    order = Order(shard_samples, policy)
    assert order.samples == total
    for epoch in (0, 3):
        found = places(order, np.arange(epoch * total, (epoch + 1) * total))
        assert len(found) == total
        assert set(found) == everything(shard_samples)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shard_samples=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any),
    chunk=st.integers(1, 70),
    window=st.integers(1, 5),
    lanes=st.integers(1, 70),
    seed=st.integers(-(2**63), 2**64),
)
def test_each_sample_once_whatever_the_policy(shard_samples, chunk, window, lanes, seed):
    order = Order(shard_samples, OrderPolicy(seed=seed, chunk=chunk, window=window, lanes=lanes))
    found = places(order, np.arange(order.samples, 2 * order.samples))
    assert sorted(found) == sorted(everything(shard_samples))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_selection_gives_the_same_as_the_whole(data):
    """Slices, permutations and repetitions, over three epochs, on an order that has located other things before."""
    order, whole = Order(SHARDS, SMALL), Order(SHARDS, SMALL).locate(np.arange(480))
    asked = np.array(data.draw(st.lists(st.integers(0, 479), min_size=1, max_size=50)))
    order.locate(asked[::-1] + 1000)
    for found, expected in zip(order.locate(asked), whole, strict=True):
        assert found.tolist() == expected[asked].tolist()


def test_more_windows_than_the_caches_hold():
    order = Order([400] * 20 + [17], OrderPolicy(chunk=2, window=2, lanes=64))
    whole = order.locate(np.arange(order.samples))
    asked = counter_rng.permutation(order.samples, 77)[:400]
    for found, expected in zip(order.locate(asked), whole, strict=True):
        assert found.tolist() == expected[asked].tolist()


def test_crosses_the_end_of_an_epoch():
    """Positions run on: a slice over the border is the end of one epoch and the beginning of the next."""
    order = Order(SHARDS, SMALL)
    epochs, _, _ = order.locate(np.arange(150, 170))
    assert epochs.tolist() == [0] * 10 + [1] * 10
    assert places(order, np.arange(150, 170)) == (
        plain_order(SHARDS, SMALL, 0)[150:] + plain_order(SHARDS, SMALL, 1)[:10]
    )


def test_no_state_at_ten_billion():
    """Resume costs the same anywhere: sample ten billion is located from its number alone."""
    order = Order(SHARDS, SMALL)
    epochs, shards, rows = order.locate(np.array([10**10 + 3]))
    assert epochs.tolist() == [10**10 // 160]
    assert (int(shards[0]), int(rows[0])) == plain_order(SHARDS, SMALL, 10**10 // 160)[3]


def test_epochs_and_seeds_differ():
    """Of 10,000 positions, two orders agree at about one."""
    first = Order([2500] * 4, OrderPolicy())
    other = Order([2500] * 4, OrderPolicy(seed=1))
    same = np.arange(10_000)
    orders = [places(first, same), places(first, same + 10_000), places(other, same)]
    for a in range(3):
        for b in range(a):
            assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 20


def test_chunk_of_one_is_a_perfect_permutation():
    """Rows that stood together lie as far apart as chance has it: a third of the epoch on average."""
    order = Order([1000], OrderPolicy(chunk=1))
    _, _, rows = order.locate(np.arange(1000))
    position = np.argsort(rows)
    assert np.abs(np.diff(position)).mean() == pytest.approx(1000 / 3, rel=0.1)


def same_shard_ratio(policy: OrderPolicy) -> float:
    """Pairs of a batch from the same shard, against a perfect permutation; 128 shards of 640 samples, batch 512."""
    shards, each, batch = 128, 640, 512
    order = Order([each] * shards, policy)
    _, shard, _ = order.locate(np.arange(order.samples))
    counts = np.stack([np.bincount(numbers, minlength=shards) for numbers in shard.reshape(-1, batch)])
    pairs = (counts * (counts - 1) // 2).sum(axis=1).mean()
    return float(pairs / (batch * (batch - 1) / 2 * (each - 1) / (order.samples - 1)))


@pytest.mark.parametrize("seed", [0, 1])
def test_class_sorted_data_is_well_mixed(seed):
    """docs/formats.md: 1.2 × a perfect permutation on 1280 shards; the lanes do it: one lane alone is far worse."""
    assert 0.7 < same_shard_ratio(OrderPolicy(seed=seed)) < 1.6
    assert same_shard_ratio(OrderPolicy(seed=seed, chunk=1)) == pytest.approx(1, abs=0.05)
    assert same_shard_ratio(OrderPolicy(seed=seed, lanes=1)) > 5


def test_pickling_keeps_the_function():
    """A worker process gets the order without its caches, and it goes on being the same function."""
    order = Order(SHARDS, SMALL)
    fresh = len(pickle.dumps(order))
    expected = places(order, np.arange(320))
    data = pickle.dumps(order)
    assert len(data) == fresh
    assert places(pickle.loads(data), np.arange(320)) == expected


@pytest.mark.parametrize("shard_samples", [[], [0], [0, 0]])
def test_an_empty_set_is_refused(shard_samples):
    with pytest.raises(ShardError, match="no samples"):
        Order(shard_samples, OrderPolicy())


@pytest.mark.parametrize(
    ("shard_samples", "policy", "world"),
    [
        (SHARDS, SMALL, 1),
        (SHARDS, SMALL, 2),
        (SHARDS, SMALL, 3),
        ([101, 3, 0, 57], SMALL, 4),
        ([101, 3, 0, 57], SMALL, 2),
        ([7], OrderPolicy(), 4),
        ([1000, 1, 999, 64], OrderPolicy(chunk=16, window=4, lanes=8), 4),
        ([1000, 1, 999, 64], OrderPolicy(chunk=16, window=4, lanes=8), 16),
        ([1000, 1, 999, 64], OrderPolicy(chunk=16, window=4, lanes=8), 12),
        (SHARDS, dataclasses.replace(SMALL, multiple=32), 2),
        (SHARDS, dataclasses.replace(SMALL, multiple=12), 3),
        ([1000, 1, 999, 64], OrderPolicy(chunk=16, window=4, lanes=8, multiple=600), 4),
    ],
)
def test_ahead_names_every_chunk_before_its_samples(shard_samples, policy, world):
    """What a rank is told to fetch, window by window, is what its samples of that window lie in; where it shares lanes
    with few others of its class, no more than what theirs do."""
    classes = math.gcd(policy.lanes, world)
    order = Order(shard_samples, policy)
    total, shortened = order.samples, order.samples < sum(shard_samples)
    size = policy.chunk * policy.window * policy.lanes
    for rank in range(world):
        first = total // 3
        told = order.ahead(first, rank, world)
        begin, chunks = next(told)
        samples = np.arange(begin, 4 * total)
        sparse = 6 * world > policy.chunk * classes
        of = world if sparse else classes
        samples = samples[samples % of == rank % of]  # as RankBatches has it
        while begin < 3 * total:
            then, following = next(told)
            here = samples[(samples >= begin) & (samples < then)]
            _, shards, rows = order.locate(here)
            read = set(zip(shards.tolist(), (rows // policy.chunk).tolist(), strict=True))
            named = set(zip(chunks.shards.tolist(), chunks.numbers.tolist(), strict=True))
            assert named == read or (shortened and named > read)  # of a window that an epoch does not take whole
            assert begin <= first or begin % total % size == 0
            begin, chunks = then, following


def chunks_of(order: Order, shards: np.ndarray, numbers: np.ndarray) -> set[int]:
    return set((shards * 10**6 + numbers).tolist())


def fetched_and_read(order: Order, sample: int, rank: int, world: int, windows: int) -> tuple[int, int]:
    """Chunks that a rank is told to fetch and chunks that its samples lie in, over some windows from a sample on; what
    the window before had, too, is there. Refuses an order that does not name what is read."""
    told = order.ahead(sample, rank, world)
    fetched = read = 0
    named_before: set[int] = set()
    read_before: set[int] = set()
    begin, chunks = next(told)
    for _ in range(windows):
        then, following = next(told)
        mine = np.arange(begin + (rank - begin) % world, then, world)
        _, shards, rows = order.locate(mine)
        needed, named = chunks_of(order, shards, rows // order.policy.chunk), chunks_of(order, *chunks)
        assert needed <= named
        fetched, read = fetched + len(named - named_before), read + len(needed - read_before)
        begin, chunks, named_before, read_before = then, following, named, needed
    return fetched, read


@pytest.mark.parametrize("lanes", [1, 48, 96, 250, 256, 384])
def test_what_is_fetched_is_what_is_read(lanes):
    """By any number of ranks, of lanes and of epochs: at most a tenth more."""
    order = Order([997] * 20 + [5] * 9, OrderPolicy(chunk=16, window=4, lanes=lanes))
    for world in (1, 3, 8, 24, 40, 48, 96, 127, 250, 257, 384, 512, 1000, 4096, 8191):
        for epoch in (0, 6):
            ranks = sorted({0, 1, 2 * world // 3, world - 1}) if world > 8 else [world // 2]
            counts = [fetched_and_read(order, epoch * order.samples, rank, world, 2) for rank in ranks]
            fetched, read = np.sum(counts, axis=0).tolist()
            assert read <= fetched <= 1.1 * read, (world, epoch)
            assert read or lanes == 1, "of so short a window not every rank reads"


@pytest.mark.parametrize("world", [8, 24, 48, 96, 384, 512, 4096])
def test_what_is_fetched_is_what_is_read_by_default(world):
    """With ImageNet-1k's shards and the settings that a config without a word has."""
    order = Order([1000] * 1281, OrderPolicy())
    for sample in (0, 3 * order.samples + 2 * 64 * 16 * 256):
        fetched, read = fetched_and_read(order, sample, world // 2, world, 1)
        assert 0 < read <= fetched <= 1.1 * read


@pytest.mark.parametrize(
    ("lanes", "golden"), [(256, "96e2a0b80bf2b707"), (384, "45730a53d0238bdc"), (96, "ef79bc39a4341ed8")]
)
def test_golden_samples_of_ranks(lanes, golden):
    """xxh3 of epoch, shard and row (i64) of 20 steps' micro batches of four of 96 ranks, over the end of an epoch."""
    order = Order([1000 + i % 7 for i in range(300)], OrderPolicy(seed=5, lanes=lanes, multiple=96))
    found = xxhash.xxh3_64()
    for rank in range(0, 96, 31):
        batches = rank_batches(
            first_sample=3 * order.samples - 9600, global_batch=960, micro_batch=5, rank=rank, world=96, steps=20
        )
        for batch in batches:
            for column in order.locate(batch):
                found.update(column.astype("<i8").tobytes())
    assert found.hexdigest() == golden


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    ("shard_samples", "multiple"),
    [(SHARDS, 1), ([101, 3, 0, 57], 1), (SHARDS, 64), ([13], 1), ([9, 2], 1), ([70], 1), ([60, 75], 1), ([75], 8)],
    ids=["divides", "shifts", "ends", "lanes of 3", "lanes of 2", "short ends", "shorter ends", "cut ends"],
)
def test_next_use_is_the_next_window_that_reads_a_chunk(shard_samples, multiple, world):
    """Against the windows themselves, from many places of three epochs; ranks read as RankBatches has it."""
    order = Order(shard_samples, dataclasses.replace(SMALL, multiple=multiple))
    total = order.samples
    size = SMALL.chunk * SMALL.window * SMALL.lanes
    samples = np.arange(5 * total)
    _, shards, rows = order.locate(samples)
    starts = samples // total * total + samples % total // size * size
    ends = np.minimum(starts + size, (samples // total + 1) * total)
    every = sorted({(shard, row // SMALL.chunk) for shard, row in everything(shard_samples)})
    chunks = Chunks(*(np.array(column) for column in zip(*every, strict=True)))
    for now in range(0, 3 * total, 29):
        for rank in range(world):
            found = order.next_use(chunks, now, range(rank, rank + 1), world)
            mine = (samples - rank) % math.gcd(SMALL.lanes, world) == 0
            for (shard, number), use in zip(every, found.tolist(), strict=True):
                reads = mine & (shards == shard) & (rows // SMALL.chunk == number) & (ends > now)
                reads &= samples < (now // total + 2) * total
                assert use == (max(now, int(starts[reads].min())) if reads.any() else 2**62)


def test_the_next_use_asks_an_epoch_once():
    """A chunk that this epoch uses is not looked for in the next one."""
    order, asked = Order([1000] * 40, OrderPolicy(chunk=8, window=2, lanes=4)), []
    uses = order._uses
    order._uses = lambda epoch, chunks: asked.append((epoch, len(chunks))) or uses(epoch, chunks)  # type: ignore
    every = Chunks(*(column.ravel() for column in np.indices((40, 125))))
    order.next_use(every, 3 * order.samples, range(0, 4), 4)
    assert asked == [(3, 5000)]
    asked.clear()
    order.next_use(every, 3 * order.samples + order.samples // 2, range(0, 4), 4)
    assert asked[0] == (3, 5000) and asked[1][0] == 4 and 2000 < asked[1][1] < 3000


def test_a_billion_samples_need_little_memory():
    """100,000 shards: what an order holds does not grow with the samples but with the shards, and a place far away is
    found from there."""
    tracemalloc.start()
    try:
        order = Order([10_000] * 100_000, OrderPolicy())
        epochs, shards, rows = order.locate(np.arange(7 * 10**9, 7 * 10**9 + 64))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 64 * 2**20
    assert set(epochs.tolist()) == {7}
    assert len(set(shards.tolist())) > 60
    assert rows.max() < 10_000


SHAPES = [(1, 24), (1, 4), (2, 12), (2, 3), (3, 8), (4, 2), (8, 1), (24, 1)]


@pytest.mark.parametrize(("world", "micro"), SHAPES)
def test_ranks_and_micro_batches_make_the_same_steps(world, micro):
    """The union over ranks and micro batches of step t is samples first + t · 24 …, each once; rank r reads ≡ r."""
    first, steps = 48, 5
    ranks = [
        rank_batches(first_sample=first, global_batch=24, micro_batch=micro, rank=rank, world=world, steps=steps)
        for rank in range(world)
    ]
    accumulation = 24 // (micro * world)
    for rank, batches in enumerate(ranks):
        assert len(batches) == steps * accumulation
        assert all(batch.shape == (micro,) and batch.dtype == np.int64 for batch in batches)
        assert {int(sample) % world for batch in batches for sample in batch} == {rank}
    for step in range(steps):
        turns = range(step * accumulation, (step + 1) * accumulation)
        seen = sorted(int(sample) for batches in ranks for turn in turns for sample in batches[turn])
        assert seen == list(range(first + step * 24, first + (step + 1) * 24))


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 4), (2, 12), (2, 6), (3, 8), (4, 2), (6, 4), (12, 2)])
def test_pairs_are_the_same_on_any_number_of_ranks(world, micro):
    """Sample and partner lie half a global batch apart, in one micro batch of one rank, as far from its two ends."""
    first, steps = 48, 5
    seen = []
    for rank in range(world):
        batches = rank_batches(
            first_sample=first,
            global_batch=24,
            micro_batch=micro,
            rank=rank,
            world=world,
            steps=steps,
            paired=True,
        )
        for number, batch in enumerate(batches):
            assert batch.shape == (micro,) and batch.dtype == np.int64 and batch[0] == batch.min()
            assert {int(sample) % world for sample in batch} == {rank}
            partners = batch[::-1][: micro // 2]
            assert (partners - batch[: micro // 2] == 12).all()
            step = number // (24 // (micro * world))
            assert ((batch - first) // 24 == step).all()
            seen += batch.tolist()
    assert sorted(seen) == list(range(first, first + steps * 24))
    with pytest.raises(ShardError, match="micro batch of 3 does not divide into pairs"):
        rank_batches(first_sample=0, global_batch=24, micro_batch=3, rank=0, world=1, steps=1, paired=True)


def test_a_ranks_lanes_are_its_own():
    """With lanes a multiple of the world a rank reads its own lanes only, whatever the step of an epoch."""
    for rank in range(4):
        batches = RankBatches(0, 64, 8, rank, 4, 10)
        assert {int(sample) % 8 for batch in batches for sample in batch} == {rank, rank + 4}


def test_rank_batches_end():
    batches = RankBatches(0, 8, 4, 0, 1, 3)
    assert len(list(batches)) == len(batches) == 6
    for number in (-1, 6):
        with pytest.raises(IndexError):
            batches[number]


@pytest.mark.parametrize(("world", "micro"), [(5, 1), (2, 5), (7, 3), (1, 48)])
def test_a_batch_that_does_not_divide_is_refused(world, micro):
    with pytest.raises(ShardError, match=f"global batch of 24 .* micro batches of {micro} on {world} ranks"):
        rank_batches(first_sample=0, global_batch=24, micro_batch=micro, rank=0, world=world, steps=1)
