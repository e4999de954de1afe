"""What opening a set costs each process, by its number of shards; and opening one shard's index, by its rows."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from beitforge.shards.format import columns
from beitforge.shards.format.index import Index, IndexRow, index_path, write_index
from beitforge.shards.format.manifest import (
    ImageManifest,
    ImageShard,
    TokenManifest,
    TokenShard,
    read_image_manifest,
    write_manifest,
)
from beitforge.shards.storage.tensors import TensorFile
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.order import Order, OrderPolicy
from beitforge.shards.stream.view_sources import RecordedViews
from benchmarks.results import write

SHARDS = (1000, 10_000, 100_000)
ROWS = (1000, 10_000)
ROUNDS = 7
_OPENED = 200  # times an index is opened in a row
_IDENTITY = {"fingerprint": "f" * 32, "vocabulary": 8192, "grid": [14, 14]}


def listed(count: int) -> tuple[ImageManifest, TokenManifest]:
    """An image set and a token set that list `count` shards of about 10,000 samples; digests drawn by a fixed seed."""
    digits = np.random.default_rng(0).bytes(16 * 5 * count).hex()
    drawn = (digits[at : at + 32] for at in range(0, len(digits), 32))
    images, tokens = [], []
    for number in range(count):
        name, samples = f"shard-{number:06d}", 9990 + number % 20
        digests = {"digest": next(drawn), "index_digest": next(drawn), "checks_digest": next(drawn)}
        images.append(ImageShard(name=name, samples=samples, bytes=10**9 + number, **digests))
        made = {"digest": next(drawn), "image_digest": digests["digest"], "checks_digest": next(drawn)}
        tokens.append(TokenShard(name=name, samples=samples, **made))
    return (
        ImageManifest(shards=images, classes=[], made_by={"verb": "pack"}),
        TokenManifest(shards=tokens, tokenizer=_IDENTITY, policy={}, num_views=2, provenance={}),
    )


def private() -> float:
    """MB of this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) * 1024 / 1e6


