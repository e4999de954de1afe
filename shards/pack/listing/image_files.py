"""The image files of a folder, by their names or their content, and the keys they get."""

import os
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np

from beitforge.shards.decode.kinds import HEAD_BYTES, kind_of
from beitforge.shards.errors import ShardError
from beitforge.shards.pack.listing.folders import Folders
from beitforge.shards.pack.listing.keys import key_of, keys_of
from beitforge.shards.pack.listing.short_reads import look_into
from beitforge.shards.pack.listing.texts import Texts
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
    """n image files, sorted by key. `paths` are relative to the folder, with "/"; `folders` are where they lie;
    `whole` bool [n], whether the key has the path's extension; `hashes` u64 [n], of the keys; `sizes` i64 [n] bytes;
    `times` i64 [n] mtime in ns.

    `others` are the files that are no images, by kind: their extension, or that they are hidden. `links` are the links
    and folders left out because what they lead to is taken already, each with the name it is taken by. `bare` are the
    folders at the top that hold no image.
    """

    paths: Texts
    folders: Folders
    whole: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    others: list[PassedOver]
    links: list[tuple[str, str]] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, number: int) -> str:
        """Of an image by its number."""
        return key_of(self.paths[number], bool(self.whole[number]))


def list_images(folder: Path, leave_out: Path, by_name: tuple[str, ...] = ()) -> ImageFiles:
    """Every image below `folder`, hidden files and the folder `leave_out` excepted: a file whose name promises one, or
    whose first bytes are an image's. by_name: the extensions that alone make an image, for plans of format 1.

    Raises ShardError when there is no image, a sub-folder cannot be read, or two keys share a hash.
    """
    extensions = frozenset(by_name or _EXTENSIONS)
    walk = Walk(folder, leave_out, lambda extension: extension.lower() in extensions)
    _take_by_content(folder, walk, not by_name)
    found = walk.found
    if not found.sizes:
        raise ShardError(f"{folder} holds no image{_instead(walk.passed)}")
    paths, found.paths = Texts(found.paths), bytearray()
    keys = keys_of(paths)
    paths = paths.taken(keys.order)
    folders = Folders.of_runs(found.folders, np.frombuffer(found.counts, np.int64))
    return ImageFiles(
        paths=paths,
        folders=Folders(folders.names, folders.within[keys.order]),
        whole=keys.whole[keys.order],
        hashes=keys.hashes[keys.order],
        sizes=np.frombuffer(found.sizes, np.int64)[keys.order],
        times=np.frombuffer(found.times, np.int64)[keys.order],
        others=walk.passed.kinds(),
        links=walk.left_out,
        bare=sorted({*walk.top} - {name.split("/", 1)[0] for name in folders.names}),
    )


def _take_by_content(folder: Path, walk: Walk, look: bool) -> None:
    """Of the files that no name tells about, take those whose first bytes do, if they are looked at; count the rest."""
    unknown = walk.unknown
    paths = Texts(unknown.paths)
    found = look_into(folder, paths, _is_image, _no_image, "first bytes") if look else repeat(False)
    for i, is_image in zip(range(len(paths)), found, strict=False):
        path = paths[i]
        if is_image:
            within, slash, name = path.rpartition("/")
            walk.found.add(within + slash, [name], [unknown.sizes[i]], [unknown.times[i]])
        else:
            walk.passed.add(_kind(path.lower()), path)


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
