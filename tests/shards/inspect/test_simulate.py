"""The simulation says what is so: against sets walked by hand, and by a tar's worth of arithmetic at a billion."""

import json
import subprocess
import sys

import numpy as np
import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.inspect.simulate import Simulated, simulate
from beitforge.shards.stream import order as order_module
from beitforge.shards.stream.order import Order, OrderPolicy
from tests.conftest import ROOT

SMALL = Simulated(
    samples=5_000,
    samples_per_shard=100,
    ranks=4,
    ranks_per_node=2,
    global_batch=64,
    bytes_per_sample=1000,
    order=OrderPolicy(chunk=8, window=4, lanes=16),
)


def simulated(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "beitforge", "simulate", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def changed(**values) -> Simulated:
    return Simulated(**{**vars(SMALL), **values})


def test_a_small_set_walked_whole():
    found = simulate(SMALL, everything=False, quiet=True)
    assert found["positions walked"] == 5_000
    assert found["found"].startswith("all of an epoch")
    assert (found["shards"], found["nodes"], found["lanes of a rank"]) == (50, 2, 4)
    assert 0.7 < found["same-shard pairs of a batch, against a perfect permutation"] < 1.8


def test_what_a_node_reads_is_counted_by_hand():
    """The chunks of its ranks' samples, window by window, from the order itself."""
    found, order = simulate(SMALL, everything=False, quiet=True), Order(SMALL.shard_samples, SMALL.order)
    size = 8 * 4 * 16
    counts = []
    for window in range(4):
        positions = np.arange(window * size, (window + 1) * size)
        _, shards, rows = order.locate(positions[positions % 16 % 4 < 2])
        chunks = set(zip(shards.tolist(), (rows // 8).tolist(), strict=True))
        counts.append(sum(min(8, 100 - 8 * chunk) * 1000 for _, chunk in chunks))
    assert found["bytes of a window on a node"] == max(counts)
    assert found["bytes a node reads in an epoch"] == pytest.approx(np.mean(counts) * -(-5_000 // size), abs=1)
    assert 1.0 <= found["read by all nodes, times the set"] < 1.5


def test_lanes_that_do_not_divide_are_named():
    """Then every node reads everything."""
    found = simulate(changed(ranks=3, global_batch=63), everything=False, quiet=True)
    assert (found["lanes of a rank"], found["ranks that share them"]) == (16, 3)
    assert found["read by all nodes, times the set"] >= 1.9


@pytest.mark.parametrize(("ranks", "lanes", "sharing"), [(64, 1, 4), (24, 2, 3), (16, 1, 1)])
def test_more_ranks_than_lanes_share_them(ranks, lanes, sharing):
    """A node of two ranks then reads two ranks' lanes, and not all sixteen."""
    found = simulate(changed(ranks=ranks, global_batch=ranks), everything=False, quiet=True)
    assert (found["lanes of a rank"], found["ranks that share them"]) == (lanes, sharing)
    assert found["read by all nodes, times the set"] == pytest.approx(sharing, rel=0.6)


def test_a_broken_order_is_found(monkeypatch):
    """It would be no check if it could not fail."""
    real = order_module._Epoch.chunks

    def twice(self, sequence):
        chunks, within = real(self, sequence)
        return chunks - chunks % 2, within

    monkeypatch.setattr(order_module._Epoch, "chunks", twice)
    for everything in (True, False):
        with pytest.raises(ShardError, match="a defect"):
            simulate(SMALL, everything, quiet=True)


def test_a_billion_samples():
    """Stretches of it, in bounded memory: what the order holds is some bytes a shard."""
    asked = Simulated(samples=10**9, ranks=256, global_batch=4096)
    found = simulate(asked, everything=False, quiet=True)
    assert found["order, bytes a process"] < 32e6
    assert found["positions walked"] > 7 * 64 * 16 * 256
    assert found["found"].startswith("no sample twice")
    assert found["lanes of a rank"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--samples", "100", "--ranks", "3"], "a global batch of 2048 does not divide over 3 ranks"),
        (["--samples", "0"], "counted from 1"),
        (["--samples", "100", "--lanes", "0"], "--chunk, --window and --lanes must be at least 1"),
    ],
)
def test_a_cluster_that_cannot_be_is_one_line(words, says):
    done = subprocess.run(
        [sys.executable, "-m", "beitforge", "simulate", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_from_the_command_line():
    words = ["--samples", "14_200", "--samples-per-shard", "500", "--ranks", "8", "--lanes", "16", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "beitforge", "simulate", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["samples"] == 14_200
    assert done.returncode == 0
