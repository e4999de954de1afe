"""Foreign WebDataset tars become an image shard set where they lie: an index beside each, a manifest, nothing moved."""

import contextlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.format.bad_rows import bad_metadata, bad_rows
from beitforge.shards.format.index import (
    DIGEST,
    FLAG_BAD,
    FLAG_LABELLED,
    SUFFIX,
    Index,
    count_regions,
    index_path,
    open_index,
    read_columns,
    write_index,
)
from beitforge.shards.format.manifest import (
    BAD,
    NAME,
    ImageManifest,
    ImageShard,
    image_manifest_as_written,
    is_file_name,
    known_bad,
    read_image_manifest,
    refuse_other_manifest,
    write_manifest,
)
from beitforge.shards.pack.pack import MARKER, REJECTED
from beitforge.shards.pack.tar_scan import LeftOut, read_tar, scan_tar
from beitforge.shards.progress import Progress
from beitforge.shards.storage.files import sweep_partials, write_text
from beitforge.shards.storage.reading import file_digest, parse_json
from beitforge.shards.storage.staging import leftovers, refuse_other_file
from beitforge.shards.workers import Beat, each_shard, in_megabytes

_SHOWN = 10
_MOST_CLASSES = 100_000
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4", ".zip")
_OWN = {"shard", "key", "reason"}  # what a line of the list has that `index` wrote
_log = logging.getLogger(__name__)
_OF_TAR = ("tar_bytes", "tar_digest", "bad", "left_out", DIGEST)


@dataclass(frozen=True)
class ScanJob:
    """One tar to index. `index_digest` is what an earlier manifest says of its index, "" where there is none. again:
    whether to scan it even if its index fits."""

    folder: Path
    name: str
    index_digest: str
    again: bool

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
    """What `adopt` found. `kept` counts tars whose index was already right, `empty` names tars without any sample, and
    `bad_only` those none of whose images decodes. bad: every image that does not, {shard, key, reason}. regions: how
    many have fast regions. left_out: what of the tars belongs to no sample; passed_over: what of the folder is no tar
    that can be read, in words."""

    manifest: ImageManifest
    kept: int
    empty: list[str]
    bad_only: list[str]
    bad: list[dict[str, str]]
    regions: int
    left_out: LeftOut
    passed_over: list[str]

    @property
    def num_tars(self) -> int:
        return len(self.manifest.shards) + len(self.empty) + len(self.bad_only)

    @property
    def num_bad(self) -> int:
        """Images of the set that do not decode."""
        return known_bad(self.manifest) or 0


def adopt(folder: Path, num_workers: int, again: bool = False) -> Adopted:
    """Index every `*.tar` in `folder`, write the list of what does not decode, then the manifest. A tar whose index
    fits it is not scanned again, unless `again`.

    Raises ShardError for a damaged tar, for a key (or its 64-bit hash) that occurs twice in the set, and when the
    folder holds no tar, no image that decodes, or an unfinished packing, or cannot be written.
    """
    refuse_other_manifest(folder)
    before = _manifest_before(folder)
    jobs = _jobs(folder, before, again)
    _refuse_read_only(folder)
    sweep_partials(leftovers(folder))
    megabytes = sum(job.tar.stat().st_size >> 20 for job in jobs)
    results: list[Indexed] = []
    with (
        Progress("index", megabytes, "MB") as progress,
        contextlib.closing(each_shard(index_tar, jobs, min(num_workers, len(jobs)), progress)) as indexed,
    ):
        results.extend(indexed)
    entries = sorted((result.entry for result in results), key=lambda entry: entry.name)
    bad, left_out, bad_only = _told(folder, entries)
    _write_list(folder, bad)
    shards = [entry for entry in entries if entry.samples and entry.name not in bad_only]
    if not shards:
        raise ShardError(_nothing(folder, len(jobs), bad, left_out))
    paths = [index_path(folder, entry.name) for entry in shards]
    columns = read_columns(paths, ("key_hash", "flags", "label"))
    twins = find_twins(paths, columns["key_hash"])
    flags = np.concatenate(columns["flags"])
    if twins:
        raise ShardError(f"{folder}: every sample must have a key of its own; {_first(twins)}: make the tars again")
    num_bad = int(np.count_nonzero(flags & FLAG_BAD))
    manifest = ImageManifest(
        shards=shards,
        classes=before.classes if before else _classes(flags, np.concatenate(columns["label"])),
        made_by=_made_by(before, num_bad, left_out),
    )
    write_manifest(folder, manifest)
    return Adopted(
        manifest,
        kept=sum(result.kept for result in results),
        empty=[entry.name for entry in entries if not entry.samples],
        bad_only=sorted(bad_only),
        bad=bad,
        regions=count_regions(flags),
        left_out=left_out,
        passed_over=_passed_over(folder),
    )


