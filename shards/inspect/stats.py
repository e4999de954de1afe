"""What a shard set holds, as numbers: from manifests, indexes and token files. Only near duplicates read images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from beitforge.shards.errors import printable
from beitforge.shards.format.equal_images import beside, contents, contents_of
from beitforge.shards.format.index import (
    FLAG_ANIMATED,
    FLAG_BAD,
    FLAG_JPEG,
    FLAG_LABELLED,
    FLAG_NOT_RGB,
    FLAG_PNG,
    FLAG_PROGRESSIVE,
    FLAG_REGIONS,
    FLAG_ROTATED,
    FLAG_WEBP,
    index_path,
    read_columns,
)
from beitforge.shards.format.manifest import ImageManifest, read_image_manifest, read_token_manifest
from beitforge.shards.format.tokens import open_token_shard, token_path
from beitforge.shards.inspect.near_duplicates import near_duplicates

_FORMATS = {"jpeg": FLAG_JPEG, "png": FLAG_PNG, "webp": FLAG_WEBP}
_FLAGS = {
    "progressive": FLAG_PROGRESSIVE,
    "not 8-bit RGB": FLAG_NOT_RGB,
    "EXIF turn": FLAG_ROTATED,
    "animated": FLAG_ANIMATED,
    "fast regions": FLAG_REGIONS,
    "labelled": FLAG_LABELLED,
    "bad": FLAG_BAD,
}
_SHOWN_CLASSES = 20
_SHOWN_GROUPS, _SHOWN_KEYS = 20, 6


def image_stats(folder: Path, others: Sequence[Path] = ()) -> dict:
    """Counts, bytes, sides (min, median, max over the images that decode), formats, flags, classes of an image set, and
    how many of its images repeat the bytes of another, or are in the sets beside it or in `others`, too.

    Raises ShardError when there is no finished image set in `folder` or in one of `others`.
    """
    manifest = read_image_manifest(folder)
    paths = [index_path(folder, entry.name) for entry in manifest.shards]
    found = read_columns(paths, ("flags", "label", "width", "height", "image_size", "image_xxh3"))
    columns = {name: np.concatenate(parts) for name, parts in found.items()}
    flags = columns["flags"]
    sides = {name: columns[name][(flags & FLAG_BAD) == 0] for name in ("width", "height")}
    labels, counts = np.unique(columns["label"][(flags & FLAG_LABELLED) != 0], return_counts=True)
    named = len(manifest.classes)
    formats = {name: int(np.count_nonzero(flags & flag)) for name, flag in _FORMATS.items()}
    return {
        "kind": "images",
        "folder": str(folder),
        "made by": str(manifest.made_by.get("verb", "unknown")),
        "fingerprint": manifest.fingerprint,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": int(manifest.column("bytes").sum()),
        "bytes per image": round(float(columns["image_size"].mean()), 1),
        **{name: _spread(values) for name, values in sides.items()},
        "formats": {**formats, "other": len(flags) - sum(formats.values())},
        "flags": {name: int(np.count_nonzero(flags & flag)) for name, flag in _FLAGS.items()},
        "equal images": _equal(folder, manifest, columns, others),
        "classes": dict.fromkeys(manifest.classes, 0)  # a class that lost all its images keeps its number
        | {
            manifest.classes[label] if 0 <= label < named else str(label): count
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
        },
    }


def _equal(folder: Path, manifest: ImageManifest, columns: dict[str, np.ndarray], others: Sequence[Path]) -> dict:
    """Images that repeat another's bytes, those among them with another label, and those that are elsewhere, too."""
    ours = contents_of(columns["image_xxh3"], columns["label"], columns["flags"])
    found = {"repeated": ours.copies(), "with another label": ours.disputed()}
    for name, where in beside(folder, manifest, others).items():
        found[f"also in {name}"] = ours.within(contents(*where))
    return found


