"""The classes that the sub-folders of a folder of images name."""

import re
from dataclasses import dataclass, field

from beitforge.shards.errors import ShardError

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
    """Class names, sorted, and the number of the class of each path; both empty when the images are not labelled.

    `why` says how that was decided, for people.
    """

    classes: list[str] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    why: str = ""


def labels_of(paths: list[str], labels: str) -> Labels:
    """labels: `folder` makes the first folder of each path its class, `none` never. `auto` does so where the folders
    look like classes: each image lies in one folder, that folder at the top, two of them at least, and none with a
    number or a date for a name, or those of parts of a set. Raises ShardError when `folder` is asked for and an image
    lies in none."""
    if labels == "none":
        return Labels(why="none, by --labels none")
    stray = next((path for path in paths if "/" not in path), None)
    if stray is not None and labels == "folder":
        raise ShardError(f"{stray} lies in no sub-folder, so it has no class: move it, or use --labels none")
    if labels == "auto" and (doubt := _doubt(paths, stray)):
        return Labels(why=f"none: {doubt}")
    found = _by_folder(paths)
    how = (
        "the sub-folder of each image" if labels == "auto" else "the first sub-folder of each image, by --labels folder"
    )
    undo = "; --labels none packs them without" if labels == "auto" else ""
    return Labels(found.classes, found.of, f"{len(found.classes)} classes, {how} ({_some(found.classes)}){undo}")


def labels_of_format_1(paths: list[str], labels: str) -> Labels:
    """As plans of format 1 had them: `auto` takes any first folders, if each image has one and there are two."""
    found = _by_folder(paths) if labels != "none" and all("/" in path for path in paths) else Labels()
    return found if labels == "folder" or len(found.classes) > 1 else Labels()


def _by_folder(paths: list[str]) -> Labels:
    folders = [path.split("/", 1)[0] for path in paths]
    names = sorted(set(folders))
    number = {name: i for i, name in enumerate(names)}
    return Labels(names, [number[folder] for folder in folders])


def _doubt(paths: list[str], stray: str | None) -> str:
    """Why the first folders of these paths need not be classes, and the cure; "" where they look like it."""
    cure = "--labels folder takes the first sub-folder as the class"
    if stray is not None:
        return f"{stray} lies in no sub-folder" if any("/" in path for path in paths) else "there are no sub-folders"
    if deep := next((path for path in paths if path.count("/") > 1), ""):
        return f"there are folders in folders ({deep}), and which of them names a class cannot be known; {cure}"
    names = sorted({path.split("/", 1)[0] for path in paths})
    if len(names) < 2:
        return f"all images lie in one sub-folder, {names[0]}; {cure}"
    if numbers := [name for name in names if _NUMBER.fullmatch(name)]:
        return f"folders with numbers or dates for names need not be classes ({_some(numbers)}); {cure}"
    if all(_PARTS.fullmatch(name) for name in names):
        return f"the sub-folders have the names of parts of a set ({_some(names)}); pack each by itself, or {cure}"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
