"""A checkpoint of any ZeRO stage and number of processes resumes under any other, exactly; this pins where DeepSpeed
keeps what."""

import json
from pathlib import Path

import pytest
import torch

from beitforge.pipeline import errors
from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.runs.jsonl import read_metrics
from tests.pipeline.training.test_trainer import trained, weights
from tests.ranks import run_ranks

NEVER_REMOVED = ["checkpoint.keep=50", "log.every_steps=1", "data.heldout_images=", "data.heldout_tokens="]


def pairs(folder: Path, *others: Path, processes: int) -> list[dict]:
    """What tests.pipeline.checkpoints.elastic_pairs finds."""
    done = run_ranks("tests.pipeline.checkpoints.elastic_pairs", folder, *others, processes=processes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """Every pair of stages in one process; then with two, from two and from one."""
    folder = tmp_path_factory.mktemp("pairs")
    return pairs(folder / "1", processes=1) + pairs(folder / "2", folder / "1", processes=2)


def test_every_transition_is_there(found):
    alone = {(f["precision"], f["from"][1], f["to"][1]) for f in found if f["to"][0] == "1"}
    assert alone == {(precision, a, b) for precision in ("fp32", "bf16") for a in range(4) for b in range(4)}
    grown = {(f["precision"], f["from"][0]) for f in found if f["to"][0] == "2"}
    assert grown == {(precision, world) for precision in ("fp32", "bf16") for world in ("1", "2")}


def test_weights_and_moments_are_carried_bit_for_bit(found):
    for finding in found:
        assert not finding["differ"], finding


def test_settings_of_each_group_and_the_step_counter_are_right(found):
    """What DeepSpeed's universal checkpoint gets wrong under ZeRO-3."""
    for finding in found:
        assert finding["decays"] == [0.05, 0.0], finding
        assert finding["steps"] == [3.0] and not finding["shared"], finding


def test_losses_go_on_as_if_nothing_had_been(found):
    """To the last bit with as many processes, else to the rounding of a sum; bf16 rounds at 1/256."""
    for finding in found:
        same = finding["from"][0] == finding["to"][0]
        tolerance = 0.0 if same else 1e-6 if finding["precision"] == "fp32" else 2e-3
        assert finding["losses"] == pytest.approx(finding["expected"], rel=tolerance, abs=0), finding


def test_one_training_through_many_shapes(tiny, tmp_path):
    """World 1 → 2 → 4 → 2 under ZeRO 0 → 1 → 3 → 2: the losses of an unbroken run, and what an
    operator reads."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = [*NEVER_REMOVED, "train.duration=8 steps", "checkpoint.every=2 steps", "train.micro_batch=2"]
    trained(tiny, whole, *settings)
    for part, (world, stage) in enumerate(((1, 0), (2, 1), (4, 3), (2, 2))):
        output = trained(tiny, run, *settings, f"train.zero_stage={stage}", processes=world)
        assert f"from step {2 * part}" in output
        if part:
            assert f"laying it out for {world} under ZeRO-{stage}" in output
        for late in range(2 * part + 4, 9, 2):  # as if it had ended there
            (run / "checkpoints" / f"step-{late}" / "state.json").unlink()
    losses, expected = ([line["loss"] for line in read_metrics(path, "train")] for path in (run, whole))
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-5, atol=1e-6)


def test_another_model_is_refused(tmp_path):
    saved = zero_layout.CheckpointFiles(tmp_path, {"a": (2,)}, {"a": []}, 1.0)
    with pytest.raises(errors.ConfigError, match="holds 0 of 2 numbers of a"):
        saved.fill("a", zero_layout.Piece(0, {"fp32": torch.zeros(2)}))
