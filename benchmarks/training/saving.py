"""What do a checkpoint's digests cost: taken while it is written, and checked when it is read?"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from beitforge.shards.storage.reading import file_digest
from benchmarks.results import write

NUMBERS, TENSORS = 30_000_000, 150  # a third of a base encoder's
ROUNDS = 15
PLAIN, BARE, DIGEST = "torch.save, with its CRC-32", "without any checksum", "with the digest, taken on the way"
MEDIA = {"disk": None, "memory": "/dev/shm"}


def main() -> None:
    """Master weights and two moments in float32, as one process saves them; the ways of a round in turn, so that what
    else the machine does falls on all alike."""
    quiet_deepspeed()
    from beitforge.pipeline.distributed.file_writer import Writer, without_checksums

    share = NUMBERS // TENSORS
    state = {name: [torch.randn(share) for _ in range(TENSORS)] for name in ("fp32", "exp_avg", "exp_avg_sq")}
    writer = Writer()
    ways: dict[str, Callable[[Path], None]] = {
        PLAIN: lambda path: _plain(state, path),
        BARE: lambda path: _unchecked(state, path, without_checksums()),
        DIGEST: lambda path: writer.save(state, str(path)),
        "with the digest, of the file read again": lambda path: _read_again(state, path),
    }
    rows, ratios = [], {}
    for medium, where in MEDIA.items():
        with tempfile.TemporaryDirectory(dir=where) as folder:
            path = Path(folder) / "file.pt"
            clock: dict[str, list[float]] = {way: [] for way in ways}
            processor: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way, save in ways.items():
                    path.unlink(missing_ok=True)
                    wall, cpu = _seconds(save, path)
                    clock[way].append(wall)
                    processor[way].append(cpu)
            assert writer.wait() == "" and len(writer.take_written(Path(folder))) == 1
            gigabytes = path.stat().st_size / 1e9
            checked = min(_seconds(file_digest, path)[1] for _ in range(3))
        for way in ways:
            wall, cpu = min(clock[way]) / min(clock[PLAIN]), _median(processor[way]) / _median(processor[PLAIN])
            seconds = f"{min(clock[way]):.2f}", f"{_median(processor[way]):.3f}"
            row = {"written to": medium, "how": way, "seconds, the best": seconds[0], "of the processor": seconds[1]}
            rows.append({**row, "beside the first": f"{wall:.3f}", "of the processor beside the first": f"{cpu:.3f}"})
            if way == DIGEST:
                bare = min(clock[way]) / min(clock[BARE]), _median(processor[way]) / _median(processor[BARE])
                ratios[f"{medium}: seconds of a save with digests in those of torch.save"] = wall
                ratios[f"{medium}: in those without any checksum"] = bare[0]
                ratios[f"{medium}: processor seconds with digests in those without any checksum"] = bare[1]
        ratios[f"{medium}: GB a processor second of a check"] = gigabytes / checked
    notes = [
        f"{3 * NUMBERS / 1e6:.0f} million float32 numbers ({gigabytes:.2f} GB) in {3 * TENSORS} tensors, {ROUNDS} "
        "rounds in which the ways take turns, each with an fsync; the smallest of the seconds by the clock, the median "
        "of the processor's, which tell what a digest adds where others use the machine. Checkpoints are written in "
        "the third way: the digest takes the place of torch's CRC-32. The check reads the file from the page cache; "
        "the ranks of a run, and several threads of each, share it."
    ]
    write("saving", "what do a checkpoint's digests cost?", rows, ratios, notes)


def _plain(state: dict, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _unchecked(state: dict, path: Path, without_checksums: contextlib.AbstractContextManager) -> None:
    with without_checksums:
        _plain(state, path)


def _read_again(state: dict, path: Path) -> None:
    _plain(state, path)
    file_digest(path)


def _seconds(run: Callable[[Path], object], path: Path) -> tuple[float, float]:
    """By the clock, and of the processor."""
    started, before = time.perf_counter(), time.process_time()
    run(path)
    return time.perf_counter() - started, time.process_time() - before


def _median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
