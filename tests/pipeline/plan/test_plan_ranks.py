"""Memory and bytes of `plan` against real runs of 1, 2 and 4 processes under every ZeRO stage."""

import json

import pytest

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.plan.costs import parameters
from beitforge.pipeline.plan.zero_model import Sharding, copied_bytes, exchanges, states, zero_settings
from tests.pipeline.plan.plan_ranks import COPIED, SHAPES
from tests.ranks import run_ranks

TINY, VOCABULARY = SHAPES["tiny"][:2]
# Precision, accumulation and settings of DeepSpeed, by processes: its own (which keep every parameter of so small a
# model whole), parameters that are cut and gathered once, gathered twice, gradients that go beside backward in small
# buckets, and gradients reduced to their owners; last Muon's.
CUT = {"stage3_param_persistence_threshold": 5000}
BESIDE = {"overlap_comm": True, "reduce_bucket_size": 60_000}
TWICE = {**CUT, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
CASES = {
    1: [("bf16", 2, CUT), ("fp32", 1, {}), ("bf16", 1, CUT, True)],
    2: [("bf16", 2, CUT), ("fp32", 1, BESIDE), ("bf16", 2, TWICE), ("bf16", 2, CUT, True), ("fp32", 1, {}, True)],
    4: [("bf16", 1, {}), ("fp32", 2, {**CUT, "use_multi_rank_bucket_allreduce": False}), ("bf16", 1, CUT, True)],
}


def ranks(world: int, shape: str, steps: int, cases: list) -> list[list[dict]]:
    """What tests.pipeline.plan.plan_ranks finds: of each case a dict a stage."""
    done = run_ranks("tests.pipeline.plan.plan_ranks", shape, steps, json.dumps(cases), processes=world)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


def expected(world: int, stage: int, precision: str, accumulation: int, zero: dict, muon: bool = False) -> Sharding:
    return Sharding(
        parameters=parameters(TINY, VOCABULARY),
        stage=stage,
        world=world,
        number=2 if precision == "bf16" else 4,
        accumulation=accumulation,
        offload=False,
        settings=zero_settings(Config(deepspeed={"zero_optimization": zero}), stage),
        muon=muon,
    )


@pytest.mark.parametrize("world", CASES)
def test_memory_and_bytes_of_every_stage(world):
    """Of the fullest rank within 5 %; bytes to the last one, but for the few that do not grow with the model; elements
    copied beside the model within 15 %."""
    for case, stages in zip(CASES[world], ranks(world, "tiny", 2, CASES[world]), strict=True):
        for found in stages:
            sharding = expected(world, found["stage"], *case)
            kept = states(sharding)
            for part in ("parameters", "gradients", "optimizer"):
                assert getattr(kept, part) == pytest.approx(found[part], rel=0.05), (part, case, found)
            sent = sum(exchange.sent(world) for exchange in exchanges(sharding))
            assert sent == pytest.approx(found["sent"], rel=0.001, abs=1), (case, found)
            if (
                case[:2] == COPIED and len(case) == 3 and found["stage"] in (1, 2)
            ):  # in others the model's own copies differ by stage
                beside = found["copied"] - stages[0]["copied"]
                assert copied_bytes(sharding) / 8 == pytest.approx(beside, rel=0.15), (case, found)
            if not sharding.muon and found["stage"] == 3:  # the bucket that it never gives back
                bucket = sharding.number * sharding.settings.bucket
                assert found["others"] == pytest.approx(bucket, rel=0.01, abs=20_000), (case, found)
