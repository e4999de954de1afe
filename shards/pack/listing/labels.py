"""The classes that the sub-folders of a folder of images name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.pack.listing.folders import Folders

_MONTH = "jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|(sept?|oct|nov|dec)((t?em|o)ber)?"
_NUMBER = re.compile(  # not: 3d-models, 1950s cars, Volvo 240 Sedan 1993
    r"[\W\d_]*\d[\W\d_]*"  # 7, 2018-05, 20180512_2
    r"|(19|20)\d\d[-_. 年].*"  # 2018 Rome, 2018-05-12 Rome
    rf"|(\d{{1,2}}[-_. ]*)?(?i:{_MONTH})([-_. ]*\d{{2,4}})?"  # 01 January, May 2018
    r"|\d{3}[A-Z0-9_]{5}",  # 100CANON, as cameras name them
    re.DOTALL,
)
# train, val2017, part_2, "New folder (3)"
_PARTS = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval|held-?out|images?|imgs?|photos?|pics?|data|part|batch|set|split|fold|"
    r"chunk|shard|dis[ck]|dir|(new )?folder)[-_. (]*\d*\)?",
    re.IGNORECASE,
)
_SHOWN = 3


@dataclass(frozen=True)
class Labels:
    """Class names, sorted, and the number of each image's class, i32 [n]; both empty when they are not labelled.

    `why` says how that was decided, for people.
    """

    classes: list[str] = field(default_factory=list)
    of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    why: str = ""


def labels_of(paths: Sequence[str], folders: Folders, labels: str) -> Labels:
    """labels: `folder` makes the first folder of each path its class, `none` never. `auto` does so where the folders
    look like classes: each image lies in one folder, that folder at the top, two of them at least, and none with a
    number or a date for a name, or those of parts of a set. Raises ShardError when `folder` is asked for and an image
    lies in none."""
    if labels == "none":
        return Labels(why="none, by --labels none")
    stray = _first(paths, folders, lambda name: not name)
    if stray and labels == "folder":
        raise ShardError(f"{stray} lies in no sub-folder, so it has no class: move it, or use --labels none")
    if labels == "auto" and (doubt := _doubt(paths, folders, stray)):
        return Labels(why=f"none: {doubt}")
    found = _by_folder(folders)
    how = (
        "the sub-folder of each image" if labels == "auto" else "the first sub-folder of each image, by --labels folder"
    )
    undo = "; --labels none packs them without" if labels == "auto" else ""
    return Labels(found.classes, found.of, f"{len(found.classes)} classes, {how} ({_some(found.classes)}){undo}")


def labels_of_format_1(paths: Sequence[str], folders: Folders, labels: str) -> Labels:
    """As plans of format 1 had them: `auto` takes any first folders, if each image has one and there are two."""
    found = _by_folder(folders) if labels != "none" and all(folders.names) else Labels()
    return found if labels == "folder" or len(found.classes) > 1 else Labels()


def _first(paths: Sequence[str], folders: Folders, holds: Callable[[str], bool]) -> str:
    """The first of the paths of whose folder that holds, or ""."""
    found = np.flatnonzero(np.array([holds(name) for name in folders.names])[folders.within])
    return paths[int(found[0])] if len(found) else ""


def _top(folder: str) -> str:
    return folder.split("/", 1)[0]


def _by_folder(folders: Folders) -> Labels:
    names = sorted({_top(folder) for folder in folders.names})
    number = {name: i for i, name in enumerate(names)}
    return Labels(names, np.array([number[_top(folder)] for folder in folders.names], np.int32)[folders.within])


def _doubt(paths: Sequence[str], folders: Folders, stray: str) -> str:
    """Why the first folders of these paths need not be classes, and the cure; "" where they look like it."""
    cure = "--labels folder takes the first sub-folder as the class"
    if stray:
        return f"{stray} lies in no sub-folder" if any(folders.names) else "there are no sub-folders"
    if deep := _first(paths, folders, lambda name: name.count("/") > 1):
        return f"there are folders in folders ({deep}), and which of them names a class cannot be known; {cure}"
    names = sorted({_top(folder) for folder in folders.names})
    if len(names) < 2:
        return f"all images lie in one sub-folder, {names[0]}; {cure}"
    if numbers := [name for name in names if _NUMBER.fullmatch(name)]:
        return f"folders with numbers or dates for names need not be classes ({_some(numbers)}); {cure}"
    if all(_PARTS.fullmatch(name) for name in names):
        return f"the sub-folders have the names of parts of a set ({_some(names)}); pack each by itself, or {cure}"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
