"""Check every byte of an image shard set against its manifest and indexes. Finds everything, repairs nothing."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.errors import ShardError
from beitforge.shards.format.bad_rows import bad_rows
from beitforge.shards.format.index import COLUMNS, FLAG_LABELLED, Index, Row, count_regions, index_path, open_index
from beitforge.shards.format.manifest import ImageManifest, ImageShard, check_columns, read_image_manifest
from beitforge.shards.pack.adopt import find_twins, holds_nothing, tars_in
from beitforge.shards.pack.tar_members import TarMember
from beitforge.shards.pack.tar_scan import JSON, LABEL, LeftOut, Sample, describe, read_label, read_member, read_tar
from beitforge.shards.progress import Progress
from beitforge.shards.storage.reading import file_digest
from beitforge.shards.workers import Beat, each_shard, in_megabytes

Report = Callable[[str], None]


@dataclass(frozen=True)
class CheckJob:
    """One image shard to check; `decode` also decodes every image."""

    folder: Path
    entry: ImageShard
    decode: bool


@dataclass(frozen=True)
class Checked:
    """What a check of one tar, or of all, found: what is not as it was indexed, and what was known then: a line for
    each image that does not decode, what the tars hold beside samples, and how many images have fast regions."""

    findings: list[str]
    bad: list[str]
    left_out: LeftOut
    regions: int = 0


@dataclass(frozen=True)
class Verified:
    """What a set holds, and what was known of it when it was indexed (Checked)."""

    manifest: ImageManifest
    bad: list[str]
    left_out: LeftOut
    regions: int


def verify_images(folder: Path, decode: bool, num_workers: int, report: Report) -> Verified:
    """Check an image shard set, telling `report` every finding, one line each. What its indexes say themselves, that
    an image does not decode, is none.

    Raises ShardError when there is no set to check (no manifest, or a damaged one).
    """
    manifest = read_image_manifest(folder)
    jobs = [CheckJob(folder, entry, decode) for entry in manifest.shards]
    megabytes = int((manifest.column("bytes") >> 20).sum())
    bad: list[str] = []
    left_out, regions = LeftOut(), 0
    with (
        Progress("verify", megabytes, "MB") as progress,
        contextlib.closing(each_shard(check_shard, jobs, min(num_workers, len(jobs)), progress)) as results,
    ):
        for checked in results:
            for finding in checked.findings:
                report(finding)
            bad += checked.bad
            left_out.add_all(checked.left_out)
            regions += checked.regions
    for finding in (*check_columns(folder, "images"), *_check_set(folder, manifest)):
        report(finding)
    return Verified(manifest, sorted(bad), left_out, regions)


def _check_set(folder: Path, manifest: ImageManifest) -> Iterator[str]:
    """What no single shard shows: tars outside the manifest, keys used twice."""
    listed = {f"{entry.name}.tar" for entry in manifest.shards}
    for path in (path for path in tars_in(folder) if path.name not in listed):
        try:
            if holds_nothing(folder, path):
                continue
            what = "run `index`"
        except ShardError as error:
            what = str(error)
        yield f"{path} is not in the manifest, but a reader of *.tar would read it: move it away, or {what}"
    paths, key_hashes = [], []
    for path in (index_path(folder, entry.name) for entry in manifest.shards):
        with contextlib.suppress(ShardError):
            key_hashes.append(open_index(path).key_hash)
            paths.append(path)
    if paths:
        yield from (f"{folder}: {twins}" for twins in find_twins(paths, key_hashes))


def check_shard(job: CheckJob, beat: Beat) -> Checked:
    """Every finding in one tar and its index, and what was known."""
    entry, tar = job.entry, job.folder / f"{job.entry.name}.tar"
    beside = index_path(job.folder, entry.name)
    findings, known, left_out = [], [], LeftOut()
    with in_megabytes(beat, entry.bytes) as tell:
        if not tar.is_file():
            findings.append(f"{tar} is missing: restore it, or pack again")
        elif tar.stat().st_size != entry.bytes:
            findings.append(f"{tar} has {tar.stat().st_size} bytes, the manifest says {entry.bytes}")
        elif file_digest(tar) != entry.digest:
            findings.append(f"{tar} is not the tar the manifest lists (digest differs)")
        try:
            index = open_index(beside)
        except ShardError as error:
            return Checked([*findings, str(error)], [], left_out)
        if index.digest != entry.index_digest:
            findings.append(f"{beside} is not the index the manifest lists (digest differs): run `index`")
        elif entry.checks_digest not in ("", index.checks_digest) or not index.checks_hold:
            findings.append(f"{beside} has other checksums of itself than the manifest lists: run `index --again`")
        if len(index) != entry.samples:
            findings.append(f"{beside} has {len(index)} rows, the manifest says {entry.samples}: run `index`")
        try:
            known = [f"{entry.name} {bad.key}: {bad.reason}" for bad in bad_rows(index)]
            left_out.tell(index)
        except ShardError as error:
            findings.append(str(error))
        if tar.is_file():
            findings += _check_layout(tar, index)
            findings += _check_images(tar, index, job.decode, tell)
    return Checked(findings, known, left_out, count_regions(index.flags))


def _check_layout(tar: Path, index: Index) -> list[str]:
    """The tar's headers against the index: the same samples in the same order at the same places."""
    try:
        samples = read_tar(tar).samples
    except ShardError as error:
        return [str(error)]
    findings = []
    if len(samples) != len(index):
        findings.append(f"{tar} holds {len(samples)} samples, its index {len(index)} rows")
    columns = {name: getattr(index, name) for name in COLUMNS}
    with open(tar, "rb") as file:
        for row, sample in enumerate(samples[: len(index)]):
            key, facts = index.key(row), {name: column[row].item() for name, column in columns.items()}
            difference = _difference(sample, key, facts, file.fileno(), tar)
            if difference:
                findings.append(f"{tar} row {row} ({key}): {difference}")
    return findings


