"""The folders in which many files lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Folders:
    """`names` are relative, "a/b/", "" for the root; `within` i32 [n] has the number of each file's."""

    names: list[str]
    within: np.ndarray

    @staticmethod
    def of_runs(names: Sequence[str], counts: np.ndarray) -> "Folders":
        """Of files that come folder by folder, as many as `counts` i64 says; a folder may come again."""
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return Folders(list(number), np.repeat(np.array([number[name] for name in names], np.int32), counts))

    @staticmethod
    def of(paths: Sequence[str]) -> "Folders":
        """Of files by their paths."""
        return Folders.of_runs([path[: path.rfind("/") + 1] for path in paths], np.ones(len(paths), np.int64))
