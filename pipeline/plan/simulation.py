"""A training step as it passes: blocks computed while collectives run beside them, then many steps with ranks that are
late, a loader, checkpoints and failures. Discrete and deterministic: draws are named by (seed, step, rank).

Times in seconds. Must not know torch.
"""

import math
from dataclasses import dataclass

import numpy as np

from beitforge.pipeline.plan.failures import best_interval, daly, goodput, young
from beitforge.shards.counter_rng import TIMELINE, uniform


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One process's step. forward, backward: of a micro batch. gather, regather: all the weights fetched for either.
    reduce: of all gradients, in `buckets` pieces; every_turn: with each micro batch. end: what waits for the last."""

    blocks: int
    turns: int
    forward: float
    backward: float
    update: float
    gather: float = 0.0
    regather: float = 0.0
    reduce: float = 0.0
    buckets: int = 1
    every_turn: bool = False
    end: float = 0.0
    overlap: bool = False
    ahead: int = 1  # blocks whose weights are fetched before they are needed


@dataclass(frozen=True)
class Step:
    """seconds = compute + exposed; sent: time the network was busy."""

    seconds: float
    compute: float
    busy: float

    @property
    def exposed(self) -> float:
        return self.seconds - self.compute

    @property
    def hidden(self) -> float:
        """Share of the network's time that passed beside compute."""
        return 1 - min(1.0, max(0.0, self.exposed) / self.busy) if self.busy > 0 else 1.0


@dataclass
class _Streams:
    """Until when the chip and its network are busy."""

    chip: float = 0.0
    network: float = 0.0
    busy: float = 0.0

    def send(self, seconds: float, earliest: float) -> float:
        """One collective after another; returns when it is done."""
        self.network = max(self.network, earliest) + seconds
        self.busy += seconds
        return self.network


def simulate_step(work: StepWork) -> Step:
    """One step of a process whose peers keep its pace."""
    streams = _Streams()
    for turn in range(work.turns):
        _pass(work, streams, work.forward, work.gather)
        reduces = work.every_turn or turn == work.turns - 1
        _pass(work, streams, work.backward, work.regather, work.reduce if reduces else 0.0)
    streams.chip = max(streams.chip, streams.network)
    streams.chip += work.update
    if work.end:
        streams.chip = streams.send(work.end, streams.chip)
    compute = work.turns * (work.forward + work.backward) + work.update
    return Step(streams.chip, compute, streams.busy)


def _pass(work: StepWork, streams: _Streams, seconds: float, gather: float, reduce: float = 0.0) -> None:
    """Forward or backward through all blocks. What `ahead` blocks need is gathered at once, while those before are
    computed. Gradients are full after an even share of the blocks each."""
    begun = streams.chip
    sent = 0
    for block in range(work.blocks):
        if gather and block % work.ahead == 0:
            share = min(work.ahead, work.blocks - block) / work.blocks
            ready = streams.send(gather * share, begun if work.overlap else streams.chip)
            streams.chip = begun = max(streams.chip, ready)
        streams.chip += seconds / work.blocks
        full = (block + 1) * work.buckets // work.blocks
        if reduce and full > sent:
            ready = streams.send(reduce * (full - sent) / work.buckets, streams.chip)
            streams.chip = streams.chip if work.overlap else ready
            sent = full


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """All processes. load: seconds the loader of one takes for its part of a step; ready: steps it works ahead; cv: of
    step and of loading, between ranks and steps. save: a checkpoint's stall; restart, mtbf: of the whole machine."""

    ranks: int
    load: float
    ready: int
    straggler_cv: float
    loader_cv: float
    save: float
    save_every: float  # seconds of training between two
    restart: float
    mtbf: float


