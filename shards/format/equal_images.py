"""Images that a set holds more than once, or in common with another: by the checksums that indexes have of each."""

import contextlib
import itertools
from collections.abc import Sequence
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


def contents_of(xxh3: np.ndarray, labels: np.ndarray, flags: np.ndarray) -> Contents:
    """By the columns of a set's indexes."""
    good = (flags & FLAG_BAD) == 0
    return Contents(xxh3[good], np.where(flags & FLAG_LABELLED, labels, -1)[good])


def contents(folder: Path, manifest: ImageManifest) -> Contents:
    """Of a set; shards whose index is damaged or missing are left out."""
    found = []
    for entry in manifest.shards:
        with contextlib.suppress(ShardError):
            index = open_index(index_path(folder, entry.name))
            found.append((index.image_xxh3, index.label, index.flags))
    if not found:
        return Contents(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    return contents_of(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def beside(folder: Path, manifest: ImageManifest, others: Sequence[Path]) -> dict[str, tuple[Path, ImageManifest]]:
    """By name the sets that a set is compared with: those that the same packing made beside it, and others by their
    paths. Raises ShardError where one of these is no image set."""
    found = {str(other): (other, read_image_manifest(other)) for other in others}
    plan = manifest.made_by.get("plan")
    for path in sorted(folder.absolute().parent.glob(f"*/{NAME}")) if plan else []:
        where = path.parent
        with contextlib.suppress(ShardError, OSError):
            if not any(where.samefile(known) for known in (folder, *others)):
                sibling = read_image_manifest(where, warn=False)  # what is wrong with it is its own verdict
                if sibling.made_by.get("plan") == plan:
                    found[where.name] = (where, sibling)
    return found


def told(sets: dict[str, Contents], of: str = "") -> list[str]:
    """A line for every set with copies, and for every two that have images in common, the smaller one named first.
    of: of this set alone, and of its pairs."""
    lines = []
    for name in [of] if of else sets:
        if copies := sets[name].copies():
            disputed = sets[name].disputed()
            labels = f"; {disputed} images have the bytes of one with another label" if disputed else ""
            lines.append(f"{name}: {copies} of {len(sets[name].xxh3)} images repeat the bytes of another{labels}")
    by_size = sorted(sets, key=lambda name: len(sets[name].xxh3))
    return lines + [
        f"{common} of {len(sets[small].xxh3)} images of {small} are byte for byte in {large}, too"
        for small, large in itertools.combinations(by_size, 2)
        if (not of or of in (small, large)) and (common := sets[small].within(sets[large]))
    ]


def equal_images(folder: Path, manifest: ImageManifest, others: Sequence[Path]) -> list[str]:
    """What is told of a set, of the sets beside it, and of `others`."""
    name = str(folder)
    sets = {name: contents(folder, manifest)}
    sets |= {other: contents(*where) for other, where in beside(folder, manifest, others).items()}
    return told(sets, name)
