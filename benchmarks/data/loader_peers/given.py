"""What every path of `loader` shows, as a child process reads it: numpy and files only."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCH, SIZE, PREFETCH, BUFFER, SEED = 64, 224, 4, 1000, 1

Shown = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Given:
    """N images with one view each. boxes i64 [N, 4]: x, y, width, height; flips bool [N]; limits i64 [N, 2]: lowest and
    highest level; sizes i64 [N, 2]: width, height; flags i64 [N]: the index's."""

    folder: Path
    boxes: np.ndarray
    flips: np.ndarray
    limits: np.ndarray
    sizes: np.ndarray
    flags: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    def data(self, number: int) -> bytes:
        """The encoded image."""
        return (self.folder / "originals" / f"{number:06d}.jpg").read_bytes()

    def urls(self) -> list[str]:
        """The tars, as webdataset takes them."""
        return [str(path) for path in sorted((self.folder / "shards").glob("*.tar"))]

    def copy(self, name: str, make: Callable[[Path], None]) -> Path:
        """The peer's own copy of the images, made once; `make` fills an empty folder."""
        found, unfinished = self.folder / "peers" / name, self.folder / "peers" / f"{name}.{os.getpid()}"
        if not found.exists():
            unfinished.mkdir(parents=True)
            make(unfinished)
            unfinished.rename(found)
        return found


@dataclass(frozen=True)
class LoaderPath:
    """Endless batches of BATCH images, and what a batch shows: pixels u8 [B, 3, SIZE, SIZE] and the images' numbers
    i64 [B]; None where the view is the loader's own."""

    batches: Iterator
    shown: Callable[..., Shown] | None


def write_given(file: Path, given: Given) -> None:
    """For `read_given`, which takes the folder from where the file lies."""
    columns = {name: value for name, value in vars(given).items() if name != "folder"}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **columns)


def read_given(file: Path) -> Given:
    """`file` lies in the corpus's folder peers/."""
    with np.load(file) as columns:
        return Given(file.parents[1], **{name: columns[name] for name in columns.files})
