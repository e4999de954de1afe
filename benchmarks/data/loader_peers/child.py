"""One loader in a process of its own: `python -m benchmarks.data.loader_peers.child NAME VARIANT CORE GIVEN`.

Answers on its stdout, a line each: at first with the file that its first batches are in; then, for every line
"WARM COUNT" on its stdin, with the CPU seconds that it and its workers spent on COUNT batches after WARM others.
"""

import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.data.loader_peers.given import BATCH, SIZE, read_given

SHOWN = 4  # batches


def session_seconds() -> float:
    """CPU time of every process of this session, in all of its threads."""
    spent, session = 0.0, os.getsid(0)
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            state = Path("/proc", name, "stat").read_text()
            if int(state.rpartition(")")[2].split()[3]) == session:
                spent += time.clock_gettime((~int(name) << 3) | 2)  # clock_getcpuclockid(3)
        except OSError:  # it has ended
            continue
    return spent


def measure(batches: Iterator, warm: int, count: int) -> dict[str, float]:
    """CPU and wall seconds of `count` batches."""
    for _ in range(warm):
        next(batches)
    spent, began = session_seconds(), time.perf_counter()
    for _ in range(count):
        next(batches)
    return {"cpu": session_seconds() - spent, "wall": time.perf_counter() - began}


def main(name: str, variant: str, core: str, given: str) -> None:
    """What the loader prints goes where its complaints go."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if core != "any":
        os.sched_setaffinity(0, {int(core)})
    path = importlib.import_module(f"benchmarks.data.loader_peers.{name}").open_path(read_given(Path(given)), variant)
    batches = iter(path.batches)
    file = None
    if path.shown:
        file = str(Path(given).with_name(f"{name}-{variant}.npz"))
        shown = [[array.copy() for array in path.shown(batch)] for batch in itertools.islice(batches, SHOWN)]
        pixels, numbers = (np.concatenate(arrays) for arrays in zip(*shown, strict=True))
        assert pixels.dtype == np.uint8 and pixels.shape == (SHOWN * BATCH, 3, SIZE, SIZE), (
            f"{pixels.dtype} {pixels.shape}"
        )
        np.savez(file, pixels=pixels, numbers=numbers)
    print(json.dumps({"batch": file}), file=answers)
    for line in sys.stdin:
        warm, count = map(int, line.split())
        print(json.dumps(measure(batches, warm, count)), file=answers)
    os._exit(0)  # its threads and workers end with the session


if __name__ == "__main__":
    main(*sys.argv[1:])
