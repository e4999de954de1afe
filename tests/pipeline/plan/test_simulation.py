"""The step, late ranks, the loader, checkpoints and failures, each against a closed form where there is one."""

import math

import numpy as np
import pytest

from beitforge.pipeline.plan import failures
from beitforge.pipeline.plan.simulation import (
    Cluster,
    StepWork,
    all_reduce_seconds,
    half_seconds,
    simulate,
    simulate_step,
    varied,
)

LONE = {"blocks": 12, "turns": 3, "forward": 1.0, "backward": 2.0, "update": 0.5}
CALM = {"load": 0.0, "ready": 2, "straggler_cv": 0.0, "loader_cv": 0.0, "save": 0.0, "save_every": 100.0}
CALM |= {"restart": 0.0, "mtbf": math.inf}
MACHINES = [(60, 300, 86_400), (5, 300, 3600), (200, 100, 2000), (1, 0, 500)]  # δ, R, M


def test_a_step_alone_is_its_compute():
    assert simulate_step(StepWork(**LONE)).seconds == pytest.approx(9.5)
    assert simulate_step(StepWork(**LONE)).hidden == 1


@pytest.mark.parametrize(("every_turn", "times"), [(False, 1), (True, 3)])
def test_without_overlap_everything_adds_up(every_turn, times):
    """Stages 0 to 2 as the engine configures them."""
    found = simulate_step(StepWork(**LONE, reduce=0.7, every_turn=every_turn, end=0.2))
    assert found.exposed == pytest.approx(times * 0.7 + 0.2)
    assert found.hidden == pytest.approx(0)


def test_buckets_hide_behind_backward():
    """All but the last bucket, if the network is faster than the chip; all of its own time but one block, if slower."""
    fast = simulate_step(StepWork(**LONE, reduce=0.6, buckets=6, overlap=True))
    assert fast.exposed == pytest.approx(0.1)
    slow = simulate_step(StepWork(**{**LONE, "turns": 1}, reduce=60.0, buckets=12, overlap=True))
    assert slow.seconds == pytest.approx(1 + 2 / 12 + 60 + 0.5)


def test_weights_are_fetched_ahead():
    """What the first `ahead` blocks need comes at once, and they wait for it; the rest arrives while others are
    computed, unless the network is slower."""
    fast = simulate_step(StepWork(**{**LONE, "turns": 1}, gather=0.6, overlap=True, ahead=2))
    assert fast.exposed == pytest.approx(0.1)
    assert simulate_step(StepWork(**{**LONE, "turns": 1}, gather=0.6)).exposed == pytest.approx(0.6)
    slow = simulate_step(StepWork(**{**LONE, "turns": 1}, gather=12.0, overlap=True, ahead=12))
    assert slow.seconds == pytest.approx(12 + 1 + 2 + 0.5)


def test_late_ranks_cost_what_the_largest_of_many_does():
    """The mean of the largest of n log-normal factors, by integration of its distribution."""
    one, cv, ranks = simulate_step(StepWork(**LONE)), 0.05, 512
    found = simulate(one, Cluster(ranks=ranks, **{**CALM, "straggler_cv": cv}), steps=400)
    sigma = math.sqrt(math.log1p(cv * cv))
    x = np.linspace(0.5, 2, 20_001)
    below = np.array([0.5 * (1 + math.erf((math.log(v) + sigma**2 / 2) / sigma / math.sqrt(2))) for v in x])
    mean = 2 - float((below**ranks).mean()) * 1.5
    assert (found.compute + found.late) / found.compute == pytest.approx(mean, rel=2e-3)
    assert found.starved == 0


def test_factors_have_the_mean_and_deviation_asked_for():
    factors = varied(0.2, 100, 1000, 0, 1)
    assert factors.mean() == pytest.approx(1, abs=3e-3)
    assert factors.std() == pytest.approx(0.2, rel=0.02)
    assert np.array_equal(factors, varied(0.2, 100, 1000, 0, 1))
    assert not np.array_equal(factors, varied(0.2, 100, 1000, 1, 1))


@pytest.mark.parametrize("load", [1.0, 9.4, 12.0])
def test_a_slow_loader_sets_the_pace(load):
    one = simulate_step(StepWork(**LONE))
    found = simulate(one, Cluster(ranks=4, **{**CALM, "load": load}))
    assert found.step == pytest.approx(max(load, 9.5))
    assert found.starved == pytest.approx(max(0.0, load - 9.5), abs=1e-9)


def test_batches_kept_ready_bridge_uneven_loading():
    one = simulate_step(StepWork(**LONE))
    shallow, deep = (
        simulate(one, Cluster(ranks=8, **{**CALM, "load": 8.0, "loader_cv": 0.4, "ready": ready})).starved
        for ready in (1, 16)
    )
    assert deep < shallow / 5


@pytest.mark.parametrize(("cost", "restart", "mtbf"), MACHINES)
@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_simulated_failures_against_daly(cost, restart, mtbf, share):
    """Equation 20 of Daly 2006, at and around the best interval."""
    interval = share * failures.young(cost, mtbf)
    simulated = failures.simulated_goodput(interval, cost, restart, mtbf, segments=40_000)
    assert simulated == pytest.approx(failures.goodput(interval, cost, restart, mtbf), rel=0.01)


@pytest.mark.parametrize(("cost", "restart", "mtbf"), MACHINES)
def test_the_best_interval_is_dalys(cost, restart, mtbf):
    """His estimate is of third order in √(δ / 2 M), Young's of first; no other interval has more goodput."""
    best = failures.best_interval(cost, restart, mtbf)
    assert best == pytest.approx(failures.daly(cost, mtbf), rel=0.001)
    assert best == pytest.approx(failures.young(cost, mtbf), rel=2 * math.sqrt(cost / mtbf))
    around = [failures.goodput(best * factor, cost, restart, mtbf) for factor in (0.5, 0.9, 1.1, 2)]
    assert max(around) < failures.goodput(best, cost, restart, mtbf)


def test_the_best_simulated_interval_is_dalys():
    """Found by simulation alone, on a grid of factors of 1.5."""
    cost, restart, mtbf = 60.0, 120.0, 7200.0
    grid = [failures.daly(cost, mtbf) * 1.5**power for power in range(-4, 5)]
    found = [failures.simulated_goodput(interval, cost, restart, mtbf, segments=60_000) for interval in grid]
    assert abs(int(np.argmax(found)) - 4) <= 1


def test_machines_that_never_fail():
    assert failures.goodput(90, 10, 300, math.inf) == pytest.approx(0.9)
    assert failures.best_interval(10, 300, math.inf) == math.inf
    assert failures.goodput(1e6, 10, 300, 100) == 0


def test_collectives_on_two_levels():
    """A ring's bandwidth term, the slower of the two levels, and one hop of latency a doubling of the nodes."""
    assert all_reduce_seconds(8e9, 1, 8, 1e9, 1e9, 1.0) == 0
    assert all_reduce_seconds(8e9, 8, 8, 1e9, 1e6, 0.0) == pytest.approx(14)
    assert all_reduce_seconds(8e9, 16, 8, 4e9, 1e9, 0.0) == pytest.approx(15)
    assert half_seconds(8e9, 16, 8, 4e9, 1e9, 0.0) == pytest.approx(7.5)
    assert half_seconds(0, 64, 8, 4e9, 1e9, 1e-3) == pytest.approx(3e-3)