def _difference(sample: Sample, key: str, facts: dict[str, int], descriptor: int, tar: Path) -> str:
    """How a sample of the tar differs from its row, key and columns, the image itself apart; "" where it does not."""
    if sample.key != key or hash_key(sample.key) != facts["key_hash"]:
        return f"the tar has the key {sample.key} there"
    nowhere = TarMember(0, 0)
    places = {"label": sample.members.get(LABEL, nowhere), "json": sample.members.get(JSON, nowhere)}
    for member, place in {"image": sample.image, **places}.items():
        listed = TarMember(facts[f"{member}_offset"], facts[f"{member}_size"])
        if place != listed:
            return f"its {member} lies at {place} in the tar, the index says {listed}: run `index --again`"
    try:
        label = read_label(descriptor, sample, tar) if LABEL in sample.members else None
    except ShardError as error:
        return str(error)
    known = facts["label"] if facts["flags"] & FLAG_LABELLED else None
    return "" if label == known else f"its label is {_said(label)}, the index says {_said(known)}: run `index --again`"


def _said(label: int | None) -> str:
    return "none" if label is None else str(label)


def _check_images(tar: Path, index: Index, decode: bool, tell: Beat) -> list[str]:
    """Every image's bytes against the checksum of its row, and decoded, against the row's other facts."""
    findings = []
    tones = [tuple(table) for table in index.greys.tones.tolist()] if decode and index.has_tones else None
    with open(tar, "rb") as file:
        for row in range(len(index)):
            known = index.row(row)
            place = TarMember(known.image_offset, known.image_size)
            where = f"{tar} row {row} ({index.key(row)})"
            try:
                data = read_member(file.fileno(), place, tar)
            except ShardError as error:
                findings.append(f"{where}: {error}")
                continue
            if xxhash.xxh3_64_intdigest(data) != known.image_xxh3:
                findings.append(f"{where}: the image's bytes are not what was packed (checksum differs)")
            elif decode and (difference := _decoded_difference(data, known, tones[row] if tones else None)):
                findings.append(f"{where}: {difference}")
            tell(place.size)
    return findings


def _decoded_difference(data: bytes, known: Row, tones: tuple[int, ...] | None) -> str:
    facts = describe(data)
    listed = known.flags & ~FLAG_LABELLED
    for name, found, expected in (
        ("flags", facts.flags, listed),
        ("width", facts.width, known.width),
        ("height", facts.height, known.height),
        ("mean grey", np.float32(facts.mean_grey), np.float32(known.mean_grey)),
        ("tone table", facts.tones, facts.tones if tones is None else tones),
    ):
        if found != expected:
            cure = "run `index --again`, or check the decoder"
            return f"decoded here its {name} is {found}, the index says {expected}: {cure}"
    return ""
