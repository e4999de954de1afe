"""A checkpoint of any ZeRO stage and number of processes resumes under any other, exactly; this pins where DeepSpeed
keeps what."""

import itertools
import json
import shutil
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
    adamw, muon = (
        {(f["precision"], f["from"][1], f["to"][1]) for f in found if f["to"][0] == "1" and f["kind"] == kind}
        for kind in ("adamw", "muon")
    )
    assert adamw == {(precision, a, b) for precision in ("fp32", "bf16") for a in range(4) for b in range(4)}
    assert muon == {(precision, a, (a + 1) % 4) for precision in ("fp32", "bf16") for a in range(4)}
    grown = {(f["kind"], f["precision"], f["from"][0]) for f in found if f["to"][0] == "2"}
    assert grown == set(itertools.product(("adamw", "muon"), ("fp32", "bf16"), ("1", "2")))


def test_weights_and_moments_are_carried_bit_for_bit(found):
    for finding in found:
        assert not finding["differ"], finding


def test_the_moving_average_is_the_released_codes_under_every_stage(found):
    """timm's ModelEma of this rank's masters to the bit, carried like the moments; a test of it changes nothing."""
    averaged = [finding for finding in found if "wrong" in finding]
    assert {(f["precision"], f["from"][1], f["to"][0]) for f in averaged} == set(
        itertools.product(("fp32", "bf16"), range(4), ("1", "2"))
    )
    for finding in averaged:
        assert not finding["wrong"] and finding["swaps"], finding


def test_settings_of_each_group_and_the_step_counter_are_right(found):
    """What DeepSpeed's universal checkpoint gets wrong under ZeRO-3."""
    for finding in found:
        muon = [0.05 / (0.2 * 30**0.5), 0.05 / (0.2 * 120**0.5)] if finding["kind"] == "muon" else []
        assert finding["decays"] == [*muon, 0.05, 0.0], finding
        assert finding["steps"] == [3.0] and not finding["shared"], finding


def test_losses_go_on_as_if_nothing_had_been(found):
    """To the last bit with as many processes, else to the rounding of a sum; bf16 rounds at 1/256. In bf16 Muon's
    momentum is float32 without ZeRO and bfloat16 with it."""
    for finding in found:
        same = finding["from"][0] == finding["to"][0]
        if finding["kind"] == "muon" and finding["precision"] == "bf16" and not finding["from"][1] * finding["to"][1]:
            same = False
        tolerance = 0.0 if same else 1e-6 if finding["precision"] == "fp32" else 2e-3
        assert finding["losses"] == pytest.approx(finding["expected"], rel=tolerance, abs=0), finding


MUON = ["optimizer.kind=muon", "optimizer.clip_norm=0"]


@pytest.mark.parametrize("kind", [[], MUON], ids=["adamw", "muon"])
def test_one_training_through_many_shapes(tiny, tmp_path, kind):
    """World 1 → 2 → 4 → 2 under ZeRO 0 → 1 → 3 → 2: the losses of an unbroken run, and what an
    operator reads."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = [*NEVER_REMOVED, "train.duration=8 steps", "checkpoint.every=2 steps", "train.micro_batch=2", *kind]
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


@pytest.mark.parametrize("stage", range(4))
def test_muon_goes_on_bit_for_bit(tiny, tmp_path, stage):
    """In bf16 on two processes, from a checkpoint of the same shape, as after a kill."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = [*NEVER_REMOVED, *MUON, "train.precision=bf16", f"train.zero_stage={stage}"]
    settings += ["train.duration=6 steps", "checkpoint.every=3 steps"]
    trained(tiny, whole, *settings)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-6")
    assert "from step 3" in trained(tiny, run, *settings, f"train.run={run}")
    saved = [
        zero_layout.open_checkpoint(where / "checkpoints" / "step-6", stage, groups(where)) for where in (run, whole)
    ]
    for (name, mine), theirs in zip(saved[0].pieces.items(), saved[1].pieces.values(), strict=True):
        for ours, other in zip(mine, theirs, strict=True):
            assert ours.values.keys() == other.values.keys()
            assert all(torch.equal(value, other.values[key]) for key, value in ours.values.items()), name
    kept = {key for piece in saved[0].pieces["blocks.0.fc1.weight"] for key in piece.values}
    assert kept == {"fp32", "momentum_buffer"}


def groups(run: Path) -> list[list[str]]:
    return json.loads((run / "checkpoints" / "step-6" / "state.json").read_text())["groups"]


def test_another_model_is_refused(tmp_path):
    saved = zero_layout.CheckpointFiles(tmp_path, {"a": (2,)}, {"a": lambda first, last: []}, 1.0)
    with pytest.raises(errors.ConfigError, match="holds 0 of 2 numbers of a"):
        saved.fill("a", zero_layout.Piece(0, {"fp32": torch.zeros(2)}))
