"""Settings that fit each other, and one line for those that do not."""

import pytest

from beitforge.pipeline.config.derived import micro_batch
from beitforge.pipeline.errors import ConfigError
from tests.pipeline.config.loading import refusal

MUON = ["optimizer.kind=muon", "optimizer.clip_norm=0"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.positions=learned"], ["model.positions", "'learned'", "absolute, relative_shared, relative"]),
        (["model.kernels=cuda"], ["model.kernels", "'cuda'", "auto, fused, sdpa, reference"]),
        (["train.precision=int8"], ["train.precision", "'int8'", "bf16, fp16, fp32, fp8"]),
        (["train.zero_stage=4"], ["train.zero_stage", "4", "0, 1, 2, 3"]),
        (["train.offload_optimizer=true", "train.zero_stage=0"], ["train.offload_optimizer", "train.zero_stage"]),
        (["optimizer.kind=muon"], ["optimizer.clip_norm 3", "set optimizer.clip_norm=0"]),
        ([*MUON, "train.precision=fp16"], ["optimizer.kind muon", "train.precision fp16", "use bf16"]),
        ([*MUON, "train.offload_optimizer=true"], ["optimizer.kind muon", "train.offload_optimizer"]),
        (["train.activation_checkpointing=selective", "train.compile=true"], ["selective", "train.compile"]),
        (["train.activation_checkpointing=some"], ["train.activation_checkpointing", "none, selective, full"]),
        (["train.precision=fp8", "train.zero_stage=3"], ["train.precision fp8", "train.zero_stage 3"]),
        (["train.precision=fp8", "model.width=760", "model.heads=10"], ["multiples of 16", "model.width 760"]),
        (["train.precision=fp8", "model.mlp_ratio=4.01"], ["multiples of 16", "3079"]),
        (["model.input_size=220"], ["model.input_size 220", "model.patch_size 16"]),
        (["model.input_size=220x224"], ["model.input_size 220x224", "model.patch_size 16"]),
        (["model.input_size=224x320"], ["14×20", "14×14", "must be equal"]),
        (["tokenizer.stride=7"], ["the encoder's grid is 14×14", "16×16"]),
        (["tokenizer.precision=int8"], ["tokenizer.precision", "'int8'", "fp32, tf32, fp16, bf16"]),
        (["model.heads=7"], ["model.width 768", "model.heads 7"]),
        (["tokenizer.input_size=100"], ["tokenizer.input_size 100", "8"]),
        (["model.input_size=384"], ["24×24", "14×14", "must be equal"]),
        (["mask.num_patches=196"], ["mask.num_patches 196", "196"]),
        (["mask.min_block=76"], ["mask.min_block 76", "mask.num_patches 75"]),
        (["mask.max_block=15"], ["mask.max_block 15", "mask.min_block 16"]),
        (["mask.aspect_min=0"], ["mask.aspect_min", "(0, 1]"]),
        (["mask.aspect_min=1.5"], ["mask.aspect_min", "1.5"]),
        (["model.drop_path=1"], ["model.drop_path", "[0, 1)"]),
        (["model.drop_path=-0.1"], ["model.drop_path", "-0.1"]),
        (["tokenizer.vocabulary=65537"], ["tokenizer.vocabulary is 65537", "at most 65536", "16 bits"]),
        (["view.area_min=0"], ["view.area_min"]),
        (["view.area_max=1.5"], ["view.area_max"]),
        (["view.area_min=0.9", "view.area_max=0.5"], ["view.area_min"]),
        (["view.aspect_min=2"], ["view.aspect_min"]),
        (["data.bad_sample_budget=2"], ["data.bad_sample_budget", "[0, 1]"]),
        (["loader.workers=-1"], ["loader.workers", "-1", "at least 0"]),
    ],
)
def test_impossible_combinations_are_refused(tmp_path, overrides, words):
    line = refusal(tmp_path, "", *overrides)
    assert all(word in line for word in words), line


AT_LEAST_ONE = {
    "model": ["input_size", "patch_size", "layers", "width", "heads"],
    "tokenizer": ["input_size", "stride", "vocabulary", "width", "embedding", "global_batch", "micro_batch"],
    "train": ["global_batch", "micro_batch"],
    "view": ["num_views"],
    "mask": ["num_patches", "min_block"],
    "loader": ["prefetch", "chunk", "window", "lanes"],
    "checkpoint": ["keep"],
    "log": ["every_steps", "heldout_samples"],
}


@pytest.mark.parametrize("name", [f"{section}.{key}" for section, keys in AT_LEAST_ONE.items() for key in keys])
def test_counts_are_at_least_one(tmp_path, name):
    assert f"{name} is 0; it must be at least 1" in refusal(tmp_path, "", f"{name}=0")


@pytest.mark.parametrize(
    "overrides",
    [
        "data.heldout_images=somewhere",  # and no heldout_tokens: `tokenize` would write into the working directory
        "mask.num_patches=190;mask.min_block=185",  # more than 13 × 13: no block fits, however rounded
        "train.duration=inf epochs",
        "optimizer.lr=.inf",
        "optimizer.lr=-1",
        "optimizer.beta1=1",
        "view.flip=7",
        "view.brightness=-1",
        "model.std=[0, 1, 1]",
        "model.mlp_ratio=0",
        "tokenizer.width=3",
        "tokenizer.temperature_end=0",
        "data.seed=1e30",
    ],
)
def test_more_impossible_settings_are_refused(tmp_path, overrides):
    refusal(tmp_path, "", *overrides.split(";"))


@pytest.mark.parametrize(
    ("global_batch", "at_most", "world", "expected"),
    [
        (2048, 128, 8, 128),
        (2048, 128, 64, 32),
        (2048, 100, 8, 64),
        (24, 5, 2, 4),
        (7, 7, 1, 7),
        (7, 6, 1, 1),
        (8, 9, 8, 1),
    ],
)
def test_micro_batch_is_the_largest_that_divides(global_batch, at_most, world, expected):
    assert micro_batch(global_batch, at_most, world, "train.global_batch") == expected


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch 2048 does not divide over 3 processes; .*of 3$"):
        micro_batch(2048, 128, 3, "train.global_batch")
