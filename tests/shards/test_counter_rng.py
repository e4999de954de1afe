"""Counter-based draws: frozen for ever, equal to a plain-Python definition, uniform, and never shared."""

import numpy as np
import pytest
import xxhash

from beitforge.shards import counter_rng

WORD = 2**64 - 1
PURPOSES = range(1, 11)


def mixed(h: int) -> int:
    """MurmurHash3's fmix64 (Appleby, smhasher), in Python's integers."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = ((h ^ (h >> 33)) * factor) & WORD
    return h ^ (h >> 33)


def plain_bits(*words: int) -> int:
    """draws.bits of single words, as its docstring has it."""
    state = len(words)
    for word in words:
        state = mixed(((state ^ (word & WORD)) + 0x9E3779B97F4A7C15) & WORD)
    return mixed(state)


def test_the_mixing_function_is_murmurs():
    """fmix64 of 1, from the smhasher test vectors."""
    assert mixed(1) == 0xB456BCFC34C2CB2C
    assert int(counter_rng._mix(np.array([1], dtype=np.uint64))[0]) == 0xB456BCFC34C2CB2C


def test_golden_bits():
    """draws.bits(1, 2, np.arange(3, dtype=np.uint64)). If this changes, the order of every run ever made changes."""
    golden = [0xED81310370D7DF00, 0x5078FE677B193C1F, 0xD2C78B85A7A20D0E]
    assert counter_rng.bits(1, 2, np.arange(3, dtype=np.uint64)).tolist() == golden


def test_golden_uniform():
    """draws.uniform(draws.VIEW, 0, np.arange(3))"""
    assert counter_rng.uniform(counter_rng.VIEW, 0, np.arange(3)).tolist() == [
        0.5337986058191445,
        0.6469080952682563,
        0.7042596887890658,
    ]


def test_golden_permutation():
    """draws.permutation(8, draws.CHUNK_ORDER, 0, 1)"""
    assert counter_rng.permutation(8, counter_rng.CHUNK_ORDER, 0, 1).tolist() == [2, 6, 3, 5, 4, 7, 0, 1]


def plain_shuffle(count: int, words: tuple[int, ...], place: int) -> int:
    """draws.Shuffle(count, *words).forward of one place, in Python's integers."""
    width = max(2, (count - 1).bit_length())
    low = width // 2
    masks = (1 << low) - 1, (1 << (width - low)) - 1
    keys = [plain_bits(*words, number) for number in range(8)]
    while True:
        halves = [place & masks[0], place >> low]
        for number, key in enumerate(keys):
            changed = number % 2
            halves[changed] ^= (mixed(halves[1 - changed] ^ key) >> 20) & masks[changed]
        place = halves[0] | halves[1] << low
        if place < count:
            return place


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_a_shuffle_is_a_permutation_both_ways(count):
    shuffle, places = counter_rng.Shuffle(count, counter_rng.CHUNK_ORDER, -5, 2), np.arange(count)
    found = shuffle.forward(places)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == places.tolist()
    assert shuffle.inverse(found).tolist() == places.tolist()
    assert found[:20].tolist() == [
        plain_shuffle(count, (counter_rng.CHUNK_ORDER, -5, 2), place) for place in range(count)[:20]
    ]


def test_golden_shuffle():
    """draws.Shuffle(10**9, draws.CHUNK_ORDER, 0, 1).forward(np.arange(4)). If this changes, no run can be continued."""
    assert counter_rng.Shuffle(10**9, counter_rng.CHUNK_ORDER, 0, 1).forward(np.arange(4)).tolist() == [
        507640133,
        872119204,
        299688196,
        959061262,
    ]


@pytest.mark.parametrize("count", [5, 12, 50])
def test_shuffles_are_uniform(count):
    """Over 4000 seeds every place goes everywhere equally often, and so do the steps between neighbours: chi-square
    within six deviations of its mean."""
    seeds = 4000
    tables = np.stack([counter_rng.Shuffle(count, seed).forward(np.arange(count)) for seed in range(seeds)])
    steps = np.diff(tables, axis=1) % count
    for column in (*tables.T, *(step - 1 for step in steps.T)):
        found = np.bincount(column)
        expected = seeds / len(found)
        assert ((found - expected) ** 2 / expected).sum() < len(found) + 6 * np.sqrt(2 * len(found))


@pytest.mark.parametrize(
    ("key", "golden"),
    [("n01440764/n01440764_10026", 0xD05746204548245E), ("", 0x2D06800538D394C2), ("ключ 鍵.x", 0xEA3CD2BA00351E8B)],
)
def test_golden_hash_key(key, golden):
    """draws.hash_key(key): xxh3-64 of the key's utf-8 bytes."""
    assert counter_rng.hash_key(key) == golden == xxhash.xxh3_64_intdigest(key.encode())


def test_hash_key_of_bytes_that_are_no_utf8():
    """A file name of any bytes has a hash: that of the bytes."""
    name = b"caf\xe9.jpg"
    assert counter_rng.hash_key(name.decode("utf-8", "surrogateescape")) == xxhash.xxh3_64_intdigest(name)


def test_golden_purposes():
    """Never renumbered: the numbers are part of every draw."""
    golden = {"CHUNK_ORDER": 1, "WINDOW_ORDER": 2, "VIEW": 3, "MASK": 4, "DROP_PATH": 5, "SUBSTITUTE": 6}
    golden |= {"PACK_ORDER": 7, "SPLIT": 8, "INIT": 9, "GUMBEL": 10}
    assert {name: getattr(counter_rng, name) for name in golden} == golden


