"""What is not finite: left out on all ranks, gone back from, given up on; decided the same after a restart."""

import json
from pathlib import Path

import pytest

from beitforge.pipeline.config.settings import Faults
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.training.recovery import Fault, Recovery, Rollback, read_rollbacks, resume_step, usable
from tests.ranks import run_ranks


def guard(run: Path, **settings: float) -> Recovery:
    return Recovery(run, Faults(max_skipped=3, max_returns=2, **settings), first=True, save_every=10, global_batch=8)


def leave_out(kept: Recovery, *steps: int) -> None:
    for step in steps:
        kept.skipped(Fault(step, "loss", [(2, "node1")]))


def test_goes_back_after_so_many_in_a_row(tmp_path):
    kept = guard(tmp_path)
    leave_out(kept, 4, 5)
    kept.update_applied()
    leave_out(kept, 7, 8)
    assert not kept.must_roll_back
    leave_out(kept, 9)
    assert kept.must_roll_back and kept.rollback_before() == 7
    assert kept.record_rollback(to=4) == Rollback(4, 10)
    assert not kept.must_roll_back
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["skip"] * 5 + ["return"]
    assert lines[2]["samples"] == [56, 63] and lines[2]["ranks"] == [{"rank": 2, "host": "node1"}]
    assert lines[-1]["samples"] == [32, 79]


def test_a_return_that_brings_nothing_goes_further_back_and_then_gives_up(tmp_path):
    kept = guard(tmp_path)
    leave_out(kept, 40, 41, 42)
    kept.record_rollback(to=30)
    leave_out(kept, 45, 46, 47)
    assert kept.rollback_before() == 30
    kept.record_rollback(to=20)
    leave_out(kept, 50, 51, 52)
    with pytest.raises(ConfigError) as refused:
        kept.rollback_before()
    line = str(refused.value)
    assert "the loss of rank 2 on node1 is not finite at step 50" in line and "samples 400–423" in line
    assert "going back 2 times did not help" in line


def test_progress_forgets_earlier_returns(tmp_path):
    kept = guard(tmp_path)
    for start in (40, 60, 80, 100):
        leave_out(kept, start, start + 1, start + 2)
        assert kept.rollback_before() == start
        kept.record_rollback(to=start - 5)


def test_a_restarted_run_decides_the_same(tmp_path):
    first = guard(tmp_path)
    leave_out(first, 40, 41, 42)
    first.record_rollback(to=30)
    again = guard(tmp_path)
    assert again.rollbacks == first.rollbacks == read_rollbacks(tmp_path) == [Rollback(30, 43)]
    leave_out(first, 45, 46, 47)
    leave_out(again, 45, 46, 47)
    assert again.rollback_before() == first.rollback_before() == 30


def test_what_a_return_left_behind_is_not_used():
    """Weights of step 30 go on with step 43; checkpoints of the steps between were of the weights that failed."""
    returns = [Rollback(30, 43)]
    assert [step for step in (20, 30, 35, 42, 43, 50) if usable(returns, step)] == [20, 30, 43, 50]
    assert [resume_step(returns, step) for step in (20, 30, 43, 50)] == [20, 43, 43, 50]
    assert resume_step([*returns, Rollback(20, 60)], 20) == 60


def test_ruined_weights_go_back_at_once(tmp_path):
    kept = guard(tmp_path)
    kept.skipped(Fault(12, "weights", []))
    assert kept.must_roll_back and kept.rollback_before() == 13
    assert kept.record_rollback(to=12) == Rollback(12, 13)


@pytest.fixture(scope="module")
def injected(tiny, tmp_path_factory) -> dict[str, list[dict]]:
    """Four processes; what each of them saw and decided, by what was injected on rank 2 alone."""
    found = {}
    for what, stage in (("loss", 2), ("gradient", 3), ("loss", 0)):
        run = tmp_path_factory.mktemp("injected") / "run"
        done = run_ranks("tests.pipeline.training.not_finite", tiny.config, run, what, stage, processes=4)
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
    assert "rolled back to the weights of step 4; resuming with step 8" in ranks[0]["log"]
