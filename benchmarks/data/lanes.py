"""What do ranks fetch, and how often do all nodes read the set?"""

import os
import subprocess
import sys
import time

import numpy as np

from beitforge.shards.inspect.simulate import Simulated, simulate
from beitforge.shards.lanes import suiting_lanes
from beitforge.shards.stream.order import Chunks, Order, OrderPolicy
from benchmarks.results import write

RANKS, PER_NODE, SHARDS, PER_SHARD, WINDOWS = (8, 24, 48, 96, 384, 512, 4096), 8, 1281, 1000, 2
BILLION = 10**9


def main() -> None:
    """For each number of ranks, nodes of eight: ImageNet-1k's shards for what is fetched, a billion samples for what it
    costs to say so."""
    rows = []
    for ranks in RANKS:
        suiting = suiting_lanes(OrderPolicy().lanes, ranks, PER_NODE)
        seconds, memory = billion(ranks, suiting)
        rows.append(
            {
                "ranks": ranks,
                "fetched / read by a rank, 256 lanes": fetched_over_read(ranks, 256),
                "read by all nodes, times the set, 256 lanes": times(ranks, 256),
                "lanes that suit": suiting,
                "fetched / read by a rank": fetched_over_read(ranks, suiting),
                "read by all nodes, times the set": times(ranks, suiting),
                "simulate, 10⁹ samples, CPU s": seconds,
                "MB": memory,
            }
        )
    order, ratios = Order([10_007] * 100_000, OrderPolicy()), {}
    for count in (1, 256, 16_384):
        ratios[f"next use of {count} chunks of 10⁹ samples, µs a chunk"] = next_use(order, count)
    note = (
        "Fetched: chunks that look-ahead names. Read: chunks that the rank's samples lie in. The order is the same for "
    )
    note += "any number of ranks; loader.lanes is part of it, so that a run keeps what it began with."
    question = "what do ranks fetch ahead, and how often do all nodes together read the set?"
    write("lanes", question, rows, ratios, [note])


def fetched_over_read(ranks: int, lanes: int) -> float:
    """Of three ranks over two windows of two epochs; what the window before had is there. Refuses a look-ahead that
    leaves out what is read."""
    order, fetched, read = Order([PER_SHARD] * SHARDS, OrderPolicy(lanes=lanes)), 0, 0
    for sample in (0, 5 * order.samples):
        for rank in {0, ranks // 3, ranks - 1}:
            told, before = order.ahead(sample, rank, ranks), (np.zeros(0, np.int64), np.zeros(0, np.int64))
            begin, chunks = next(told)
            for _ in range(WINDOWS):
                then, following = next(told)
                _, shards, rows = order.locate(np.arange(begin + (rank - begin) % ranks, then, ranks))
                needed = np.unique(shards * PER_SHARD + rows // order.policy.chunk)
                named = chunks.shards * PER_SHARD + chunks.numbers
                assert np.isin(needed, named).all(), "look-ahead leaves out what is read"
                fetched += np.setdiff1d(named, before[0]).size
                read += np.setdiff1d(needed, before[1]).size
                begin, chunks, before = then, following, (named, needed)
    return fetched / read


def times(ranks: int, lanes: int) -> float:
    asked = Simulated(
        samples=SHARDS * PER_SHARD,
        samples_per_shard=PER_SHARD,
        ranks=ranks,
        global_batch=ranks,
        order=OrderPolicy(lanes=lanes),
    )
    return simulate(asked, everything=False, quiet=True)["read by all nodes, times the set"]


def billion(ranks: int, lanes: int) -> tuple[float, float]:
    """CPU seconds and MB of `simulate --samples 1_000_000_000`."""
    words = ["--samples", str(BILLION), "--ranks", str(ranks), "--global-batch", str(ranks), "--lanes", str(lanes)]
    command = [sys.executable, "-m", "beitforge", "simulate", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, "simulate fails"
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def next_use(order: Order, count: int) -> float:
    places = np.arange(count, dtype=np.int64)
    chunks = Chunks(places * 7919 % 100_000, places * 31 % 150)
    order.next_use(chunks, BILLION // 2, range(8, 16), 512)
    turns = max(1, 2000 // count)
    started = time.process_time()
    for _ in range(turns):
        order.next_use(chunks, BILLION // 2, range(8, 16), 512)
    return 1e6 * (time.process_time() - started) / turns / count


if __name__ == "__main__":
    main()