@pytest.mark.parametrize(
    "words",
    [(0,), (1, 2, 3), (-1, 5), (~0, 2**40, 7), (2**63, 2**64 - 1, 2**64 + 3), (4, -(2**63), 0, 0, 1)],
)
def test_equals_the_definition(words):
    """Negative and huge words are taken modulo 2**64."""
    assert counter_rng.bits(*words).tolist() == [plain_bits(*words)]


def test_words_of_any_integer_type_agree():
    """A seed of -3 is the same draw as a Python int, a NumPy int and an array of either sign."""
    expected = plain_bits(7, -3)
    for word in (-3, np.int64(-3), np.array([-3]), np.array([2**64 - 3], dtype=np.uint64)):
        assert counter_rng.bits(7, word).tolist() == [expected]


def test_broadcasts_like_one_by_one():
    rows, columns = np.array([0, -1, 9]), np.arange(4)
    drawn = counter_rng.bits(counter_rng.MASK, 11, rows[:, None], columns)
    assert drawn.shape == (3, 4)
    assert drawn.dtype == np.uint64
    one_by_one = [[plain_bits(counter_rng.MASK, 11, row, column) for column in range(4)] for row in (0, -1, 9)]
    assert drawn.tolist() == one_by_one


def test_arguments_are_left_alone():
    words = np.arange(4, dtype=np.uint64)
    counter_rng.bits(words, 1)
    assert words.tolist() == [0, 1, 2, 3]


def test_uniform_never_reaches_one(monkeypatch):
    """The largest and the smallest word give the ends of [0, 1)."""
    ends = np.array([0, WORD], dtype=np.uint64)
    monkeypatch.setattr(counter_rng, "bits", lambda *_: ends)
    assert counter_rng.uniform(1).tolist() == [0.0, 1 - 2**-53]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63])
@pytest.mark.parametrize("varied", [0, 1])
def test_uniform_is_uniform_over_counters(seed, varied):
    """100,000 neighbouring counters in 100 bins: chi-square of 99 degrees of freedom, outside 55-155 one time in 1e4.

    Draws are fixed, so this passes always or never.
    """
    counters = np.arange(100_000)
    words = (counters, 3) if varied == 0 else (3, counters)
    share = counter_rng.uniform(counter_rng.VIEW, seed, *words)
    assert 0 <= share.min() < 1e-4
    assert 1 - 1e-4 < share.max() < 1
    counts = np.bincount((share * 100).astype(int), minlength=100)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 55 < chi_square < 155
    neighbours = np.corrcoef(share[:-1], share[1:])[0, 1]
    assert abs(neighbours) < 0.015


def test_every_bit_is_fair_and_depends_on_every_bit():
    """Flipping any bit of any word flips half of the bits of the draw (avalanche); each bit is set half the time."""
    base = (counter_rng.MASK, 12345, 678)
    flipped = []
    for place in range(3):
        for bit in range(64):
            words = list(base)
            words[place] ^= 1 << bit
            flipped.append(plain_bits(*words) ^ plain_bits(*base))
    counts = np.array([value.bit_count() for value in flipped])
    assert counts.min() >= 12
    assert abs(counts.mean() - 32) < 1
    drawn = counter_rng.bits(counter_rng.MASK, np.arange(20_000))
    ones = [int(((drawn >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    assert max(abs(count - 10_000) for count in ones) < 300


def test_purposes_share_no_stream():
    """Under the same other words, no draw of one purpose occurs in another, and none is correlated with another."""
    streams = [counter_rng.bits(purpose, 0, np.arange(20_000), 0) for purpose in PURPOSES]
    assert len(np.unique(np.concatenate(streams))) == 20_000 * len(PURPOSES)
    correlation = np.corrcoef([(stream >> np.uint64(11)).astype(float) for stream in streams])
    assert np.abs(correlation - np.eye(len(streams))).max() < 0.04


def test_draws_of_different_lengths_share_no_stream():
    """The length is mixed into the first word only, and 4 ^ CHUNK_ORDER is 6 ^ VIEW: the draws part all the same."""
    counters = np.arange(20_000)
    short = counter_rng.bits(counter_rng.CHUNK_ORDER, 0, 3, counters)
    long = [counter_rng.bits(counter_rng.VIEW, 0, 3, counters, what, 0) for what in range(3)]
    assert len(np.unique(np.concatenate([short, *long]))) == 80_000
    correlation = np.corrcoef([(stream >> np.uint64(11)).astype(float) for stream in (short, *long)])
    assert np.abs(correlation - np.eye(4)).max() < 0.04


def test_the_number_of_words_counts():
    """Words are not merely run together: (a) (a, 0) and (a, 0, 0) are different draws, as are (a, b) and (b, a)."""
    drawn = [plain_bits(*words) for words in ((1,), (1, 0), (1, 0, 0), (0, 1), (1, 2), (2, 1))]
    assert [int(counter_rng.bits(*words)[0]) for words in ((1,), (1, 0), (1, 0, 0), (0, 1), (1, 2), (2, 1))] == drawn
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_is_one(count):
    order = counter_rng.permutation(count, counter_rng.WINDOW_ORDER, 5)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_permutations_are_all_equally_likely():
    """All 24 orders of 4 over 24,000 seeds: chi-square of 23 degrees of freedom below 60."""
    weights = np.array([64, 16, 4, 1])
    codes = [int(counter_rng.permutation(4, counter_rng.WINDOW_ORDER, seed) @ weights) for seed in range(24_000)]
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 60


def test_no_random_state_is_read_or_written():
    """NumPy's own generator neither matters nor moves."""
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr, call-overload]
    first = counter_rng.bits(1, 2).tolist()
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr, call-overload]
    np.random.seed(2)
    assert counter_rng.bits(1, 2).tolist() == first