def _told(folder: Path, entries: list[ImageShard]) -> tuple[list[dict[str, str]], LeftOut, set[str]]:
    """What the indexes say of all tars: the images that do not decode, what is left out, the tars of which no image
    decodes."""
    bad: list[dict[str, str]] = []
    left_out, bad_only = LeftOut(), set()
    for entry in entries:
        index = open_index(index_path(folder, entry.name))
        left_out.tell(index)
        rows = bad_rows(index)
        bad += [{"shard": entry.name, "key": row.key, "reason": row.reason} for row in rows]
        if rows and len(rows) == len(index):
            bad_only.add(entry.name)
    return bad, left_out, bad_only


def _nothing(folder: Path, num_tars: int, bad: list[dict[str, str]], left_out: LeftOut) -> str:
    """Why there is no set."""
    if bad:
        first = f"{bad[0]['shard']} {bad[0]['key']}: {bad[0]['reason']}"
        return (
            f"none of the {len(bad)} images in {folder} decodes ({first}): {REJECTED} lists them; make the tars again"
        )
    why = "; ".join(left_out.lines())
    return (
        f"the {num_tars} tars in {folder} hold no sample{f' ({why})' if why else ''}: give the folder of an image set"
    )


def _made_by(before: ImageManifest | None, num_bad: int, left_out: LeftOut) -> dict:
    """How the set came to be, with the number of its images that are known to be bad."""
    made_by = dict(before.made_by) if before else {"verb": "index"}
    if made_by.get("verb") == "index" or num_bad or BAD in made_by:
        made_by |= {BAD: num_bad, "left_out": left_out.counts}
    return made_by


def _write_list(folder: Path, bad: list[dict[str, str]]) -> None:
    """Make the list of rejected images say these, in shard and row order, of what `index` says there. Every other line,
    such as `pack` writes, stays."""
    path, kept = folder / REJECTED, []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                said = parse_json(line)
            except Damaged:
                said = None
            if line.strip() and not (isinstance(said, dict) and said.keys() == _OWN):
                kept.append(line.decode("utf-8", "replace"))
    lines = [*kept, *(json.dumps(row) for row in bad)]
    if lines:
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)


def _manifest_before(folder: Path) -> ImageManifest | None:
    """The manifest a folder already has, if it is a whole one, or as it was written; its class names are worth keeping.
    Says which of them are kept of one that is not whole."""
    if not (folder / NAME).exists():
        return None
    try:
        return read_image_manifest(folder)
    except ShardError:
        found = image_manifest_as_written(folder)
    if tars_in(folder):
        kept = "keeps the class names it had" if found else "cannot keep its class names"
        _log.warning(
            "%s is damaged, or was changed by hand (which asks for its digest to be removed): `index` writes it again, "
            "and %s",
            folder / NAME,
            kept,
        )
    return found


def tars_in(folder: Path) -> list[Path]:
    """The tars of a folder that belong to a set: what a shell's `*.tar` names, as far as they are files."""
    return [path for path in sorted(folder.glob("*.tar")) if path.is_file() and not path.name.startswith(".")]


