"""Checkpoints against failures: closed forms, and a simulation they are checked by.

M: mean time between failures of the whole machine, exponential. δ: what a checkpoint costs. R: what a restart costs. τ:
training time between two checkpoints. All in one unit, seconds. Must not know torch.
"""

import math

import numpy as np

from beitforge.shards.counter_rng import TIMELINE, uniform

_GOLDEN = (math.sqrt(5) - 1) / 2


def young(cost: float, mtbf: float) -> float:
    """√(2 δ M): Young, Comm. ACM 17(9), 1974."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Daly, Future Generation Computer Systems 22(3), 2006, equation 37: the interval between checkpoints, τ."""
    if cost >= 2 * mtbf:
        return mtbf
    x = math.sqrt(cost / (2 * mtbf))
    return math.sqrt(2 * cost * mtbf) * (1 + x / 3 + x * x / 9) - cost


def goodput(interval: float, cost: float, restart: float, mtbf: float) -> float:
    """Share of the time that becomes training: τ of work take M e^{R/M} (e^{(τ+δ)/M} - 1) (Daly 2006, equation 20)."""
    if math.isinf(mtbf):
        return interval / (interval + cost)
    if (interval + cost + restart) / mtbf > 500:
        return 0.0
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf))


def best_interval(cost: float, restart: float, mtbf: float) -> float:
    """The τ of the largest goodput, by golden section on its exponential form; inf where nothing fails."""
    if math.isinf(mtbf):
        return math.inf
    low, high = 1e-6 * mtbf, 10 * mtbf
    for _ in range(200):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if goodput(left, cost, restart, mtbf) < goodput(right, cost, restart, mtbf):
            low = left
        else:
            high = right
    return (low + high) / 2


def simulated_goodput(
    interval: float, cost: float, restart: float, mtbf: float, *, segments: int = 20_000, seed: int = 0
) -> float:
    """The same, lived through: `segments` stretches of τ + δ, each begun again after a failure and a restart, which may
    fail itself. Failures are drawn from (seed, segment, attempt)."""
    names = np.arange(segments, dtype=np.uint64)
    at_work = np.ones(segments, dtype=bool)  # else restarting
    time, attempt = 0.0, 0
    while len(names):
        until = -mtbf * np.log1p(-uniform(TIMELINE, seed, 1, names, attempt))
        wanted = np.where(at_work, interval + cost, restart)
        through = until >= wanted
        time += float(np.minimum(until, wanted).sum())
        done = through & at_work
        at_work = np.where(through, True, False)[~done]  # after a restart to work; after a failure to a restart
        names, attempt = names[~done], attempt + 1
    return segments * interval / time
