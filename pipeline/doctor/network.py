"""What `doctor` asks of the network: all-reduce, all-gather, and every pair of hosts, over the real process group.

Every rank calls `measure`; the first judges. Must not know model, shards or any stage.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from beitforge.pipeline.distributed.collectives import World, all_max
from beitforge.pipeline.doctor.findings import OK, WARNING, Finding

_SIZES = (1 << 16, 1 << 19, 1 << 22, 1 << 25)  # bytes; the next is tried while one takes less than _LONG_ENOUGH
_LONG_ENOUGH = 0.1  # seconds
_ALL_PAIRS = 16  # ranks up to which every pair of them is tried; beyond, the first rank of each host
_SLOW = 4.0  # times slower than the fastest pair of its kind
_SHARE = 0.5  # of a step's time that communication may take


@dataclass(frozen=True)
class Pair:
    """Bytes a second one way between two ranks."""

    one: int
    other: int
    rate: float


@dataclass(frozen=True)
class Speeds:
    """What one rank has measured; bytes a second."""

    reduce: float
    gather: float
    pairs: list[Pair]


def measure(world: World, hosts: list[str], seconds: float, at: Callable[[str], None]) -> Speeds:
    """hosts: of every rank. The rounds of pairs end after `seconds`, on all ranks together."""
    at("all-reduce")
    reduce = _collective(world, lambda tensor: dist.all_reduce(tensor))
    at("all-gather")
    gather = _collective(world, lambda tensor: _all_gather(tensor, world))
    taking = list(range(world.size))
    if world.size > _ALL_PAIRS:
        taking = [hosts.index(host) for host in dict.fromkeys(hosts)]
    found: list[Pair] = []
    started = time.monotonic()
    for pairs in rounds(taking):
        mine = next((pair for pair in pairs if world.rank in pair), None)
        if mine is not None:
            at(f"point to point between rank {mine[0]} on {hosts[mine[0]]} and rank {mine[1]} on {hosts[mine[1]]}")
            rate = _one_pair(world, *mine)
            found += [Pair(*mine, rate)] if world.rank == mine[0] else []
        if all_max([time.monotonic() - started], world)[0] > seconds:
            break
    return Speeds(reduce, gather, found)


def rounds(ranks: list[int]) -> list[list[tuple[int, int]]]:
    """Every pair of `ranks` once, in rounds in which nobody is asked twice (the circle method)."""
    circle: list[int] = ranks if len(ranks) % 2 == 0 else [*ranks, -1]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def _collective(world: World, collective: Callable[[torch.Tensor], object]) -> float:
    """Bytes a second of a collective, by the slowest rank's clock; of the largest size that is not too slow."""
    rate = 0.0
    for size in _SIZES:
        tensor = torch.zeros(size // 4, device=world.device)
        collective(tensor)  # the first connects
        _wait(world)
        started = time.perf_counter()
        collective(tensor)
        _wait(world)
        took = all_max([time.perf_counter() - started], world)[0]
        rate = size / max(took, 1e-9)
        if took > _LONG_ENOUGH:
            break
    return rate


def _all_gather(tensor: torch.Tensor, world: World) -> None:
    """Of a tensor in all: each rank brings its share."""
    share = tensor[: max(1, len(tensor) // world.size)]
    dist.all_gather([torch.empty_like(share) for _ in range(world.size)], share)


def _one_pair(world: World, one: int, other: int) -> float:
    """There and back; `one` says with a number before each turn how many bytes come, 0 for the end."""
    first, size = world.rank == one, torch.zeros(1, dtype=torch.int64, device=world.device)
    rate = 0.0
    for number in (*_SIZES, 0):
        if first:
            size.fill_(number)
            dist.send(size, other)
        else:
            dist.recv(size, one)
            number = int(size)
        if not number:
            break
        took = _there_and_back(world, one, other, number)
        rate = number / max(took / 2, 1e-9)
        if first and took > 2 * _LONG_ENOUGH:
            size.fill_(0)
            dist.send(size, other)
            break
    return rate


def _there_and_back(world: World, one: int, other: int, size: int) -> float:
    tensor = torch.zeros(size // 4, device=world.device)
    _wait(world)
    started = time.perf_counter()
    if world.rank == one:
        dist.send(tensor, other)
        dist.recv(tensor, other)
    else:
        dist.recv(tensor, one)
        dist.send(tensor, one)
    _wait(world)
    return time.perf_counter() - started


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def assess(speeds: list[Speeds], hosts: list[str]) -> list[Finding]:
    """Findings of all ranks' measurements: the slowest pair by name, and whether it is far slower than others."""
    pairs = [pair for each in speeds for pair in each.pairs]
    found = [
        Finding(level=OK, check="network", host=hosts[0], value=f"{_rate(speeds[0].reduce)}", what=_collectives(speeds))
    ]
    between = [pair for pair in pairs if hosts[pair.one] != hosts[pair.other]]
    within = [pair for pair in pairs if hosts[pair.one] == hosts[pair.other]]
    for kind, words in ((between, "between hosts"), (within, "within a host")):
        if not kind:
            continue
        slowest, rates = min(kind, key=lambda pair: pair.rate), [pair.rate for pair in kind]
        named = f"rank {slowest.one} on {hosts[slowest.one]} – rank {slowest.other} on {hosts[slowest.other]}"
        what = f"slowest pair {words}: {named} with {_rate(slowest.rate)}; median {_rate(statistics.median(rates))}"
        what += f", fastest {_rate(max(rates))}, of {len(kind)} pairs"
        slow = max(rates) > _SLOW * slowest.rate
        cure = (
            "see to its cable, port, NIC speed (ethtool) and NCCL_/GLOO_SOCKET_IFNAME, or leave it out" if slow else ""
        )
        culprit = _culprit([pair for pair in kind if max(rates) > _SLOW * pair.rate], hosts) or hosts[slowest.other]
        level = WARNING if slow else OK
        value = "" if slow else _rate(slowest.rate)
        found.append(Finding(level=level, check="network", host=culprit, what=what, cure=cure, value=value))
    return found


def _collectives(speeds: list[Speeds]) -> str:
    return f"all-reduce {_rate(speeds[0].reduce)}, all-gather {_rate(speeds[0].gather)} over {len(speeds)} ranks"


def _culprit(slow: list[Pair], hosts: list[str]) -> str:
    """The one host that all slow pairs have in common, or ''."""
    common = [{hosts[pair.one], hosts[pair.other]} for pair in slow]
    both = set.intersection(*common) if common else set()
    return both.pop() if len(both) == 1 else ""


def share_of_step(
    speeds: list[Speeds], hosts: list[str], gradient_bytes: float, stage: int, accumulation: int, step: float
) -> Finding:
    """How much of a step's time its collectives take, by what they were measured at. gradient_bytes: of a whole set."""
    reduce, gather = speeds[0].reduce, speeds[0].gather
    seconds = accumulation * gradient_bytes / reduce + gradient_bytes / gather
    if stage == 3:
        seconds += (2 * accumulation - 1) * gradient_bytes / gather
    share = seconds / max(step, 1e-9)
    between = [pair for each in speeds for pair in each.pairs if hosts[pair.one] != hosts[pair.other]]
    what = f"gradients and weights ({gradient_bytes / 2**20:.1f} MiB) travel {seconds:.2f} s of a step of {step:.2f} s"
    if between and share > _SHARE:
        slowest = min(between, key=lambda pair: pair.rate)
        what += f"; the slowest pair is {hosts[slowest.one]} – {hosts[slowest.other]} with {_rate(slowest.rate)}"
    cure = "a faster interface (NCCL_/GLOO_SOCKET_IFNAME), a larger train.global_batch, or train.zero_stage below 3"
    level = WARNING if share > _SHARE and len(set(hosts)) > 1 else OK
    return Finding(level=level, check="network", host=hosts[0], what=what, cure=cure if level != OK else "")


def _rate(number: float) -> str:
    return f"{number / 1e9:.1f} GB/s" if number >= 1e9 else f"{number / 1e6:.1f} MB/s"
