"""One look into each of many files, many at a time: over a network a file is waited for, not computed."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from beitforge.shards.progress import Progress, Silent
from beitforge.shards.storage.reading import OPEN

Found = TypeVar("Found")

_THREADS, _BATCH = 16, 64
_AT_ONCE = 1 << 14  # files whose names are held
_SILENT = 20_000  # files that are read before anybody wonders what takes so long


def look_into(
    folder: Path, paths: Sequence[str], look: Callable[[int], Found], otherwise: Callable[[str], Found], label: str
) -> Iterator[Found]:
    """What `look` finds by each file's descriptor, in order; of a file that cannot be read what `otherwise` says."""
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        Progress(label, len(paths), "files") if len(paths) > _SILENT else Silent() as progress,
    ):
        for first in range(0, len(paths), _AT_ONCE):
            some = paths[first : first + _AT_ONCE]
            batches = [some[start : start + _BATCH] for start in range(0, len(some), _BATCH)]
            for found in pool.map(partial(_look_into, folder, look, otherwise), batches):
                progress.advance(len(found))
                yield from found


def _look_into(
    folder: Path, look: Callable[[int], Found], otherwise: Callable[[str], Found], paths: Sequence[str]
) -> list[Found]:
    found = []
    for path in paths:
        try:
            descriptor = os.open(folder / path, OPEN)
            try:
                found.append(look(descriptor))
            finally:
                os.close(descriptor)
        except OSError:
            found.append(otherwise(path))
    return found
