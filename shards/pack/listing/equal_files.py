"""Which files of a folder hold the same bytes, without reading all of each."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards.pack.listing.short_reads import look_into

SAMPLE = 4096  # bytes from the middle of a file, where no header and no trailer is
_BLOCK = 1 << 20


def first_equals(folder: Path, paths: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """i64 [n]: for each path the number of the first one with the same bytes, its own where there is none before.

    Only files of equal sizes are opened; of those 4 KiB from the middle are read, and files that agree in these are
    read whole. In a set without copies that is one short read a file. A file that cannot be read is like no other.
    """
    groups = np.where(sizes > 0, np.unique(sizes, return_inverse=True)[1], -1 - np.arange(len(paths)))
    for what, digest in (("samples", _sample), ("bytes", _whole)):
        candidates = np.flatnonzero(_shared(groups))
        if what == "bytes":
            candidates = candidates[sizes[candidates] > SAMPLE]  # of the others the sample was all
        if len(candidates):
            digests = np.zeros(len(paths), dtype=np.uint64)
            names = [paths[i] for i in candidates.tolist()]
            digests[candidates] = list(look_into(folder, names, digest, _of_itself, f"equal files, by their {what}"))
            groups = _refined(groups, digests)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.append(True, groups[order][1:] != groups[order][:-1])[: len(order)])
    first = np.empty(len(paths), dtype=np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    return first


def _shared(groups: np.ndarray) -> np.ndarray:
    """bool [n]: whether another has the same number."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _refined(groups: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Numbers that agree where both do."""
    order = np.lexsort((digests, groups))
    groups, digests = groups[order], digests[order]
    differs = np.append(False, (groups[1:] != groups[:-1]) | (digests[1:] != digests[:-1]))
    refined = np.empty(len(order), dtype=np.int64)
    refined[order] = np.cumsum(differs)
    return refined


def _of_itself(path: str) -> int:
    """In place of a digest: equal to that of no other file."""
    return xxhash.xxh3_64_intdigest(path.encode("utf-8", "surrogateescape"))


def _sample(descriptor: int) -> int:
    middle = max(0, os.fstat(descriptor).st_size - SAMPLE) // 2
    return xxhash.xxh3_64_intdigest(os.pread(descriptor, SAMPLE, middle))


def _whole(descriptor: int) -> int:
    state = xxhash.xxh3_64()
    while block := os.read(descriptor, _BLOCK):
        state.update(block)
    return state.intdigest()
