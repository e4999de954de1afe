"""Spreading shards over processes: errors arrive, dead workers are noticed, nothing runs on afterwards."""

import contextlib
import os
import signal
import time

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.progress import Progress
from beitforge.shards.workers import each_shard, in_megabytes


def double(job, beat):
    beat(job)
    return 2 * job


def fail_on_three(job, beat):
    if job == 3:
        raise ShardError("three is broken")
    return job


def die(job, beat):
    os.kill(os.getpid(), signal.SIGKILL)


def last_a_minute(job, beat):
    if job:
        for _ in range(600):
            beat(1)
            time.sleep(0.1)


def run(work, jobs, workers):
    with (
        Progress("test", 100, "units") as progress,
        contextlib.closing(each_shard(work, jobs, workers, progress)) as all,
    ):
        return sorted(all), progress.done


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_once_and_every_beat_counted(workers):
    """Results and progress do not depend on how many processes there are."""
    assert run(double, range(9), workers) == ([2 * i for i in range(9)], sum(range(9)))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_as_it_was_raised(workers):
    """A ShardError of a worker is the one line the user sees."""
    with pytest.raises(ShardError, match="three is broken"):
        run(fail_on_three, range(9), workers)


def test_a_killed_worker_is_noticed():
    """The kernel's out-of-memory killer must not hang a packing for ever."""
    with pytest.raises(ShardError, match="a worker process was killed"):
        run(die, range(3), 2)


def test_giving_up_stops_work_in_the_middle():
    """A minute's shard must not keep the user waiting after the limit of rejects or Ctrl-C."""
    started = time.monotonic()
    with Progress("test", 600, "units") as progress:
        results = each_shard(last_a_minute, [0, 1, 2], 2, progress)
        assert next(results) is None
        results.close()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("told", [[], [1 << 19] * 3, [5 << 20], [9 << 20]])
def test_megabytes_add_up(told):
    """A bar over files ends at their size in MiB, whatever part of them the images are."""
    counted: list[int] = []
    with in_megabytes(counted.append, 7 << 20) as tell:
        for size in told:
            tell(size)
    assert sum(counted) == 7 and min(counted) >= 0
