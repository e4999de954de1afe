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

_INCREMENT = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def _as_words(value: Words) -> np.ndarray:
    if isinstance(value, (int, np.integer)):
        return np.array([int(value) & _WORD], dtype=np.uint64)
    return value.astype(np.uint64, copy=False)


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return words ^ (words >> np.uint64(33))


def bits(*words: Words) -> np.ndarray:
    """64 random bits for each element of the broadcast words; uint64, at least one-dimensional."""
    state = np.array([len(words)], dtype=np.uint64)
    for word in words:
        state = _mix((state ^ _as_words(word)) + np.uint64(_INCREMENT))
    return _mix(state)


def uniform(*words: Words) -> np.ndarray:
    """float64 in [0, 1): the upper 53 bits."""
    return (bits(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *words: Words) -> np.ndarray:
    """A permutation of 0 … count - 1 (int64): the positions sorted by their bits."""
    return np.argsort(bits(*words, np.arange(count, dtype=np.uint64)), kind="stable")


def hash_key(key: str) -> int:
    """The 64-bit name of a sample's key (xxh3), as the indexes and token shards store it."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))
