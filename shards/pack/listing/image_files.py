"""The image files of a folder, by their content, and the keys they get."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.decode.kinds import HEAD_BYTES, kind_of
from beitforge.shards.errors import ShardError
from beitforge.shards.pack.listing.short_reads import look_into
from beitforge.shards.pack.listing.walk import PassedOver, Tally, Walk

# Until plan format 2 these names alone were images.
FIRST_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# What a camera's sensor gave. Most of these files are TIFFs, too, whose first image is a thumbnail.
RAW_EXTENSIONS = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef"),
    *(".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
# Names that promise an image: such a file is in the list whatever it holds, and packing says whether it can be used.
_EXTENSIONS = (
    *FIRST_EXTENSIONS,
    *RAW_EXTENSIONS,
    *(".jfif", ".jpe", ".jif", ".jfi", ".mpo", ".jps", ".apng", ".dib", ".avif", ".avifs", ".heic", ".heics", ".heif"),
    *(".heifs", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".psd", ".psb", ".xcf", ".ico", ".tga", ".pcx", ".qoi"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".pam", ".pfm", ".exr", ".hdr", ".dds", ".svg", ".svgz", ".dcm"),
)
_LONGEST_KIND = 12  # characters of an extension that counts as a kind


@dataclass(frozen=True)
class ImageFiles:
    """n image files, sorted by key. `paths` are relative to the folder, with "/"; `sizes` bytes, `times` mtime in ns.

    `others` are the files that are no images, by kind: their extension, or that they are hidden. `links` are the links
    and folders left out because what they lead to is taken already, each with the name it is taken by. `bare` are the
    folders at the top that hold no image.
    """

    paths: list[str]
    keys: list[str]
    hashes: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    others: list[PassedOver]
    links: list[tuple[str, str]] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)


def list_images(folder: Path, leave_out: Path, by_name: tuple[str, ...] = ()) -> ImageFiles:
    """Every image below `folder`, hidden files and the folder `leave_out` excepted: a file whose name promises one, or
    whose first bytes are an image's. by_name: the extensions that alone make an image, for plans of format 1.

    Raises ShardError when there is no image, a sub-folder cannot be read, or two keys share a hash.
    """
    walk = Walk(folder, leave_out.resolve())
    found: list[tuple[str, int, int]] = []
    unknown: list[tuple[str, int, int]] = []
    for path, status in walk.files():
        facts = (path, status.st_size, status.st_mtime_ns) if status else (path, 0, 0)
        if path.lower().endswith(by_name or _EXTENSIONS):
            found.append(facts)
        elif status is None:
            walk.passed.add("a link that leads nowhere", path)
        else:
            unknown.append(facts)
    names = [] if by_name else [path for path, _, _ in unknown]
    images = {
        path
        for path, is_image in zip(names, look_into(folder, names, _is_image, _no_image, "first bytes"), strict=True)
        if is_image
    }
    for facts in unknown:
        if facts[0] in images:
            found.append(facts)
        else:
            walk.passed.add(_kind(facts[0].lower()), facts[0])
    if not found:
        raise ShardError(f"{folder} holds no image{_instead(walk.passed)}")
    keys = keys_of([path for path, _, _ in found])
    by_key = sorted(range(len(found)), key=lambda i: keys[i])
    sorted_keys = [keys[i] for i in by_key]
    return ImageFiles(
        paths=[found[i][0] for i in by_key],
        keys=sorted_keys,
        hashes=_distinct_hashes(sorted_keys),
        sizes=np.array([found[i][1] for i in by_key], dtype=np.int64),
        times=np.array([found[i][2] for i in by_key], dtype=np.int64),
        others=walk.passed.kinds(),
        links=walk.left_out,
        bare=sorted({*walk.top} - {path.split("/", 1)[0] for path, _, _ in found if "/" in path}),
    )


def _is_image(descriptor: int) -> bool:
    """By the first bytes."""
    return bool(kind_of(os.pread(descriptor, HEAD_BYTES, 0)))


def _no_image(path: str) -> bool:
    """Of a file that cannot be read: nothing says that it is one."""
    return False


def _kind(path: str) -> str:
    """What a file that is no image is counted as."""
    extension = os.path.splitext(path)[1]
    return extension if 1 < len(extension) <= _LONGEST_KIND and extension.isprintable() else "without extension"


def _instead(passed: Tally) -> str:
    """What a folder without images holds, and what to do about it."""
    kinds = passed.kinds()
    if any(one.kind == ".tar" for one in kinds):
        return " but tars: adopt those that are WebDataset's with `index`, or unpack them"
    seen = f"; it holds {sum(one.files for one in kinds)} other files ({shown(kinds)})" if kinds else ""
    return f"{seen}: give the folder of the images"


def shown(kinds: list[PassedOver], most: int = 5) -> str:
    """The commonest kinds with their counts: `.txt 12, hidden 3, …`."""
    more = f", and {len(kinds) - most} more kinds" if len(kinds) > most else ""
    return ", ".join(f"{one.kind} {one.files}" for one in kinds[:most]) + more


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
    dot = path.rfind(".", path.rfind("/") + 1)
    key = _escape(path if with_extension or dot < 0 else path[:dot], dots=True)
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
