"""Check a token shard set: its own files, and row for row the image set it belongs to."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_BAD, Index, index_path, open_index
from beitforge.shards.format.manifest import TokenManifest, TokenShard, check_columns, read_token_manifest
from beitforge.shards.format.tokens import OpenTokenShard, check_pairing, check_rows, open_token_shard, token_path
from beitforge.shards.format.views import JITTER_ORDERS
from beitforge.shards.inspect.verify import Report
from beitforge.shards.progress import Progress
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.workers import Beat, each_shard


@dataclass(frozen=True)
class TokenJob:
    """One token file to check. `index` is its image shard's index, or the file's own path where no images are given."""

    folder: Path
    entry: TokenShard
    shape: tuple[int, int, int]
    vocabulary: int
    images: Path
    paired: bool


def verify_tokens(folder: Path, images: Path, paired: bool, num_workers: int, report: Report) -> TokenManifest:
    """Check a token shard set, telling `report` every finding, one line each; its manifest.

    `paired`: also check it against the image set in `images`. Raises ShardError when there is no set to check.
    """
    manifest = read_token_manifest(folder)
    rows, columns = manifest.tokenizer["grid"]
    if paired:
        try:
            check_pairing(ImageSet(images).manifest, manifest, folder)
        except ShardError as error:
            report(str(error))
    jobs = [
        TokenJob(
            folder,
            entry,
            (manifest.num_views, entry.samples, rows * columns),
            manifest.tokenizer["vocabulary"],
            images,
            paired,
        )
        for entry in manifest.shards
    ]
    with (
        Progress("verify", len(jobs), "shards") as progress,
        contextlib.closing(each_shard(check_token_shard, jobs, min(num_workers, len(jobs)), progress)) as results,
    ):
        for findings in results:
            for finding in findings:
                report(finding)
    for finding in check_columns(folder, "tokens"):
        report(finding)
    return manifest


def check_token_shard(job: TokenJob, beat: Beat) -> list[str]:
    """Every finding in one token file."""
    path = token_path(job.folder, job.entry.name)
    beat(1)
    try:
        shard = open_token_shard(path)
    except ShardError as error:
        return [str(error)]
    findings = []
    if shard.file.digest != job.entry.digest:
        findings.append(f"{path} is not the file the manifest lists (digest differs): tokenize it again")
    if shard.shape != job.shape:
        return [*findings, f"{path} holds tokens of shape {shard.shape}, the manifest says {job.shape}"]
    findings += [f"{path}: {finding}" for finding in _check_values(shard, job.vocabulary)]
    if job.paired:
        findings += _check_pair(path, shard, index_path(job.images, job.entry.name))
    return findings


def _check_values(shard: OpenTokenShard, vocabulary: int) -> list[str]:
    """Values that no tokenizer and no view policy gives. Rows marked bad are zeros and not looked at."""
    bad, views = shard.bad, shard.views
    good = bad == 0
    checks = (
        (f"tokens of {vocabulary} or more, the vocabulary's size", shard.tokens >= vocabulary),
        ("crop boxes without area", views.boxes[:, good, 2:] == 0),
        ("flips other than 0 and 1", views.flips > 1),
        ("lowest levels above the highest", views.levels[..., :1] > views.levels[..., 1:2]),
        (f"jitter orders of {len(JITTER_ORDERS)} or more", views.orders >= len(JITTER_ORDERS)),
        ("jitter factors that are negative or not finite", ~(np.isfinite(views.jitters) & (views.jitters >= 0))),
        ("marks for bad rows other than 0 and 1", bad > 1),
    )
    return [f"{int(wrong.sum())} {what}" for what, wrong in checks if wrong.any()]


def _check_pair(path: Path, shard: OpenTokenShard, index_file: Path) -> list[str]:
    """The rows against those of the image shard: the same images, every box inside its image."""
    try:
        index = open_index(index_file)
        check_rows(str(path), shard.keys, index.key_hash)
    except ShardError as error:
        return [str(error)]
    return _check_boxes(path, shard, index)


def _check_boxes(path: Path, shard: OpenTokenShard, index: Index) -> list[str]:
    boxes = shard.views.boxes.astype(np.int64)
    right, bottom = boxes[:, :, 0] + boxes[:, :, 2], boxes[:, :, 1] + boxes[:, :, 3]
    widths, heights = index.width, index.height
    looked = ((index.flags & FLAG_BAD) == 0) & (shard.bad == 0)  # the others have no size, or no view
    outside = ((right > widths) | (bottom > heights)) & looked
    return [
        f"{path}: view {view} of row {row} ({index.key(row)}) has the box {boxes[view, row].tolist()} (x, y, width, "
        f"height), outside its image of {widths[row]}x{heights[row]}"
        for view, row in np.argwhere(outside).tolist()
    ]
