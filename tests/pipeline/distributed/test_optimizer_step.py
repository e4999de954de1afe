"""An optimizer step: its operations and the times that the host waits for it, and that it leaves out what it must."""

import json
import math

import pytest
import torch

from beitforge.pipeline.distributed.optimizer_step import flat_norm
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    """What tests.pipeline.distributed.step_counts finds with two processes."""
    done = run_ranks("tests.pipeline.distributed.step_counts", tmp_path_factory.mktemp("steps"), processes=2)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(counted) -> list[dict]:
    return counted["steps"]


def test_operations_do_not_grow_with_the_parameters(found):
    """DeepSpeed's own end of a step has 15.6 for each parameter in bf16 with ZeRO-2, 29 without ZeRO."""
    for finding in found:
        # each is cast once for its master without ZeRO, and gathered once with ZeRO-3, which keeps small ones whole
        limit = 1.5 if finding["stage"] == 3 or (finding["stage"], finding["precision"]) == (0, "bf16") else 0.6
        assert finding["ending"] <= limit * finding["parameters"], finding
        assert finding["norms"] <= 4, finding


def test_a_whole_step(found):
    """Forward, backward and update: 22 for each parameter before."""
    for finding in found:
        assert finding["step"] <= 9 * finding["parameters"], finding


def test_the_host_waits_once(found):
    for finding in found:
        assert finding["reads"] == 1, finding
        assert finding["reductions"] == 1, finding


def test_what_is_not_finite_changes_nothing(found):
    """NaN on one rank of two: weights, masters and moments of both keep every bit, and the next step goes on."""
    for finding in found:
        assert finding["updated"] and finding["changed"], finding
        assert all(finding["kept"]) and all(finding["healed"]), finding


def test_the_norm_is_one_for_all_stages(found):
    by_precision = {
        precision: [f["norm"] for f in found if f["precision"] == precision] for precision in ("bf16", "fp32")
    }
    assert by_precision["fp32"] == pytest.approx([by_precision["fp32"][0]] * 4, rel=1e-5)
    assert by_precision["bf16"] == pytest.approx([by_precision["bf16"][0]] * 4, rel=0.05)


def test_the_mode_of_compiling_is_passed_on(counted):
    assert counted["compiled"] == {"mode": "reduce-overhead"}


def test_a_limit_of_the_deepspeed_section_holds(counted):
    assert counted["clip_norm"] == 0.25


def test_a_long_norm_is_exact():
    flat = torch.full((1 << 25,), 1e-3)
    assert float(flat_norm(flat)) == pytest.approx(1e-3 * math.sqrt(1 << 25), rel=1e-6)
