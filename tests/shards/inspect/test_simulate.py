"""The simulation says what is so: against sets walked by hand, and by a tar's worth of arithmetic at a billion."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.inspect import simulate as simulate_module
from beitforge.shards.inspect.simulate import Simulated, simulate
from beitforge.shards.lanes import suiting_lanes, times_read, window_samples
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
    counts, new, before = [], [], set()
    for window in range(4):
        positions = np.arange(window * size, (window + 1) * size)
        _, shards, rows = order.locate(positions[positions % 16 % 4 < 2])
        chunks = set(zip(shards.tolist(), (rows // 8).tolist(), strict=True))
        counts.append(sum(min(8, 100 - 8 * chunk) * 1000 for _, chunk in chunks))
        new.append(sum(min(8, 100 - 8 * chunk) * 1000 for _, chunk in chunks - before))
        before = chunks
    assert found["bytes of a window on a node"] == max(counts)
    assert found["bytes a node reads in an epoch"] == pytest.approx(
        new[0] + np.mean(new[1:]) * (5_000 / size - 1), abs=1
    )
    assert 1.0 <= found["read by all nodes, times the set"] < 1.1


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


@pytest.mark.parametrize("ranks", [8, 24, 48, 96, 384, 512, 4096])
def test_suiting_lanes_have_the_set_read_once(ranks):
    """Of ImageNet-1k: by all nodes together at most 1.1 times, on as few lanes as that takes."""
    asked = Simulated(samples=1_281_167, samples_per_shard=1000, ranks=ranks, global_batch=ranks)
    suiting = suiting_lanes(256, ranks, 8)
    assert suiting % ranks == 0 and max(256, ranks) <= suiting < max(512, ranks + 1)
    found = reading(asked, OrderPolicy(lanes=suiting))
    assert 1.0 <= found["read by all nodes, times the set"] <= 1.1
    assert found["lanes that suit these ranks"] == suiting
    found = reading(asked, OrderPolicy())
    assert found["read by all nodes, times the set"] == pytest.approx(times_read(256, ranks, 8), rel=0.1)
    assert found["lanes that suit these ranks"] == suiting


@pytest.mark.parametrize(("ranks", "lanes"), [(8, 256), (24, 256), (24, 384), (4, 256), (512, 512), (1000, 1000)])
def test_the_cache_of_a_node_is_the_same_by_arithmetic(ranks, lanes):
    """What doctor compares data.cache_gb with, against the chunks of the windows themselves."""
    policy = OrderPolicy(lanes=lanes)
    asked = Simulated(samples=1_281_167, samples_per_shard=1000, ranks=ranks, global_batch=ranks)
    counted = reading(asked, policy)["cache that a node needs, bytes"]
    kept = window_samples(asked.samples, policy.chunk, policy.window, lanes, ranks, 8)
    assert counted == pytest.approx(2 * kept * asked.bytes_per_sample, rel=0.05)


def reading(asked: Simulated, policy: OrderPolicy) -> dict:
    """What the simulation says of a node, without the walk."""
    asked = dataclasses.replace(asked, order=policy)
    return simulate_module._reading(asked, Order(asked.shard_samples, policy))


@pytest.mark.parametrize(("lanes", "ranks", "per_node"), [(16, 12, 4), (48, 24, 8), (8, 12, 8), (16, 20, 3), (7, 9, 2)])
def test_what_all_nodes_read_is_counted(lanes, ranks, per_node):
    """Every node's chunks, window by window, over an epoch, against the arithmetic; with suiting lanes once."""
    for policy in (OrderPolicy(window=4, lanes=count) for count in (lanes, suiting_lanes(lanes, ranks, per_node))):
        order, fetched = Order([1000] * 100, policy), 0
        for first in range(0, ranks, per_node):
            walks = [order.ahead(0, rank, ranks) for rank in range(first, min(first + per_node, ranks))]
            before: set[tuple[int, int]] = set()
            while (steps := [next(walk) for walk in walks])[0][0] < order.samples:
                named = {place for _, chunks in steps for place in zip(*map(np.ndarray.tolist, chunks), strict=True)}
                fetched, before = fetched + len(named - before), named
        assert fetched / 1600 == pytest.approx(times_read(policy.lanes, ranks, per_node), rel=0.06)
    assert times_read(suiting_lanes(lanes, ranks, per_node), ranks, per_node) <= 1.1


def test_a_walk_takes_no_more_at_once_on_more_lanes(monkeypatch):
    """However many samples a window of all lanes has: as many positions at a time, at eight places of an epoch."""
    asked, located = [], Order.locate
    monkeypatch.setattr(simulate_module, "_STRETCH", 2**12)
    monkeypatch.setattr(Order, "locate", lambda order, samples: asked.append(len(samples)) or located(order, samples))
    for lanes in (16, 512):
        large = changed(samples=10**6, order=OrderPolicy(chunk=8, window=4, lanes=lanes))
        order = Order(large.shard_samples, large.order)
        assert simulate_module._walk(large, order, False, True)["positions walked"] == sum(asked)
        assert len(asked) == 8
        assert max(asked) == min(2**12, 8 * 4 * lanes)
        asked.clear()


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
