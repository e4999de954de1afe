"""Does `plan` say what 1, 2 and 4 ranks really hold, send and take? On this machine's CPU, ZeRO 0 to 3.

The chip that the prediction is made for is measured by what a step is made of, not by steps: products of the model's
sizes, a block's other operations, AdamW, and an all-reduce, by all ranks at once. That is done between the steps that
are timed, so that whatever else runs on the machine slows down both alike.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn import functional as F

from beitforge.pipeline.config.settings import Config, Mask, Model, Tokenizer, Train
from beitforge.pipeline.plan.assumptions import Assumptions
from beitforge.pipeline.plan.costs import computed_flops, num_parameters
from beitforge.pipeline.plan.estimate import Machine, sharding_of, work_of
from beitforge.pipeline.plan.hardware import Chip, Network, Storage
from beitforge.pipeline.plan.simulation import Cluster, simulate, simulate_step
from beitforge.pipeline.plan.zero_model import exchanges, states
from benchmarks.results import write
from tests.pipeline.plan.plan_ranks import SHAPES, counting_world, measured

WORLDS = (1, 2, 4)
SHAPE, PRECISION = "small", "fp32"
STEPS, WARM = 18, 2
PARTS = ("parameters", "gradients", "optimizer")
_CALLS = 100
_SECONDS = 0.08  # of one probe between two steps


# glibc gives pieces of more than 32 MB back and asks for new pages at every use; a GPU's allocator keeps what it has
_KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


@dataclasses.dataclass(frozen=True)
class Probe:
    """Of one rank in the mean: FLOP/s of products, bytes/s of a block's other operations and of AdamW, bytes/s that it
    sends in an all-reduce, collectives/s of a few bytes. Deviations of the time for products and chain, over its mean:
    `lasting` of ranks, `passing` of rounds of `round` seconds."""

    products: float
    chain: float
    update: float
    ring: float
    calls: float
    lasting: float
    passing: float
    round: float


class Probing:
    """Times what a step is made of, again and again. Work per call, and every call's seconds, by name."""

    def __init__(self, world: int):
        model, vocabulary, _, micro = SHAPES[SHAPE]
        numbers, rows = num_parameters(model, vocabulary), micro * (model.num_patches + 1)
        d, h, self.world = model.width, int(model.width * model.mlp_ratio), world
        x, weight, back = torch.randn(rows, d), torch.randn(h, d), torch.randn(rows, h)
        master, gradients = torch.randn(numbers, requires_grad=True), torch.randn(numbers)
        master.grad = torch.randn(numbers)
        adamw = torch.optim.AdamW([master])
        few, all_few = torch.randn(d), torch.randn(world * d)

        def products() -> None:  # a linear layer's three
            F.linear(x, weight)
            back @ weight
            back.t() @ x

        def calls() -> None:  # as many on every rank
            for _ in range(_CALLS):
                dist.all_gather_into_tensor(all_few, few)

        chain, moved = others(model, rows, micro)
        sent = 2 * (world - 1) / world * 4 * numbers
        self.calls: dict[str, tuple[float, Callable[[], object]]] = {
            "products": (6.0 * rows * d * h, products),
            "chain": (moved, chain),
            "update": (30.0 * numbers, adamw.step),
            "ring": (sent, lambda: dist.all_reduce(gradients)),
            "calls": (_CALLS, calls),
        }
        self.seconds: dict[str, list[float]] = {name: [] for name in self.calls}

    def __call__(self) -> None:
        """One round of all; the short ones as often as fits a while, so that rounds see the same machine as steps."""
        for name, (_, run) in self.calls.items():
            dist.barrier()
            started, count = time.perf_counter(), 0
            while count == 0 or (name in ("products", "chain") and time.perf_counter() - started < _SECONDS):
                run()
                count += 1
            self.seconds[name].append((time.perf_counter() - started) / count)

    def read(self) -> Probe:
        """Means over rounds and ranks; starts anew."""
        names = list(self.calls)
        mine = torch.tensor([self.seconds[name][WARM:] for name in names], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        seconds = torch.stack(everyone)  # [ranks, names, rounds]
        means = seconds.mean(dim=(0, 2)).tolist()
        computing = seconds[:, :2].sum(dim=1)
        of_rank = computing.mean(dim=1, keepdim=True)
        lasting = float(of_rank.std(correction=0) / of_rank.mean())
        passing = float((computing - of_rank).std() / of_rank.mean())
        self.seconds = {name: [] for name in names}
        rates = {name: self.calls[name][0] / mean for name, mean in zip(names, means, strict=True)}
        return Probe(**rates, lasting=lasting, passing=passing, round=2 * _SECONDS)


def others(model: Model, rows: int, micro: int) -> tuple[Callable[[], None], float]:
    """A block without its products, and the bytes it moves as pipeline.plan.costs.moved_bytes counts them."""
    s, d, h, heads = model.num_patches + 1, model.width, int(model.width * model.mlp_ratio), model.heads
    x = torch.randn(rows, d, requires_grad=True)
    y = torch.randn(rows, h, requires_grad=True)
    logits = torch.randn(micro, heads, s, s, requires_grad=True)
    gamma, bias = torch.randn(d, requires_grad=True), torch.randn(heads, s, s)

    def block() -> None:
        a = x + F.layer_norm(x, (d,)) * gamma
        a = a + F.layer_norm(a, (d,)) * gamma
        (a.sum() + F.gelu(y).sum() + (logits + bias).softmax(dim=-1).sum()).backward()

    passes = 3 * (4 + 6 + 4 + 2 * model.mlp_ratio)  # without drop path, forward and backward
    return block, passes * rows * d * 4 + 72.0 * micro * heads * s * s


def rank() -> None:
    """One of the ranks: every stage, with probes between its steps; the first prints findings and probes."""
    world = counting_world()
    torch.set_num_threads(1)
    found, probing = [], Probing(world.size)
    for stage in range(4):
        each = measured(world, stage, SHAPE, STEPS, PRECISION, 1, {}, between=probing)
        found.append({**each, "probe": dataclasses.asdict(probing.read())})
    if world.first:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # now and then gloo aborts when it is taken apart


def launched(world: int) -> list[dict]:
    """What rank 0 of `world` processes prints, each with one thread."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["-m", "benchmarks.plan.plan_measured", "--rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **_KEEPS_MEMORY}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def machine_of(measured: Probe) -> Machine:
    """This machine's core as a chip, all ranks in one node."""
    chip = Chip(
        name="cpu",
        flops16=measured.products,
        flops32=measured.products,
        memory=1e12,
        memory_bandwidth=measured.chain,
        watts=1,
        link=measured.ring,
        per_node=max(WORLDS),
        cores_per_node=os.cpu_count() or 1,
        source="measured",
    )
    assumed = Assumptions(
        matrix_share=1.0,
        matrix_flops=measured.products,
        memory_bandwidth=measured.chain,
        update_bandwidth=measured.update,
        intra_bandwidth=measured.ring,
    )
    network = Network(name="none", node_bandwidth=measured.ring, latency=1 / measured.calls, source="measured")
    storage = Storage(name="none", node_read=1e12, node_write=1e12, total=0.0, source="none")
    return Machine(chip, network, storage, assumed)


def config_of(world: int) -> Config:
    """What tests.pipeline.plan.plan_ranks runs; sdpa with a bias keeps and moves S × S matrices on a CPU."""
    model, vocabulary, masked, micro = SHAPES[SHAPE]
    return Config(
        model=dataclasses.replace(model, kernels="reference"),
        tokenizer=Tokenizer(vocabulary=vocabulary),
        mask=Mask(num_patches=masked),
        train=Train(global_batch=micro * world, micro_batch=micro, precision=PRECISION),
    )


def predicted_seconds(world: int, stage: int, probe: Probe) -> float:
    """Of a step, as `plan` finds them: blocks and collectives, then ranks that wait for the last of them."""
    config, micro = config_of(world), SHAPES[SHAPE][3]
    work = work_of(config, machine_of(probe), sharding_of(config, world, stage, 1), micro, "none")
    alone = simulate_step(work)
    passing = probe.passing * (probe.round / alone.compute) ** 0.5  # what passes is gone in a longer time
    # where ranks share cores, one that is behind gets what those that wait for it leave
    apart = 1 < world <= (os.cpu_count() or 1)
    cluster = Cluster(
        ranks=world,
        load=0.0,
        ready=1,
        straggler_cv=math.hypot(probe.lasting, passing) if apart else 0.0,
        loader_cv=0.0,
        save=0.0,
        save_every=1.0,
        restart=0.0,
        mtbf=float("inf"),
    )
    return simulate(alone, cluster, steps=500).step


def row_of(found: dict, probe: Probe) -> dict:
    """Predicted and measured, side by side."""
    world, stage = found["world"], found["stage"]
    sharding = sharding_of(config_of(world), world, stage, 1)
    kept, sent = states(sharding), sum(exchange.sent(world) for exchange in exchanges(sharding))
    row: dict = {"ranks": world, "ZeRO": stage}
    for part in PARTS:
        row[f"{part}, MB"] = f"{getattr(kept, part) / 1e6:.2f} / {found[part] / 1e6:.2f}"
        row[f"_{part}"] = abs(getattr(kept, part) / found[part] - 1)
    row["sent, MB"] = f"{sent / 1e6:.2f} / {found['sent'] / 1e6:.2f}"
    row["_sent"] = abs(sent / found["sent"] - 1) if world > 1 else 0.0
    row["_seconds"] = predicted_seconds(world, stage, probe), statistics.mean(found["seconds"][WARM:])
    row["step, ms"] = " / ".join(f"{1e3 * seconds:.0f}" for seconds in row["_seconds"])
    return row


def main() -> None:
    """Run, predict, compare."""
    rows: list[dict] = []
    probes: dict[int, list[Probe]] = {}
    for world in WORLDS:
        found = launched(world)
        probes[world] = [Probe(**each["probe"]) for each in found]
        rows += [row_of(each, probe) for each, probe in zip(found, probes[world], strict=True)]
    for row in rows:
        alone = next(other for other in rows if other["ranks"] == 1 and other["ZeRO"] == row["ZeRO"])
        times = [mine / base for mine, base in zip(row["_seconds"], alone["_seconds"], strict=True)]
        row["in steps of 1 rank"] = " / ".join(f"{time_:.2f}" for time_ in times)
        row["_trend"] = abs(times[0] / times[1] - 1)
    assert max(row[f"_{part}"] for row in rows for part in PARTS) < 0.10, "memory is not as predicted"
    assert max(row["_sent"] for row in rows) < 0.05, "bytes sent are not as predicted"
    names = (*PARTS, "sent", "trend")
    ratios = {f"largest error, {name}": max(row[f"_{name}"] for row in rows) for name in names}
    ratios["mean error, trend"] = statistics.mean(row["_trend"] for row in rows if row["ranks"] > 1)
    write("plan_measured", "what `plan` predicts, against CPU ranks", rows, ratios, notes(probes))


def notes(probes: dict[int, list[Probe]]) -> list[str]:
    model, vocabulary, masked, micro = SHAPES[SHAPE]
    flops = computed_flops(model, vocabulary, masked, "none")
    lines = [
        f"{model.layers} layers × {model.width}, {num_parameters(model, vocabulary) / 1e6:.1f} M parameters, "
        f"{flops / 1e9:.1f} GFLOP an image, {micro} images a rank, {PRECISION}, gloo, one thread a rank; "
        f"{os.cpu_count()} cores, which 4 ranks and whatever else runs here share. Each cell: predicted / measured; "
        f"memory of the fullest rank; times are means of {STEPS - WARM} steps. Bytes are counted at every collective "
        "that torch.distributed is asked for. Rates were measured between the steps, by all ranks at once:"
    ]
    for world, each in probes.items():
        products, chain, update, ring, calls, lasting, passing, round_ = (
            statistics.mean(getattr(probe, item.name) for probe in each) for item in dataclasses.fields(Probe)
        )
        lines.append(
            f"{world} at once, products {products / 1e9:.1f} GFLOP/s, a block's other operations {chain / 1e9:.2f} "
            f"GB/s, AdamW {update / 1e9:.2f} GB/s, all-reduce {ring / 1e9:.2f} GB/s sent by each, "
            f"{1e6 / calls:.0f} µs a collective of a few bytes, deviation of ranks {lasting:.0%}, of "
            f"rounds of {round_:.2f} s {passing:.0%};"
        )
    return lines


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank()
    else:
        main()