def _passed_over(folder: Path) -> list[str]:
    """What of a folder looks like a tar of the set and is none, each with the reason."""
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        if name.endswith(_COMPRESSED):
            found.append(f"{path.name} is compressed: decompress it, images are read at their places in the tar")
        elif name.endswith(".tar") and path.name.startswith("."):
            found.append(f"{path.name} is a hidden file")
        elif name.endswith(".tar") and not path.is_file():
            what = "a link to nothing" if path.is_symlink() and not path.exists() else "no file"
            found.append(f"{path.name} is {what}")
        elif name.endswith(".tar") and not path.name.endswith(".tar"):
            found.append(f"{path.name} is no *.tar: rename it so that it ends in lower case")
    return found


def _jobs(folder: Path, before: ImageManifest | None, again: bool) -> list[ScanJob]:
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder; give the folder that holds the tars")
    if (folder / MARKER).exists():
        raise ShardError(f"{folder} holds an unfinished packing: finish it with `pack` (the same command again)")
    digests = {shard.name: shard.index_digest for shard in before.shards} if before else {}
    names = [path.stem for path in tars_in(folder)]
    if not names:
        raise ShardError(_no_tars(folder))
    for name in names:
        if not is_file_name(name):
            raise ShardError(
                f"{folder}: no manifest can list {name}.tar: give it a shorter name, of printing characters"
            )
    for name in (name for name in names if name not in digests):
        refuse_other_file(index_path(folder, name), b'"image_xxh3"', b'"tar_digest"')
    return [ScanJob(folder, name, digests.get(name, ""), again) for name in names]


def _no_tars(folder: Path) -> str:
    """Why a folder has no tar to index, and the cure."""
    passed_over = _passed_over(folder)
    if passed_over:
        more = f" (and {len(passed_over) - 1} more)" if len(passed_over) > 1 else ""
        return f"{folder} holds no .tar that can be read: {passed_over[0]}{more}"
    below = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    if below:
        return f"{folder} holds no .tar itself, but {', '.join(below[:_SHOWN])} in it do: give one of them"
    return f"{folder} holds no .tar: give the folder of the tars, or make some with `pack`"


def _refuse_read_only(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ShardError(
            f"{folder} cannot be written ({error.strerror}), and the indexes stand beside the tars: get the right to "
            f"write there, or fill a folder of your own with links (`ln -s {folder}/*.tar .`) and give that one"
        ) from error


def index_tar(job: ScanJob, beat: Beat) -> Indexed:
    """Index one tar, unless its index fits it already and has all that one has today. Raises ShardError when the tar is
    damaged."""
    size, path = job.tar.stat().st_size, index_path(job.folder, job.name)
    digest = file_digest(job.tar)
    before = _made_from(path, digest)
    listed = before is not None and job.index_digest in ("", before.digest)
    kept = before is not None and listed and before.has_tones and not job.again
    with in_megabytes(beat, size) as tell:
        if not kept:
            scanned = scan_tar(job.tar, tell)
            of_packing = {} if before is None else {n: v for n, v in before.metadata.items() if n not in _OF_TAR}
            found = {**bad_metadata(scanned.bad), **scanned.left_out.as_metadata()}
            write_index(path, scanned.rows, {**of_packing, "tar_bytes": str(size), "tar_digest": digest, **found})
    index = open_index(path)
    entry = ImageShard(
        name=job.name,
        samples=len(index),
        bytes=size,
        digest=digest,
        index_digest=index.digest,
        checks_digest=index.checks_digest,
    )
    return Indexed(entry, kept)


def _made_from(path: Path, tar_digest: str) -> Index | None:
    """The index at `path` if it is whole and made from the tar of this digest."""
    try:
        index = open_index(path)
    except ShardError:
        return None
    return index if index.whole and index.metadata.get("tar_digest") == tar_digest else None


def holds_nothing(folder: Path, tar: Path) -> bool:
    """Whether a tar that no manifest lists has no image for a set: no sample at all, or none that decodes by its index.
    Raises ShardError when it is damaged."""
    if not read_tar(tar).samples:
        return True
    index = _made_from(index_path(folder, tar.stem), file_digest(tar))
    return index is not None and bool(np.all(index.flags & FLAG_BAD))


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