@dataclass(frozen=True)
class RunEstimate:
    """Mean seconds of a step, by what they go to, and shares of the time that become training."""

    step: float
    compute: float
    exposed: float
    late: float  # waiting for the slowest rank
    starved: float  # waiting for data
    running: float  # share of `compute` in a step's time
    survived: float  # share left by checkpoints, failures and restarts
    best_every: float  # seconds of training between checkpoints of the largest goodput
    best_survived: float
    young: float
    daly: float

    @property
    def goodput(self) -> float:
        return self.running * self.survived


def simulate(one: Step, cluster: Cluster, *, steps: int = 200, seed: int = 0) -> RunEstimate:
    """Walk `steps` steps of all ranks. A step ends for all when the slowest is through: its collectives bind them."""
    ends, late, starved = 0.0, 0.0, 0.0
    consumed = [np.zeros(cluster.ranks) for _ in range(max(1, cluster.ready))]
    ready = np.zeros(cluster.ranks)
    warm, counted_from = min(steps // 4, 2 * cluster.ready + 10), 0.0
    loads = cluster.load * varied(cluster.loader_cv, steps + warm, cluster.ranks, seed, 2)
    cv = cluster.straggler_cv if cluster.ranks > 1 else 0.0  # alone, it waits for nobody
    computes = one.compute * varied(cv, steps + warm, cluster.ranks, seed, 3)
    for number, (loading, computing) in enumerate(zip(loads, computes, strict=True)):
        if number == warm:
            counted_from, late, starved = ends, 0.0, 0.0
        slot = number % len(consumed)
        ready = np.maximum(ready, consumed[slot]) + loading
        begun = np.maximum(ends, ready)
        consumed[slot] = begun
        through = begun + computing + one.exposed
        last = float(through.max())
        without_wait = ends + float(computing.max()) + one.exposed
        starved += last - without_wait
        late += without_wait - ends - one.compute - one.exposed
        ends = last
    mean = (ends - counted_from) / steps
    lived = (cluster.save, cluster.restart, cluster.mtbf)
    best = best_interval(*lived)
    return RunEstimate(
        step=mean,
        compute=one.compute,
        exposed=one.exposed,
        late=late / steps,
        starved=starved / steps,
        running=min(1.0, one.compute / mean),
        survived=goodput(cluster.save_every, *lived),
        best_every=best,
        best_survived=goodput(best, *lived) if math.isfinite(best) else 1.0,
        young=young(cluster.save, cluster.mtbf),
        daly=daly(cluster.save, cluster.mtbf),
    )


def varied(cv: float, steps: int, ranks: int, seed: int, what: int) -> np.ndarray:
    """Log-normal factors [steps, ranks] with mean 1 and this coefficient of variation (Box and Muller 1958)."""
    if cv == 0:
        return np.ones((steps, ranks))
    names = (np.arange(steps, dtype=np.uint64)[:, None], np.arange(ranks, dtype=np.uint64))
    first, second = (uniform(TIMELINE, seed, what, half, *names) for half in range(2))
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    sigma = math.sqrt(math.log1p(cv * cv))
    return np.exp(sigma * normal - sigma * sigma / 2)


def all_reduce_seconds(message: float, world: int, per_node: int, intra: float, inter: float, latency: float) -> float:
    """Bandwidth and latency of a ring over a two-level network (α-β model; Thakur, Rabenseifner and Gropp,
    IJHPCA 19, 2005): each process sends 2 (n - 1) / n of the message as fast as its node lets all its rings out
    (`inter`, bytes/s of a node), or its neighbours in (`intra`, of a GPU). Latency as of a tree over nodes."""
    return 2 * half_seconds(message, world, per_node, intra, inter, latency)


def half_seconds(message: float, world: int, per_node: int, intra: float, inter: float, latency: float) -> float:
    """Of a reduce-scatter or an all-gather."""
    if world == 1:
        return 0.0
    nodes = -(-world // per_node)
    rate = intra if nodes == 1 else min(intra, inter) if world > nodes else inter
    hops = math.ceil(math.log2(nodes)) if nodes > 1 else 1
    return message * (world - 1) / world / rate + hops * latency
