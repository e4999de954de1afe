"""Millions of short texts without an object for each."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

_STEP, _BYTES = 1 << 14, 1 << 20  # texts, and bytes, that are looked at in one go


class Texts(Sequence[str]):
    """n texts, made when they are asked for. `blob` holds them in UTF-8, undecodable bytes as they are, a NUL behind
    each; `ends` i64 [n] has where those stand."""

    def __init__(self, blob: bytes | bytearray):
        self.blob = blob
        self.ends = np.concatenate([_ends(blob, at) for at in range(0, len(blob), _BYTES)] or [np.zeros(0, np.int64)])

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"text {place} of {len(self)}")
        place %= len(self)
        start = int(self.ends[place - 1]) + 1 if place else 0
        return self.blob[start : int(self.ends[place])].decode("utf-8", "surrogateescape")

    def longest(self) -> int:
        """Bytes of the longest."""
        return int(np.diff(self.ends, prepend=-1).max(initial=1)) - 1

    def parts(self) -> Iterator[tuple[int, bytes]]:
        """The blob in parts of whole texts, each with the number of its first."""
        for first in range(0, len(self), _STEP):
            start = int(self.ends[first - 1]) + 1 if first else 0
            yield first, bytes(self.blob[start : int(self.ends[min(first + _STEP, len(self)) - 1]) + 1])

    def taken(self, order: np.ndarray) -> "Texts":
        """Those of the numbers i64 [m], in that order; quick where many of them follow each other already."""
        blob, view = bytearray(), memoryview(self.blob)
        for at in range(0, len(order), _STEP):
            some = order[at : at + _STEP]
            breaks = np.flatnonzero(np.diff(some) != 1)
            firsts, lasts = some[np.append(0, breaks + 1)], some[np.append(breaks, len(some) - 1)]
            starts = np.where(firsts > 0, self.ends[firsts - 1] + 1, 0)
            runs = zip(starts.tolist(), (self.ends[lasts] + 1).tolist(), strict=True)
            blob += b"".join([view[start:stop] for start, stop in runs])
        return Texts(blob)


def _ends(blob: bytes | bytearray, start: int) -> np.ndarray:
    """Where NULs stand in the next `_BYTES` from `start` on."""
    return np.flatnonzero(np.frombuffer(blob, np.uint8, min(_BYTES, len(blob) - start), start) == 0) + start


def texts_of(texts: Sequence[str]) -> Texts:
    """Of the same texts, none of which has a NUL."""
    return Texts("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"))
