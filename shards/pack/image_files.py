"""The image files of a folder, the keys they get, and the classes their sub-folders name."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.errors import ShardError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class ImageFiles:
    """n image files, sorted by key. `paths` are relative to the folder, with "/"; `sizes` bytes, `times` mtime in ns.

    `others` counts the files that are no images by their name; hidden ones are not counted. `links` are the links and
    folders left out because what they lead to is taken already, by another name: "link → what".
    """

    paths: list[str]
    keys: list[str]
    hashes: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    others: int
    links: list[str] = field(default_factory=list)

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
    walk = _Walk(folder, leave_out.resolve())
    for path, status in walk.files():
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
        links=walk.left_out,
    )


class _Walk:
    """Every file below a folder, each by one name: its own where it lies in the folder, else that of the first link.

    `left_out` names the links, and the folders met again behind links, whose files have such a name already.
    """

    def __init__(self, root: Path, leave_out: Path):
        self.root, self.leave_out = root, leave_out
        self.left_out: list[str] = []
        self._folders: dict[tuple[int, int], str] = {}  # device and inode: relative path
        self._linked: dict[tuple[int, int], str] = {}  # of files that links led to

    def files(self) -> Iterator[tuple[str, os.stat_result | None]]:
        """Relative path and status of each; None for a link that leads nowhere. What is neither file nor folder is
        passed over."""
        links: list[str] = []
        yield from self._below("", links)
        for path in links:  # after all that lies in the folder, so that a link never takes the place of it
            yield from self._link(path)
        self.left_out.sort()

    def _below(self, prefix: str, links: list[str]) -> Iterator[tuple[str, os.stat_result | None]]:
        """Files of a folder and those below. Links are added to `links`."""
        folder = self.root / prefix
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if folder.resolve() == self.leave_out:
            return
        if here in self._folders:
            self._leave_out(prefix, self._folders[here])
            return
        self._folders[here] = prefix
        for entry in _listed(folder):
            path = f"{prefix}{entry.name}"
            if entry.is_symlink():
                links.append(path)
            elif entry.is_dir():
                yield from self._below(f"{path}/", links)
            elif entry.is_file():
                yield path, _status(folder / entry.name)

    def _link(self, path: str) -> Iterator[tuple[str, os.stat_result | None]]:
        """What a link leads to, unless it is taken already; links behind it likewise."""
        target, status = self.root / path, _status(self.root / path)
        if status is None:
            yield path, None
        elif stat.S_ISDIR(status.st_mode):
            links: list[str] = []
            yield from self._below(f"{path}/", links)
            for inner in links:
                yield from self._link(inner)
        elif taken := self._taken(target, status):
            self._leave_out(path, taken)
        elif stat.S_ISREG(status.st_mode):
            self._linked[status.st_dev, status.st_ino] = path
            yield path, status

    def _taken(self, target: Path, status: os.stat_result) -> str:
        """By what name the file that a link leads to is taken already, or ''."""
        if (status.st_dev, status.st_ino) in self._linked:
            return self._linked[status.st_dev, status.st_ino]
        real = target.resolve()
        within = real.parent.stat()
        if (folder := self._folders.get((within.st_dev, within.st_ino))) is None or real.name.startswith("."):
            return ""
        return f"{folder}{real.name}"

    def _leave_out(self, path: str, taken: str) -> None:
        self.left_out.append(f"{path.rstrip('/')} → {taken.rstrip('/') or '.'}")


def _listed(folder: Path) -> list[os.DirEntry]:
    """What a folder holds but for hidden names, in order."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except PermissionError as error:
        raise ShardError(f"{folder} cannot be listed ({error.strerror}): make it readable, or move it away") from error


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
