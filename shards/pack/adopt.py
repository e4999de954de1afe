"""Foreign WebDataset tars become an image shard set where they lie: an index beside each, a manifest, nothing moved."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import (
    DIGEST,
    FLAG_BAD,
    FLAG_LABELLED,
    SUFFIX,
    Index,
    index_path,
    open_index,
    read_columns,
    write_index,
)
from beitforge.shards.format.manifest import (
    NAME,
    ImageManifest,
    ImageShard,
    is_file_name,
    read_image_manifest,
    refuse_other_manifest,
    write_manifest,
)
from beitforge.shards.pack.pack import MARKER
from beitforge.shards.pack.tar_scan import scan_tar
from beitforge.shards.progress import Progress
from beitforge.shards.storage.files import sweep_partials
from beitforge.shards.storage.reading import file_digest
from beitforge.shards.storage.staging import leftovers, refuse_other_file
from beitforge.shards.workers import Beat, each_shard, in_megabytes

_SHOWN = 10
_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class ScanJob:
    """One tar to index. `index_digest` is what an earlier manifest says of its index, "" where there is none."""

    folder: Path
    name: str
    index_digest: str

    @property
    def tar(self) -> Path:
        return self.folder / f"{self.name}.tar"


@dataclass(frozen=True)
class Indexed:
    """One tar's manifest entry, and whether its index was there already."""

    entry: ImageShard
    kept: bool


@dataclass(frozen=True)
class Adopted:
    """What `adopt` found. `kept` counts tars whose index was already right, `empty` names tars without any sample."""

    manifest: ImageManifest
    kept: int
    num_bad: int
    empty: list[str]


def adopt(folder: Path, num_workers: int) -> Adopted:
    """Index every `*.tar` in `folder` and write the manifest. A tar whose index fits it is not scanned again.

    Raises ShardError for a damaged tar, for a key (or its 64-bit hash) that occurs twice in the set, and when the
    folder holds no tar, no sample, or an unfinished packing.
    """
    refuse_other_manifest(folder)
    before = _manifest_before(folder)
    jobs = _jobs(folder, before)
    sweep_partials(leftovers(folder))
    megabytes = sum(job.tar.stat().st_size >> 20 for job in jobs)
    results: list[Indexed] = []
    with (
        Progress("index", megabytes, "MB") as progress,
        contextlib.closing(each_shard(index_tar, jobs, min(num_workers, len(jobs)), progress)) as indexed,
    ):
        results.extend(indexed)
    entries = sorted((result.entry for result in results), key=lambda entry: entry.name)
    shards = [entry for entry in entries if entry.samples]
    if not shards:
        raise ShardError(f"the {len(jobs)} tars in {folder} hold no sample: give the folder of an image set")
    paths = [index_path(folder, entry.name) for entry in shards]
    columns = read_columns(paths, ("key_hash", "flags", "label"))
    twins = find_twins(paths, columns["key_hash"])
    flags = np.concatenate(columns["flags"])
    if twins:
        raise ShardError(f"{folder}: every sample must have a key of its own; {_first(twins)}: make the tars again")
    manifest = ImageManifest(
        shards=shards,
        classes=before.classes if before else _classes(flags, np.concatenate(columns["label"])),
        made_by=before.made_by if before else {"verb": "index"},
    )
    write_manifest(folder, manifest)
    return Adopted(
        manifest,
        kept=sum(result.kept for result in results),
        num_bad=int(np.count_nonzero(flags & FLAG_BAD)),
        empty=[entry.name for entry in entries if not entry.samples],
    )


def _manifest_before(folder: Path) -> ImageManifest | None:
    """The manifest a folder already has, if it is a whole one; its class names are worth keeping."""
    if not (folder / NAME).exists():
        return None
    try:
        return read_image_manifest(folder)
    except ShardError:
        return None


def _jobs(folder: Path, before: ImageManifest | None) -> list[ScanJob]:
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder; give the folder that holds the tars")
    if (folder / MARKER).exists():
        raise ShardError(f"{folder} holds an unfinished packing: finish it with `pack` (the same command again)")
    digests = {shard.name: shard.index_digest for shard in before.shards} if before else {}
    names = sorted(path.stem for path in folder.glob("*.tar") if path.is_file())
    if not names:
        raise ShardError(f"{folder} holds no .tar: give the folder of the tars, or make some with `pack`")
    for name in names:
        if not is_file_name(name):
            raise ShardError(
                f"{folder}: no manifest can list {name}.tar: give it a shorter name, of printing characters"
            )
    for name in (name for name in names if name not in digests):
        refuse_other_file(index_path(folder, name), b'"image_xxh3"', b'"tar_digest"')
    return [ScanJob(folder, name, digests.get(name, "")) for name in names]


def index_tar(job: ScanJob, beat: Beat) -> Indexed:
    """Index one tar, unless its index fits it already and has all that one has today. Raises ShardError when the tar is
    damaged."""
    size, path = job.tar.stat().st_size, index_path(job.folder, job.name)
    digest = file_digest(job.tar)
    before = _made_from_it(path, digest, job.index_digest)
    kept = before is not None and before.has_tones
    with in_megabytes(beat, size) as tell:
        if not kept:
            made_by = {name: text for name, text in before.metadata.items() if name != DIGEST} if before else {}
            write_index(path, scan_tar(job.tar, tell), {**made_by, "tar_bytes": str(size), "tar_digest": digest})
    index = open_index(path)
    entry = ImageShard(name=job.name, samples=len(index), bytes=size, digest=digest, index_digest=index.digest)
    return Indexed(entry, kept)


def _made_from_it(path: Path, tar_digest: str, index_digest: str) -> Index | None:
    """The index that is there, if it is whole, made from this very tar, and the one an earlier manifest lists, if one
    does."""
    try:
        index = open_index(path)
    except ShardError:
        return None
    whole = index.whole and index.metadata.get("tar_digest") == tar_digest and index_digest in ("", index.digest)
    return index if whole else None


def find_twins(paths: list[Path], key_hashes: list[np.ndarray]) -> list[str]:
    """A line for every pair of samples of the set that share a key, or only its 64-bit hash. Given are the indexes and
    their column of that name."""
    hashes, ends = np.concatenate(key_hashes), np.cumsum([len(found) for found in key_hashes])
    order = np.argsort(hashes, kind="stable")
    lines = []
    for same in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        names, keys = [], []
        for sample in order[same : same + 2].tolist():
            shard = int(np.searchsorted(ends, sample, side="right"))
            row = sample - int(ends[shard - 1] if shard else 0)
            names.append(f"{paths[shard].name.removesuffix(SUFFIX)} row {row}")
            keys.append(open_index(paths[shard]).key(row))
        what = f"key {keys[0]}" if keys[0] == keys[1] else f"keys {keys[0]} and {keys[1]} with the same hash"
        lines.append(f"{what} in {names[0]} and {names[1]}")
    return lines


def _first(twins: list[str]) -> str:
    more = f"; and {len(twins) - _SHOWN} more" if len(twins) > _SHOWN else ""
    return f"{len(twins)} pairs do not: {'; '.join(twins[:_SHOWN])}{more}"


def _classes(flags: np.ndarray, labels: np.ndarray) -> list[str]:
    """The labels themselves as class names, 0 … largest; none unless every sample has a label from 0 on."""
    if not np.all(flags & FLAG_LABELLED) or labels.min() < 0 or labels.max() >= _MOST_CLASSES:
        return []
    return [str(label) for label in range(int(labels.max()) + 1)]
