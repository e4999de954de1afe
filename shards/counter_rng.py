"""Counter-based draws: every random number of the project is a hash of the integers that name it.

There is no generator state to seed, save or restore, and nothing here depends on NumPy's distribution methods, whose
streams may change between releases. A draw is named by a purpose (below), a seed, and whatever counts: epoch, sample,
view. The mixing function is the 64-bit finaliser of MurmurHash3 (Appleby, public domain), applied once per word.
"""

import numpy as np
import xxhash

Words = int | np.ndarray

# What a draw is for. Two purposes never share a stream, whatever their other words are. Never renumber: the order of
# every run ever made depends on these.
CHUNK_ORDER, WINDOW_ORDER, VIEW, MASK, DROP_PATH, SUBSTITUTE, PACK_ORDER, SPLIT, INIT, GUMBEL = range(1, 11)
TIMELINE = 11  # of `plan`
AUGMENT, ERASE, MIX, LABEL_SHARE, DROPOUT = range(12, 17)  # of fine-tuning

_INCREMENT = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF
_FACTORS = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_HALF = np.uint64(33)
_ROUNDS = 8


def _mix_int(word: int) -> int:
    word = ((word ^ (word >> 33)) * _FACTORS[0]) & _WORD
    word = ((word ^ (word >> 33)) * _FACTORS[1]) & _WORD
    return word ^ (word >> 33)


def _mix(words: np.ndarray) -> np.ndarray:
    """The mixing function, in place."""
    for factor in _FACTORS:
        words ^= words >> _HALF
        words *= np.uint64(factor)
    words ^= words >> _HALF
    return words


def bits(*words: Words) -> np.ndarray:
    """64 random bits for each element of the broadcast words; uint64, at least one-dimensional.

    What the leading words have in common is hashed once: name arrays last.
    """
    plain = next((i for i, word in enumerate(words) if isinstance(word, np.ndarray)), len(words))
    start = len(words)
    for word in words[:plain]:
        start = _mix_int(((start ^ (int(word) & _WORD)) + _INCREMENT) & _WORD)
    state = np.array([start], dtype=np.uint64)
    for each in words[plain:]:
        state = state ^ (each.astype(np.uint64, copy=False) if isinstance(each, np.ndarray) else _as_word(each))
        state += np.uint64(_INCREMENT)
        _mix(state)
    return _mix(state)


def _as_word(value: int) -> np.uint64:
    return np.uint64(int(value) & _WORD)


def uniform(*words: Words) -> np.ndarray:
    """float64 in [0, 1): the upper 53 bits."""
    drawn = bits(*words)
    drawn >>= np.uint64(11)
    found = drawn.astype(np.float64)
    found *= 2.0**-53
    return found


def permutation(count: int, *words: Words) -> np.ndarray:
    """A permutation of 0 … count - 1 (int64): the positions sorted by their bits."""
    positions = np.arange(count, dtype=np.uint64)
    drawn, low = bits(*words, positions), np.uint64((1 << count.bit_length()) - 1)
    together = np.sort((drawn & ~low) | positions)  # numbers sort in half the time that places take
    if (np.diff(together & ~low) > 0).all():
        return (together & low).astype(np.int64)
    return np.argsort(drawn, kind="stable")


def hash_key(key: str) -> int:
    """The 64-bit name of a sample's key (xxh3), as the indexes and token shards store it."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))


class Shuffle:
    """A permutation of 0 … count - 1 that is computed place by place, both ways, and keeps no table.

    A Feistel network (Luby and Rackoff 1988) over the next power of two, of unequal halves where need be. What
    lands at or beyond count goes through it again until it lands below (cycle walking, Black and Rogaway 2002): less
    than two turns on average.
    """

    def __init__(self, count: int, *words: Words):
        self.count = count
        width = max(2, (count - 1).bit_length())
        self._low = width // 2
        self._masks = (1 << self._low) - 1, (1 << (width - self._low)) - 1
        self._keys = bits(*words, np.arange(_ROUNDS, dtype=np.uint64))

    def forward(self, places: np.ndarray) -> np.ndarray:
        """Where each of `places` (i64 [n], in 0 … count - 1) goes; i64 [n]."""
        return self._walk(places, range(_ROUNDS))

    def inverse(self, places: np.ndarray) -> np.ndarray:
        """What came to each of `places`: inverse(forward(x)) is x."""
        return self._walk(places, range(_ROUNDS - 1, -1, -1))

    def _walk(self, places: np.ndarray, rounds: range) -> np.ndarray:
        found = self._once(places.astype(np.uint64), rounds)
        while (outside := np.flatnonzero(found >= self.count)).size:
            found[outside] = self._once(found[outside], rounds)
        return found.astype(np.int64)

    def _once(self, values: np.ndarray, rounds: range) -> np.ndarray:
        shift = np.uint64(self._low)
        halves = [values & np.uint64(self._masks[0]), values >> shift]
        for number in rounds:
            changed = number % 2
            mixed = _mix(halves[1 - changed] ^ self._keys[number]) >> np.uint64(20)
            halves[changed] = halves[changed] ^ (mixed & np.uint64(self._masks[changed]))
        return halves[0] | (halves[1] << shift)