def opened(folder: Path) -> list[float]:
    """CPU ms of the image set with its order, and of the token set with its pairing; MB of each; MB of a worker forked
    then, which looks at 1,000 shards. Fingerprints, which every run compares, are part of it."""
    before, started = private(), time.process_time()
    images = ImageSet(folder / "images")
    order = Order(images.manifest.counts, OrderPolicy())
    named = images.manifest.fingerprint
    between, halfway = private(), time.process_time()
    tokens = RecordedViews(images, folder / "tokens")
    named += tokens.tokens.manifest.fingerprint
    after, ended = private(), time.process_time()
    assert order.samples == tokens.tokens.manifest.samples and len(named) == 64
    reading, writing = os.pipe()
    if not (child := os.fork()):
        count = len(images.manifest.shards)
        inherited = private()
        for number in range(0, count, max(1, count // 1000)):
            assert images.manifest.shards[number].name == tokens.tokens.manifest.shards[number].name
        os.write(writing, str(private() - inherited).encode())
        os._exit(0)
    os.waitpid(child, 0)
    worker = float(os.read(reading, 64))
    return [1e3 * (halfway - started), 1e3 * (ended - halfway), between - before, after - between, worker]


def by_shards(folder: Path, rounds: int) -> tuple[list[dict], dict[str, float]]:
    """With and without manifest.columns in turn, each time in a process of its own."""
    rows, ratios = [], {}
    for count in SHARDS:
        images, tokens = listed(count)
        found: dict[str, list[list[float]]] = {"manifest.json": [], "columns": []}
        for way in found:
            where = folder / way / str(count)
            for name, manifest in (("images", images), ("tokens", tokens)):
                (where / name).mkdir(parents=True)
                write_manifest(where / name, manifest)
                if way == "manifest.json":
                    (where / name / columns.NAME).unlink()
        assert read_image_manifest(folder / "columns" / str(count) / "images").fingerprint == images.fingerprint
        for turn in range(rounds + 1):  # the first round warms the page cache
            for way, results in found.items():
                command = [sys.executable, "-m", "benchmarks.data.opening", str(folder / way / str(count))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results += [[float(word) for word in done.stdout.split()]] if turn else []
        for at, kind in enumerate(("images, order", "tokens, pairing")):
            row: dict = {"opening": f"{count:,} shards: {kind}"}
            for way, results in found.items():
                row[f"{way} CPU ms"] = statistics.median(result[at] for result in results)
                row[f"{way} MB"] = statistics.median(result[2 + at] for result in results)
            row["worker MB"] = statistics.median(result[4] for result in found["columns"])
            rows.append(row)
        ms = {way: [sum(result[:2]) for result in results] for way, results in found.items()}
        pairs = zip(ms["columns"], ms["manifest.json"], strict=True)
        ratios[f"CPU, columns / manifest.json, {count:,} shards"] = statistics.median(a / b for a, b in pairs)
    return rows, ratios


def an_index(folder: Path, count: int) -> tuple[Path, str]:
    """An index of `count` rows, and what a manifest lists of its checksums."""
    row = IndexRow(
        key="", key_hash=1, image_offset=0, image_size=512, image_xxh3=7, width=9, height=9, mean_grey=1.0, flags=1
    )
    path = index_path(folder, f"rows-{count}")
    rows = [replace(row, key=f"class-{n:05d}/image-{n:08d}", image_offset=1024 * n) for n in range(count)]
    write_index(path, rows, {"tar_bytes": str(1024 * count)})
    return path, Index(TensorFile(path)).checks_digest


def by_rows(folder: Path, rounds: int) -> tuple[list[dict], dict[str, float]]:
    """An index opened by its own checksums, and read through as those without any are; 64 rows are read."""
    rows, ratios = [], {}
    for count in ROWS:
        path, checks = an_index(folder, count)
        found: dict[str, list[float]] = {"": [], checks: []}
        size: dict[str, float] = {}
        for _ in range(rounds):
            for digest, times in found.items():
                started, read = time.process_time(), _bytes_read()
                for _ in range(_OPENED):
                    index = Index(TensorFile(path), digest)
                    index.check_places(1024 * count)
                    assert len(index.rows(64, 128)) == 64 and index.vouched == bool(digest)
                times.append(1e6 * (time.process_time() - started) / _OPENED)
                size[digest] = (_bytes_read() - read) / _OPENED / 1e3
        pairs = zip(found[checks], found[""], strict=True)
        ratios[f"CPU, by checksums / read through, {count:,} rows"] = statistics.median(a / b for a, b in pairs)
        rows.append(
            {
                "index of": f"{count:,} rows",
                "read through CPU µs": statistics.median(found[""]),
                "read through kB": size[""],
                "by its checksums CPU µs": statistics.median(found[checks]),
                "by its checksums kB": size[checks],
            }
        )
    return rows, ratios


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def main(dry: bool) -> None:
    rounds = 1 if dry else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        sets, ratios = by_shards(Path(folder), rounds)
        indexes, more = by_rows(Path(folder), rounds)
    ratios |= more
    if dry:
        print(*sets, *indexes, ratios, sep="\n")
        return
    note = (
        f"What every process of a node does before its first sample, {rounds} fresh processes each way in turn, page "
        "cache warm, medians. MB: memory of that process alone (Private of smaps_rollup) beyond what it had after its "
        "imports; what is read of manifest.columns stays in the page cache, which all processes share. worker: what a "
        "process forked then takes for itself, when it has looked at 1,000 shards of both sets. manifest.json: the "
        "same sets without manifest.columns, as earlier versions wrote them. "
    )
    note += "; ".join(
        f"opening an index of {row['index of']} and reading 64 takes {row['by its checksums CPU µs']:.0f} µs of CPU "
        f"and {row['by its checksums kB']:.0f} kB by its own checksums, {row['read through CPU µs']:.0f} µs and "
        f"{row['read through kB']:.0f} kB read through"
        for row in indexes
    )
    write("opening", "what does opening a set cost each process?", sets, ratios, [note[0].upper() + note[1:] + "."])


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] != "--dry":
        print(*opened(Path(sys.argv[1])))
    else:
        main("--dry" in sys.argv)
