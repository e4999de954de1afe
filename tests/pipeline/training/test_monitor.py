"""A straggling rank, a starved loader and a loss that jumps are seen, and named once."""

import time

import pytest
import torch

from beitforge.pipeline.config.settings import Faults
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.training.device_timer import DeviceTimer
from beitforge.pipeline.training.monitor import Monitor
from tests.pipeline.training.test_trainer import trained

HOSTS = ["a", "a", "b", "b"]


def pace(**settings: float) -> tuple[Monitor, list[str]]:
    said: list[str] = []
    return Monitor(Faults(**settings), HOSTS, said.append), said


def test_a_slow_rank_is_named_once_it_lasts():
    looks, said = pace(straggler=1.5)
    for step in range(1, 3):
        looks.check(step, 5.0, [1.0, 1.1, 2.0, 1.0], [0.0] * 4)
    looks.check(3, 5.0, [1.0, 1.0, 1.0, 1.0], [0.0] * 4)
    assert said == []
    for step in range(4, 20):
        found = looks.check(step, 5.0, [1.0, 1.1, 2.0, 1.0], [0.0] * 4)
    assert said == ["rank 2 on b is slow: 2.0 times the median rank's time forward at step 6"]
    assert (found["slowest_rank"], found["forward_seconds"], found["forward_seconds_slowest"]) == (2, 1.0, 2.0)


def test_of_two_ranks_the_slower_is_named():
    looks, said = pace(straggler=1.5)
    for step in range(3):
        looks.check(step, 5.0, [3.0, 1.0], [0.0, 0.0])
    assert len(said) == 1 and said[0].startswith("rank 0 on a is slow: 3.0 times")


def test_a_starved_loader_is_named_and_alone_nobody_is_slow():
    looks, said = pace(starved=0.2)
    for step in range(5):
        looks.check(step, 5.0, [9.0], [0.4])
    assert said == [
        "rank 0 on a waits for data 40% of the time at step 2: more loader.workers, faster storage, or a smaller view"
    ]


def test_a_jump_of_the_loss_is_named():
    looks, said = pace(spike=10)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        falling = 6 - step / 60 + 0.02 * float(torch.randn((), generator=generator))
        looks.check(step, falling, [1.0], [0.0])
    assert said == []
    assert looks.check(60, 20.0, [1.0], [0.0])["loss_jump"] > 10
    looks.check(61, 5.0, [1.0], [0.0])
    assert len(said) == 1 and said[0].startswith("loss 20 at step 60:")


def test_zero_switches_each_off():
    looks, said = pace(straggler=0, starved=0, spike=0)
    for step in range(30):
        looks.check(step, 5.0 if step < 29 else 500.0, [1.0, 9.0], [0.9, 0.9])
    assert said == []


def test_a_stopwatch_sums_and_starts_anew():
    watch = DeviceTimer(torch.device("cpu"))
    for _ in range(2):
        watch.start()
        time.sleep(0.02)
        watch.stop()
    assert 0.04 <= watch.read() < 0.5
    assert watch.read() == 0.0


def test_a_run_logs_and_names_them(tiny, tmp_path):
    """Batches built in the training process itself are waited for."""
    run = tmp_path / "run"
    settings = ["train.duration=6 steps", "log.every_steps=1", "faults.starved=0.0001", "data.heldout_images="]
    output = trained(tiny, run, *settings, "data.heldout_tokens=", processes=1)
    assert output.count("rank 0 on") == output.count("waits for data") == 1, output
    for line in read_metrics(run, "train"):
        assert line["forward_seconds_slowest"] >= line["forward_seconds"] > 0
        assert line["slowest_rank"] == 0 and line["data_wait_worst"] >= line["data_wait_share"] - 1e-6


@pytest.mark.parametrize("setting", ["faults.hang_seconds=-1", "faults.max_skipped=0", "checkpoint.keep=0"])
def test_impossible_settings_are_refused(tiny, setting):
    from beitforge.pipeline.config.loading import load_config
    from beitforge.pipeline.errors import ConfigError

    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        load_config(str(tiny.config), [setting])
