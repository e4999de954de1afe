"""What a shard set holds, as numbers: from manifests, indexes and token files, no image is read."""

from pathlib import Path

import numpy as np

from beitforge.shards.format.index import (
    FLAG_ANIMATED,
    FLAG_BAD,
    FLAG_JPEG,
    FLAG_LABELLED,
    FLAG_NOT_RGB,
    FLAG_PNG,
    FLAG_PROGRESSIVE,
    FLAG_ROTATED,
    FLAG_WEBP,
    index_path,
    read_columns,
)
from beitforge.shards.format.manifest import read_image_manifest, read_token_manifest
from beitforge.shards.format.tokens import open_token_shard, token_path

_FORMATS = {"jpeg": FLAG_JPEG, "png": FLAG_PNG, "webp": FLAG_WEBP}
_FLAGS = {
    "progressive": FLAG_PROGRESSIVE,
    "not 8-bit RGB": FLAG_NOT_RGB,
    "EXIF turn": FLAG_ROTATED,
    "animated": FLAG_ANIMATED,
    "labelled": FLAG_LABELLED,
    "bad": FLAG_BAD,
}
_SHOWN_CLASSES = 20


def image_stats(folder: Path) -> dict:
    """Counts, bytes, sides (min, median, max over the images that decode), formats, flags, classes of an image set.

    Raises ShardError when there is no finished image set in `folder`.
    """
    manifest = read_image_manifest(folder)
    paths = [index_path(folder, entry.name) for entry in manifest.shards]
    found = read_columns(paths, ("flags", "label", "width", "height", "image_size"))
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
        "bytes": sum(entry.bytes for entry in manifest.shards),
        "bytes per image": round(float(columns["image_size"].mean()), 1),
        **{name: _spread(values) for name, values in sides.items()},
        "formats": {**formats, "other": len(flags) - sum(formats.values())},
        "flags": {name: int(np.count_nonzero(flags & flag)) for name, flag in _FLAGS.items()},
        "classes": {
            manifest.classes[label] if 0 <= label < named else str(label): count
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
        },
    }


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
        if isinstance(value, dict):
            value = _row(value, name)
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{name:<{width}} {value}")
    return "\n".join(lines)


def _row(values: dict, name: str) -> str:
    if name == "classes":
        if not values:
            return "none"
        shown = [f"{key} {count}" for key, count in list(values.items())[:_SHOWN_CLASSES]]
        more = f", … {len(values) - _SHOWN_CLASSES} more (--json has all)" if len(values) > _SHOWN_CLASSES else ""
        return f"{len(values)}: {', '.join(shown)}{more}"
    if name in ("flags", "formats"):
        values = {key: count for key, count in values.items() if count}
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "none"