def duplicate_stats(folder: Path, others: Sequence[Path], num_workers: int) -> dict:
    """Groups of images that are near one another by their pixels, in an image set, those beside it and `others`, and
    how many images of the set are in one; at least one of each group is the set's. Decodes every image of all.

    Raises ShardError as image_stats does.
    """
    manifest = read_image_manifest(folder)
    sets = {str(folder): (folder, manifest), **beside(folder, manifest, others)}
    groups = [group for group in near_duplicates(sets, num_workers) if any(name == str(folder) for name, _ in group)]
    mine = [[key for name, key in group if name == str(folder)] for group in groups]
    found = {"groups": len(groups), "images": sum(map(len, mine))}
    for other in sets:
        if other != str(folder):
            inside = [
                len(keys) for keys, group in zip(mine, groups, strict=True) if any(name == other for name, _ in group)
            ]
            found[f"also in {other}"] = sum(inside)
    named = [[key if name == str(folder) else f"{name}: {key}" for name, key in group] for group in groups]
    return {"near duplicates": found, "near duplicate groups": named}


def _spread(values: np.ndarray) -> dict:
    if not len(values):
        return {}
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def token_stats(folder: Path) -> dict:
    """Views, grid, vocabulary and codebook use of a token set. Rows of unreadable images are not counted.

    Perplexity is exp of the entropy of the tokens' frequencies: how many tokens are in equal use.
    Raises ShardError when there is no finished token set in `folder`.
    """
    manifest = read_token_manifest(folder)
    vocabulary = int(manifest.tokenizer["vocabulary"])
    counts = np.zeros(2**16, dtype=np.int64)
    num_bad = size = 0
    for entry in manifest.shards:
        path = token_path(folder, entry.name)
        shard = open_token_shard(path)
        size += path.stat().st_size
        bad = shard.bad
        num_bad += int(np.count_nonzero(bad))
        for view in shard.tokens:
            counts += np.bincount(view[bad == 0].ravel(), minlength=len(counts))
    shares = counts[counts > 0] / max(1, counts.sum())
    return {
        "kind": "tokens",
        "folder": str(folder),
        "fingerprint": manifest.fingerprint,
        "tokenizer": str(manifest.tokenizer.get("fingerprint", "unknown")),
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": size,
        "views": manifest.num_views,
        "grid": "x".join(str(side) for side in manifest.tokenizer["grid"]),
        "vocabulary": vocabulary,
        "tokens used": int(np.count_nonzero(counts)),
        "codebook use": round(np.count_nonzero(counts) / vocabulary, 4),
        "perplexity": round(float(np.exp(-(shares * np.log(shares)).sum())), 1),
        "commonest token's share": round(float(shares.max(initial=0.0)), 4),
        "unreadable images": num_bad,
        "policy": manifest.policy,
    }


def table(stats: dict) -> str:
    """The statistics for people, one line each."""
    lines, width = [], max(24, *(len(name) for name in stats))
    for name, value in stats.items():
        if name == "near duplicate groups":
            lines += _named(value)
            continue
        if isinstance(value, dict):
            value = _row(value, name)
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{name:<{width}} {value}")
    return "\n".join(map(printable, lines))


def _row(values: dict, name: str) -> str:
    if name == "classes":
        if not values:
            return "none"
        shown = [f"{key} {count}" for key, count in list(values.items())[:_SHOWN_CLASSES]]
        more = f", … {len(values) - _SHOWN_CLASSES} more (--json has all)" if len(values) > _SHOWN_CLASSES else ""
        return f"{len(values)}: {', '.join(shown)}{more}"
    if name in ("flags", "formats", "equal images", "near duplicates"):
        values = {key: count for key, count in values.items() if count}
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "none"


def _named(groups: list[list[str]]) -> list[str]:
    shown = [f"  {', '.join(group[:_SHOWN_KEYS])}{', …' if len(group) > _SHOWN_KEYS else ''}" for group in groups]
    more = [f"  … {len(groups) - _SHOWN_GROUPS} more groups (--json has all)"] if len(groups) > _SHOWN_GROUPS else []
    return shown[:_SHOWN_GROUPS] + more
