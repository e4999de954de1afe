"""Check every byte of an image shard set against its manifest and indexes. Finds everything, repairs nothing."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards.counter_rng import hash_key
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_LABELLED, Index, index_path, open_index
from beitforge.shards.format.manifest import ImageManifest, ImageShard, read_image_manifest
from beitforge.shards.pack.adopt import find_twins
from beitforge.shards.pack.tar_scan import (
    JSON,
    LABEL,
    Sample,
    TarMember,
    describe,
    read_label,
    read_member,
    read_samples,
)
from beitforge.shards.progress import Progress
from beitforge.shards.storage.files import file_digest
from beitforge.shards.workers import Beat, each_shard, in_megabytes

Report = Callable[[str], None]


@dataclass(frozen=True)
class CheckJob:
    """One image shard to check; `decode` also decodes every image."""

    folder: Path
    entry: ImageShard
    decode: bool


def verify_images(folder: Path, decode: bool, num_workers: int, report: Report) -> ImageManifest:
    """Check an image shard set, telling `report` every finding, one line each; its manifest.

    Raises ShardError when there is no set to check (no manifest, or a damaged one).
    """
    manifest = read_image_manifest(folder)
    jobs = [CheckJob(folder, entry, decode) for entry in manifest.shards]
    megabytes = sum(entry.bytes >> 20 for entry in manifest.shards)
    with (
        Progress("verify", megabytes, "MB") as progress,
        contextlib.closing(each_shard(check_shard, jobs, min(num_workers, len(jobs)), progress)) as results,
    ):
        for findings in results:
            for finding in findings:
                report(finding)
    for finding in _check_set(folder, manifest):
        report(finding)
    return manifest


def _check_set(folder: Path, manifest: ImageManifest) -> Iterator[str]:
    """What no single shard shows: tars outside the manifest, keys used twice."""
    listed = {f"{entry.name}.tar" for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path} is not in the manifest, but a reader of *.tar would read it: move it away, or run `index`"
    indexes = []
    for entry in manifest.shards:
        with contextlib.suppress(ShardError):
            indexes.append(open_index(index_path(folder, entry.name)))
    if indexes:
        yield from (f"{folder}: {twins}" for twins in find_twins(indexes))


def check_shard(job: CheckJob, beat: Beat) -> list[str]:
    """Every finding in one tar and its index."""
    entry, tar = job.entry, job.folder / f"{job.entry.name}.tar"
    beside = index_path(job.folder, entry.name)
    findings: list[str] = []
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
            return [*findings, str(error)]
        if file_digest(beside) != entry.index_digest:
            findings.append(f"{beside} is not the index the manifest lists (digest differs): run `index`")
        if len(index) != entry.samples:
            findings.append(f"{beside} has {len(index)} rows, the manifest says {entry.samples}: run `index`")
        if tar.is_file():
            findings += _check_layout(tar, index)
            findings += _check_images(tar, index, job.decode, tell)
    return findings


def _check_layout(tar: Path, index: Index) -> list[str]:
    """The tar's headers against the index: the same samples in the same order at the same places."""
    try:
        samples = read_samples(tar)
    except ShardError as error:
        return [str(error)]
    findings = []
    if len(samples) != len(index):
        findings.append(f"{tar} holds {len(samples)} samples, its index {len(index)} rows")
    with open(tar, "rb") as file:
        for row, sample in enumerate(samples[: len(index)]):
            difference = _difference(sample, index, row, file.fileno(), tar)
            if difference:
                findings.append(f"{tar} row {row} ({index.key(row)}): {difference}")
    return findings


def _difference(sample: Sample, index: Index, row: int, descriptor: int, tar: Path) -> str:
    """How a sample of the tar differs from its row, the image itself apart; "" where it does not."""
    if sample.key != index.key(row) or hash_key(sample.key) != int(index.key_hash[row]):
        return f"the tar has the key {sample.key} there"
    nowhere = TarMember(0, 0)
    places = {"label": sample.members.get(LABEL, nowhere), "json": sample.members.get(JSON, nowhere)}
    for member, place in {"image": sample.image, **places}.items():
        listed = TarMember(int(index.columns[f"{member}_offset"][row]), int(index.columns[f"{member}_size"][row]))
        if place != listed:
            return f"its {member} lies at {place} in the tar, the index says {listed}"
    if (LABEL in sample.members) != bool(int(index.flags[row]) & FLAG_LABELLED):
        return "the index disagrees with the tar on whether it has a label"
    if LABEL not in sample.members:
        return ""
    try:
        label = read_label(read_member(descriptor, sample.members[LABEL], tar), f"{tar}: sample {sample.key}")
    except ShardError as error:
        return str(error)
    return "" if label == int(index.label[row]) else f"its label is {label}, the index says {int(index.label[row])}"


def _check_images(tar: Path, index: Index, decode: bool, tell: Beat) -> list[str]:
    """Every image's bytes against the checksum of its row, and decoded, against the row's other facts."""
    findings = []
    with open(tar, "rb") as file:
        for row in range(len(index)):
            place = TarMember(int(index.image_offset[row]), int(index.image_size[row]))
            where = f"{tar} row {row} ({index.key(row)})"
            try:
                data = read_member(file.fileno(), place, tar)
            except ShardError as error:
                findings.append(f"{where}: {error}")
                continue
            if xxhash.xxh3_64_intdigest(data) != int(index.image_xxh3[row]):
                findings.append(f"{where}: the image's bytes are not what was packed (checksum differs)")
            elif decode and (difference := _decoded_difference(data, index, row)):
                findings.append(f"{where}: {difference}")
            tell(place.size)
    return findings


def _decoded_difference(data: bytes, index: Index, row: int) -> str:
    facts = describe(data)
    listed = int(index.flags[row]) & ~FLAG_LABELLED
    for name, found, expected in (
        ("flags", facts.flags, listed),
        ("width", facts.width, int(index.width[row])),
        ("height", facts.height, int(index.height[row])),
        ("mean grey", np.float32(facts.mean_grey), index.mean_grey[row]),
    ):
        if found != expected:
            return f"decoded here its {name} is {found}, the index says {expected}: run `index`, or check the decoder"
    return ""
