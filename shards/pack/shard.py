"""One shard of a packing: written by a worker, recognised again by a later run."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from beitforge.shards.decode.codec import ImageError
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import IndexRow, index_path, open_index, write_index
from beitforge.shards.format.manifest import ImageShard
from beitforge.shards.pack.encode import encode, read_file
from beitforge.shards.pack.plan import ShardJob, ShardPlace
from beitforge.shards.pack.tar_scan import Sample, index_row
from beitforge.shards.pack.tar_writing import SampleWriter
from beitforge.shards.storage.files import atomic_path
from beitforge.shards.workers import Beat

_BUFFER = 1 << 20  # bytes that go to the disk in one call
_SHOWN = 3


class TooManyRejected(ShardError):
    """More images cannot be used than the limit allows; `rejected` has those known, each {path, reason}."""

    def __init__(self, message: str, rejected: list[dict]):
        super().__init__(message, rejected)
        self.rejected = rejected

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class PackedShard:
    """A finished shard: its folder, its manifest entry, the images left out of it, each {path, reason}, and how many of
    the others were converted, by kind."""

    folder: Path
    entry: ImageShard
    rejected: list[dict]
    conversions: dict[str, int] = field(default_factory=dict)


def check_rejected(rejected: list[dict], limit: int) -> None:
    """Raises TooManyRejected past the limit."""
    if len(rejected) > limit:
        first = "; ".join(f"{row['path']}: {row['reason']}" for row in rejected[:_SHOWN])
        raise TooManyRejected(
            f"more than {limit} images cannot be used ({first}; …): repair or remove them (rejected.jsonl lists those "
            "found so far), or allow more with --max-rejected and run the same command again",
            rejected,
        )


def pack_shard(job: ShardJob, beat: Beat) -> PackedShard:
    """Write one tar, then its index. A shard all of whose images are rejected leaves an index of no rows, no tar.

    Raises TooManyRejected when this shard alone passes the limit, OSError when the disk fails.
    """
    tar = job.folder / f"{job.name}.tar"
    rejected: list[dict] = []
    conversions: Counter[str] = Counter()
    with atomic_path(tar) as partial:
        with open(partial, "wb", buffering=_BUFFER) as file, SampleWriter(file) as writer:
            rows = _write_samples(writer, job, rejected, conversions, beat)
        metadata = {"plan": job.plan, "tar_bytes": str(writer.size), "tar_digest": writer.digest}
    if not rows:
        tar.unlink()
    metadata |= {"rejected": json.dumps(rejected), "conversions": json.dumps(conversions)}
    write_index(index_path(job.folder, job.name), rows, metadata)
    shard = finished_shard(job)
    assert shard is not None, f"{tar} was just finished"
    return shard


def _write_samples(
    writer: SampleWriter, job: ShardJob, rejected: list[dict], conversions: Counter[str], beat: Beat
) -> list[IndexRow]:
    """Write the images that can be used, in the job's order; their rows. Their conversions are counted, the other
    images added to `rejected`."""
    rows = []
    for image in job.planned:
        try:
            prepared = encode(read_file(job.images / image.path), job.options)
        except ImageError as error:
            rejected.append({"path": image.path, "reason": str(error)})
            check_rejected(rejected, job.max_rejected)
            continue
        finally:
            beat(1)
        about = {"source": image.path, "width": prepared.facts.width, "height": prepared.facts.height}
        members = {prepared.extension: prepared.data, "json": json.dumps(about).encode()}
        if image.label >= 0:
            members["cls"] = str(image.label).encode()
        places = writer.write(image.key, members)
        sample = Sample(image.key, places, places[prepared.extension])
        rows.append(index_row(sample, prepared.facts, image.label))
        conversions.update(prepared.conversions)
    return rows


def finished_shard(job: ShardPlace) -> PackedShard | None:
    """The shard as this or an earlier run of the same plan finished it, or None."""
    path, tar = index_path(job.folder, job.name), job.folder / f"{job.name}.tar"
    try:
        index = open_index(path)
    except ShardError:
        return None
    metadata = index.metadata
    if metadata.get("plan") != job.plan or not index.whole:
        return None
    size = int(metadata["tar_bytes"])
    if len(index) and not (tar.is_file() and tar.stat().st_size == size):
        return None
    entry = ImageShard(
        name=job.name,
        samples=len(index),
        bytes=size,
        digest=metadata["tar_digest"],
        index_digest=index.digest,
        checks_digest=index.checks_digest,
    )
    return PackedShard(
        job.folder, entry, json.loads(metadata["rejected"]), json.loads(metadata.get("conversions", "{}"))
    )
