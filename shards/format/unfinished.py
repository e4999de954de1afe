"""What a folder holds that is no shard set, or not yet one, for whoever gave it as one."""

import itertools
import os
from pathlib import Path

NAME = "manifest.json"
PACKING = "packing.json"  # marks a folder that `pack` has not finished

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl", ".jfif")
_MOST_LOOKED = 10_000  # files of such a folder
_SHOWN = 5


def instead(folder: Path, cure: str) -> str:
    """What a folder without a manifest is, and what to do about it; `cure` is for an unfinished set."""
    if below := sorted(inner.parent.name for inner in folder.glob(f"*/{NAME}")):
        return f"{folder} is no shard set itself, but {_some(below)} in it are: give one of them"
    names = sorted(path.name for path in itertools.islice(folder.iterdir(), _MOST_LOOKED))
    if PACKING in names:
        return f"{folder} holds an unfinished packing: finish it with `pack` (the same command again)"
    if any(name.endswith(".tar") for name in names):
        return f"{folder} holds tars and no {NAME}: `index` adopts them or says what they lack"
    files = (inner for _, _, found in os.walk(folder) for inner in found)
    if image := next((one for one in itertools.islice(files, _MOST_LOOKED) if one.lower().endswith(_IMAGES)), ""):
        return f"{folder} holds images ({image}) and is no shard set: make one of them with `pack {folder} SHARDS`"
    held = f"it holds {_some(names)}" if names else "it is empty"
    return f"{folder} has no {NAME}, so it is unfinished, or no shard set ({held}): {cure}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
