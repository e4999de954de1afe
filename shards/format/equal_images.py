"""Images that a set holds more than once, or in common with another: by the checksums that indexes have of each."""

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_BAD, FLAG_LABELLED, index_path, open_index
from beitforge.shards.format.manifest import NAME, ImageManifest, read_image_manifest


@dataclass(frozen=True)
class Contents:
    """The images of a set but those known to be bad: xxh3 u64 [n] of the bytes, labels i64 [n], -1 for none."""

    xxh3: np.ndarray
    labels: np.ndarray

    def copies(self) -> int:
        """The images beyond the first of each content."""
        return len(self.xxh3) - len(np.unique(self.xxh3))

    def disputed(self) -> int:
        """The images whose bytes are there with another label, too."""
        order = np.lexsort((self.labels, self.xxh3))
        xxh3, labels = self.xxh3[order], self.labels[order]
        differ = (xxh3[1:] == xxh3[:-1]) & (labels[1:] != labels[:-1])
        return int(np.isin(self.xxh3, xxh3[1:][differ]).sum())

    def within(self, other: "Contents") -> int:
        """The images whose bytes are in the other set, too."""
        return int(np.isin(self.xxh3, other.xxh3).sum())


def contents(folder: Path, manifest: ImageManifest) -> Contents:
    """Of a set; shards whose index is damaged or missing are left out."""
    found = []
    for entry in manifest.shards:
        with contextlib.suppress(ShardError):
            index = open_index(index_path(folder, entry.name))
            found.append((index.image_xxh3, index.label, index.flags))
    if not found:
        return Contents(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    xxh3, labels, flags = (np.concatenate(parts) for parts in zip(*found, strict=True))
    good = (flags & FLAG_BAD) == 0
    return Contents(xxh3[good], np.where(flags & FLAG_LABELLED, labels, -1)[good])


def siblings(folder: Path, manifest: ImageManifest) -> dict[str, Path]:
    """By name the other finished sets that the same packing made, beside this one."""
    plan, found = manifest.made_by.get("plan"), {}
    for path in sorted(folder.absolute().parent.glob(f"*/{NAME}")) if plan else []:
        with contextlib.suppress(ShardError, OSError):
            if not path.parent.samefile(folder) and read_image_manifest(path.parent).made_by.get("plan") == plan:
                found[path.parent.name] = folder.parent / path.parent.name
    return found


def told(sets: dict[str, Contents]) -> list[str]:
    """A line for every set with copies, and for every two that have images in common, the smaller one named first."""
    lines = []
    for name, one in sets.items():
        if copies := one.copies():
            disputed = one.disputed()
            labels = f"; {disputed} images have the bytes of one with another label" if disputed else ""
            lines.append(f"{name}: {copies} of {len(one.xxh3)} images repeat the bytes of another{labels}")
    by_size = sorted(sets, key=lambda name: len(sets[name].xxh3))
    return lines + [
        f"{common} of {len(sets[small].xxh3)} images of {small} are byte for byte in {large}, too"
        for small, large in itertools.combinations(by_size, 2)
        if (common := sets[small].within(sets[large]))
    ]
