"""The image files of a folder, the keys they get, and the classes their sub-folders name."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.errors import ShardError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class ImageFiles:
    """n image files, sorted by key. `paths` are relative to the folder, with "/"; `sizes` bytes, `times` mtime in ns.

    `others` counts the files that are no images by their name; hidden ones are not counted.
    """

    paths: list[str]
    keys: list[str]
    hashes: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    others: int

    def __len__(self) -> int:
        return len(self.paths)


def list_images(folder: Path, leave_out: Path) -> ImageFiles:
    """Every image below `folder`, hidden files and the folder `leave_out` excepted.

    Raises ShardError when there is no folder, no image in it, a sub-folder cannot be read, or two keys share a hash.
    """
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder; give the folder that holds the images")
    found: list[tuple[str, int, int]] = []
    others = 0
    for path, status in _walk(folder, "", [], leave_out.resolve()):
        if not path.lower().endswith(EXTENSIONS):
            others += 1
        else:
            found.append((path, status.st_size, status.st_mtime_ns) if status else (path, 0, 0))
    if not found:
        seen = f"; it holds {others} other files" if others else ""
        raise ShardError(f"{folder} holds no image ({' '.join(EXTENSIONS)}){seen}: give the folder of the images")
    keys = keys_of([path for path, _, _ in found])
    by_key = sorted(range(len(found)), key=lambda i: keys[i])
    sorted_keys = [keys[i] for i in by_key]
    return ImageFiles(
        paths=[found[i][0] for i in by_key],
        keys=sorted_keys,
        hashes=_distinct_hashes(sorted_keys),
        sizes=np.array([found[i][1] for i in by_key], dtype=np.int64),
        times=np.array([found[i][2] for i in by_key], dtype=np.int64),
        others=others,
    )


def _walk(
    folder: Path, prefix: str, above: list[tuple[int, int]], leave_out: Path
) -> Iterator[tuple[str, os.stat_result | None]]:
    """Relative path and status of every file below, in order; None for a link that leads nowhere.

    Links are followed, but not into a folder above; what is neither file nor folder is passed over.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above or folder.resolve() == leave_out:
        return
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except PermissionError as error:
        raise ShardError(f"{folder} cannot be listed ({error.strerror}): make it readable, or move it away") from error
    for name in names:
        entry = _status(folder / name)
        if entry is not None and stat.S_ISDIR(entry.st_mode):
            yield from _walk(folder / name, f"{prefix}{name}/", [*above, here], leave_out)
        elif entry is None or stat.S_ISREG(entry.st_mode):
            yield f"{prefix}{name}", entry


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENOTDIR):
            return None
        raise


def _escape(text: str, dots: bool) -> str:
    """Percent-encode what WebDataset, a tar or a terminal would trip over; spaces and letters of any script stay.

    WebDataset ends a key at the first dot of the file's name, so dots go; undecodable bytes arrive as surrogates.
    """
    out = []
    for character in text:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            out.append(f"%{code - 0xDC00:02X}")
        elif code < 32 or 127 <= code < 160 or character == "%" or (dots and character == "."):
            out.extend(f"%{byte:02X}" for byte in character.encode())
        else:
            out.append(character)
    return "".join(out)


def _key(path: str, with_extension: bool) -> str:
    stem = path if with_extension else path[: path.rindex(".")]
    key = _escape(stem, dots=True)
    # webdataset skips members whose first folder looks like __this__
    return f"%5F{key[1:]}" if key.startswith("__") else key


def keys_of(paths: list[str]) -> list[str]:
    """The key of each relative path: the path without extension, escaped; all distinct.

    Where several files of a folder share a stem, each of those keys keeps its extension (`a%2Ejpg`, `a%2Epng`).
    """
    whole = [False] * len(paths)
    keys = [_key(path, False) for path in paths]
    while True:
        counts = Counter(keys)
        shared = [i for i, key in enumerate(keys) if counts[key] > 1 and not whole[i]]
        if not shared:
            return keys
        for i in shared:
            whole[i] = True
            keys[i] = _key(paths[i], True)


def _distinct_hashes(keys: list[str]) -> np.ndarray:
    hashes = np.array([hash_key(key) for key in keys], dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(same):
        first, second = keys[order[same[0]]], keys[order[same[0] + 1]]
        raise ShardError(f"the keys {first} and {second} have the same 64-bit hash: rename one of the two images")
    return hashes


def classes_of(paths: list[str], labels: str) -> tuple[list[str], list[int]]:
    """Class names, sorted, and the class of each path; both empty when the images are not labelled.

    labels: `folder` makes the first folder of each path its class, `auto` does so if every image lies in a folder
    and there are at least two, `none` never. Raises ShardError when `folder` is asked for and an image lies in none.
    """
    if labels == "none":
        return [], []
    stray = next((path for path in paths if "/" not in path), None)
    if stray is not None and labels == "folder":
        raise ShardError(f"{stray} lies in no sub-folder, so it has no class: move it, or use --labels none")
    if stray is not None:
        return [], []
    folders = [path.split("/", 1)[0] for path in paths]
    names = sorted(set(folders))
    if labels == "auto" and len(names) < 2:
        return [], []
    number = {name: i for i, name in enumerate(names)}
    return names, [number[folder] for folder in folders]
