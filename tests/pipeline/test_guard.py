"""What is not finite: left out on all ranks, gone back from, given up on; decided the same after a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Faults
from pipeline.guard import Fault, Guard, Return, goes_on, read_returns, usable

ROOT = Path(__file__).resolve().parents[2]


def guard(run: Path, **settings: float) -> Guard:
    return Guard(run, Faults(max_skipped=3, max_returns=2, **settings), first=True, save_every=10, global_batch=8)


def leave_out(kept: Guard, *steps: int) -> None:
    for step in steps:
        kept.skipped(Fault(step, "loss", [(2, "node1")]))


def test_goes_back_after_so_many_in_a_row(tmp_path):
    kept = guard(tmp_path)
    leave_out(kept, 4, 5)
    kept.good()
    leave_out(kept, 7, 8)
    assert not kept.must_go_back
    leave_out(kept, 9)
    assert kept.must_go_back and kept.before() == 7
    assert kept.went_back(to=4) == Return(4, 10)
    assert not kept.must_go_back
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["skip"] * 5 + ["return"]
    assert lines[2]["samples"] == [56, 63] and lines[2]["ranks"] == [{"rank": 2, "host": "node1"}]
    assert lines[-1]["samples"] == [32, 79]


def test_a_return_that_brings_nothing_goes_further_back_and_then_gives_up(tmp_path):
    kept = guard(tmp_path)
    leave_out(kept, 40, 41, 42)
    kept.went_back(to=30)
    leave_out(kept, 45, 46, 47)
    assert kept.before() == 30
    kept.went_back(to=20)
    leave_out(kept, 50, 51, 52)
    with pytest.raises(ConfigError) as refused:
        kept.before()
    line = str(refused.value)
    assert "the loss of rank 2 on node1 is not finite at step 50" in line and "samples 400–423" in line
    assert "going back 2 times did not help" in line


def test_progress_forgets_earlier_returns(tmp_path):
    kept = guard(tmp_path)
    for start in (40, 60, 80, 100):
        leave_out(kept, start, start + 1, start + 2)
        assert kept.before() == start
        kept.went_back(to=start - 5)


def test_a_restarted_run_decides_the_same(tmp_path):
    first = guard(tmp_path)
    leave_out(first, 40, 41, 42)
    first.went_back(to=30)
    again = guard(tmp_path)
    assert again.returns == first.returns == read_returns(tmp_path) == [Return(30, 43)]
    leave_out(first, 45, 46, 47)
    leave_out(again, 45, 46, 47)
    assert again.before() == first.before() == 30


def test_what_a_return_left_behind_is_not_used():
    """Weights of step 30 go on with step 43; checkpoints of the steps between were of the weights that failed."""
    returns = [Return(30, 43)]
    assert [step for step in (20, 30, 35, 42, 43, 50) if usable(returns, step)] == [20, 30, 43, 50]
    assert [goes_on(returns, step) for step in (20, 30, 43, 50)] == [20, 43, 43, 50]
    assert goes_on([*returns, Return(20, 60)], 20) == 60


def test_ruined_weights_go_back_at_once(tmp_path):
    kept = guard(tmp_path)
    kept.skipped(Fault(12, "weights", []))
    assert kept.must_go_back and kept.before() == 13
    assert kept.went_back(to=12) == Return(12, 13)


@pytest.fixture(scope="module")
def injected(tiny, tmp_path_factory) -> dict[str, list[dict]]:
    """Four processes; what each of them saw and decided, by what was injected on rank 2 alone."""
    found = {}
    for what, stage in (("loss", 2), ("gradient", 3), ("loss", 0)):
        run = tmp_path_factory.mktemp("injected") / "run"
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "4"]
        command += ["-m", "tests.pipeline.not_finite", str(tiny.config), str(run), what, str(stage)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found[f"{what} {stage}"] = [json.loads(path.read_text()) for path in sorted(run.glob("said-*.json"))]
        found[f"{what} {stage}"][0]["log"] = done.stderr
    return found


@pytest.mark.parametrize("case", ["loss 2", "gradient 3", "loss 0"])
def test_four_ranks_agree_on_what_happens_next(injected, case):
    """One bad step is left out; a row of them goes back, and all four end with the same, finite weights."""
    ranks = injected[case]
    assert len(ranks) == 4
    for rank in ranks:
        assert rank["skipped"] == ranks[0]["skipped"] == [3, 6, 7]
        assert rank["returns"] == ranks[0]["returns"] == [[4, 8]]
        assert rank["weights"] == ranks[0]["weights"]
        assert rank["done"] == 10 and rank["finite"]
        assert rank["unchanged"], "leaving an update out has changed something"
    named = "the loss of rank 2 on" if case.startswith("loss") else "the gradient is not finite"
    assert f"step 3 left out, samples 24–31: {named}" in ranks[0]["log"]
    assert "went back to the weights of step 4; going on with step 8" in ranks[0]["log"]
