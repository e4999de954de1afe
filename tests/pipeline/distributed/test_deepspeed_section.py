"""The `deepspeed` section: each key of DeepSpeed's is decided; ours are refused, the rest arrives and is resumed."""

import dataclasses
import os
import shutil
from typing import Any

import pytest

from beitforge.pipeline.config.deepspeed_section import OURS, REACHES, refuse_deepspeed
from beitforge.pipeline.config.derived import refuse_world
from beitforge.pipeline.config.loading import from_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.distributed.deepspeed_config import Setup, deepspeed_config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.jsonl import read_metrics
from tests.conftest import TinySet
from tests.ranks import run_ranks

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="minutes: BEITFORGE_NIGHTLY=1")
ZERO = "zero_optimization"


def config(section: dict, **train: Any) -> Config:
    return from_dict({"deepspeed": section, "train": train}, "test")


def refusal(section: dict, **train: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_deepspeed(config(section, **train))
    line = str(caught.value)
    assert line.startswith("deepspeed.") and len(line.splitlines()) == 1 and len(line) < 700
    return line


def nested(dotted: str, value: Any) -> dict:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("name", OURS)
def test_what_is_ours_is_refused_with_what_decides_it(name):
    assert refusal(nested(name, 1), precision="fp16", zero_stage=3).startswith(f"deepspeed.{name} is not passed on: ")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train.micro_batch"),
        ({"train_batch_size": "auto"}, "train.global_batch"),
        ({ZERO: {"stage": 3}}, "train.zero_stage"),
        ({"gradient_clipping": "auto"}, "optimizer.clip_norm"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "train.precision"),
        ({"scheduler": {}}, "optimizer.warmup"),
        ({ZERO: {"reduce_bucket_size": "auto"}}, "reduce_bucket_size is auto"),
        ({ZERO: {"leaf_module": {"classes": [" Auto "]}}}, "is auto"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ({ZERO: {"overlap_com": True}}, "did you mean overlap_comm?"),
        ({ZERO: {"offload_optimizer": {"devise": "cpu"}}}, "did you mean device?"),
        ({"flops_profiler": {"enable": True}}, "did you mean enabled?"),
        ({"x" * 10_000: 1}, "unknown"),
        ({ZERO: 2}, "must be a mapping"),
        ({ZERO: None}, "must be a mapping"),
        ({"fp16": {"loss_scale": 8}}, "no effect with train.precision bf16"),
        ({ZERO: {"offload_param": {"device": "cpu"}}}, "needs train.zero_stage 3, which is 2"),
        ({ZERO: {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "needs train.zero_stage 3"),
        ({"torch_autocast": {"enabled": True}}, "needs train.precision fp32"),
    ],
    ids=str,
)
def test_refusals(section, words):
    assert words in refusal(section)


def test_offloading_to_nvme_needs_its_settings():
    """tests/nvme tries it; weights there could not be read from a checkpoint."""
    nvme = {"device": "nvme", "nvme_path": "/x"}
    refuse_deepspeed(config({ZERO: {"offload_optimizer": nvme}}, zero_stage=3))
    refuse_deepspeed(
        config({ZERO: {"offload_optimizer": {**nvme, "pipeline_read": True, "buffer_count": 8}}}, zero_stage=3)
    )
    for offload, words in (
        ({"device": "nvme"}, "needs nvme_path"),
        ({"device": "nvme", "nvme_path": 3}, "needs nvme_path"),
        ({**nvme, "buffer_count": 3}, "at least 4"),
        ({**nvme, "pipeline_write": True}, "8 with"),
    ):
        assert words in refusal({ZERO: {"offload_optimizer": offload}}, zero_stage=3)
    for more in ({}, {"offload_optimizer": nvme}):
        assert "offload_param: {device: cpu}" in refusal({ZERO: {"offload_param": nvme, **more}}, zero_stage=3)
    assert "needs train.zero_stage 1" in refusal({ZERO: {"offload_optimizer": {"device": "cpu"}}}, zero_stage=0)


def test_a_training_is_refused_and_a_report_is_not():
    """Runs of earlier versions may hold such a section: they are still read."""
    said = config({"train_batch_size": 8})
    for verb in ("pretrain", "finetune", "tokenizer", "doctor"):
        with pytest.raises(ConfigError, match="train_batch_size"):
            refuse_world(verb, said, 1)
    refuse_world("tokenize", said, 1)


def test_every_key_of_deepspeed_is_decided():
    """What its configuration asks for, as this version reads it, and every field of ZeRO's."""
    from beitforge.pipeline.distributed.process_group import quiet_deepspeed

    quiet_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    asked: set[str] = set()

    class Asking(dict):
        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

        def __copy__(self):
            return self

    DeepSpeedConfig(Asking(train_batch_size=1))
    top = {name for name in OURS if "." not in name} | {*REACHES[""]}
    assert asked - top == {"mpu"} - top or asked <= top, asked - top
    for where, model in (
        (ZERO, DeepSpeedZeroConfig),
        (f"{ZERO}.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    ):
        fields = {field.alias or name for name, field in model.model_fields.items()} | {*model.model_fields}
        ours = {name.removeprefix(f"{where}.") for name in OURS if name.startswith(f"{where}.")}
        assert fields <= ours | {*REACHES[where]}, where
        assert {*REACHES[where]} <= fields, where


def test_nothing_derived_is_a_key_that_reaches():
    """But for how often DeepSpeed prints, and what is offloaded."""
    setup = Setup(
        global_batch=8, micro_batch=4, accumulation=2, precision="bf16", zero_stage=2, offload_optimizer=True,
        compile=False, clip_norm=1.0, beta1=0.9, beta2=0.9, epsilon=1e-8, overrides={},
    )  # fmt: skip
    for each in (setup, dataclasses.replace(setup, precision="fp16"), dataclasses.replace(setup, muon=True)):
        derived = deepspeed_config(each)
        names = {name for name in derived if name in REACHES[""]}
        assert names <= {ZERO, "steps_per_print", "fp16"}
        assert {*derived[ZERO]} <= {"stage", "offload_optimizer", "reduce_scatter"}
        assert all(name in OURS or name in names for name in derived)
    spoken = deepspeed_config(dataclasses.replace(setup, overrides={"wall_clock_breakdown": True}))
    assert spoken["steps_per_print"] == 10 and deepspeed_config(setup)["steps_per_print"] > 10**6


COMMUNICATION = {"overlap_comm": True, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
TALKING = {
    "communication_data_type": "fp32",
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "flops_profiler": {"enabled": True, "profile_step": 2},
    "comms_logger": {"enabled": True, "prof_all": True},
    "csv_monitor": {"enabled": True, "output_path": "{folder}/csv", "job_name": "job"},
    "tensorboard": {"enabled": True, "output_path": "{folder}/board", "job_name": "job"},
}
STAGE_3 = {"stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000}
STAGE_3 |= {"stage3_max_live_parameters": 10_000, "stage3_max_reuse_distance": 1000, "overlap_comm": True}
CPU = {"device": "cpu", "pin_memory": False}
TOGETHER = {
    "talking, stage 2": (2, {**TALKING, "memory_breakdown": False, ZERO: COMMUNICATION}),
    "offload, stage 3": (3, {ZERO: {**STAGE_3, "offload_optimizer": CPU, "offload_param": CPU}}),
}
ALONE = {
    "communication, stage 1": (1, {ZERO: COMMUNICATION}),
    "no reduce_scatter": (2, {ZERO: {"reduce_scatter": False, "allgather_partitions": False}}),
    "communication_data_type, stage 0": (0, {"communication_data_type": "fp32", "prescale_gradients": True}),
    "offload, stage 1": (1, {ZERO: {"offload_optimizer": CPU}}),
    "offload, stage 2": (2, {ZERO: {"offload_optimizer": {"device": "cpu"}}}),
    "offload_param": (3, {ZERO: {"offload_param": CPU}}),
    "stage 3": (3, {ZERO: STAGE_3}),
    "fetching": (3, {ZERO: {"stage3_use_all_reduce_for_fetch_params": True, "enable_sanity_checks": True}}),
    "sequential": (3, {ZERO: {"stage3_allgather_sequential": True, "memory_efficient_linear": False}}),
    "leaf modules": (3, {ZERO: {"leaf_module": {"classes": ["Block"]}}}),
    "misc": (2, {"disable_python_gc": True, "log_level": "error", "timers": {"throughput": {"enabled": False}}}),
    **{f"{name}, stage 1": (1, {name: value}) for name, value in TALKING.items()},
}
SHORT = ("train.duration=4 steps", "checkpoint.every=2 steps", "log.every_steps=1", "optimizer.warmup=1 steps")
SHORT += ("data.heldout_images=", "data.heldout_tokens=")


def train(tiny: TinySet, run: Any, stage: int, section: dict, processes: int, code: int = 0) -> list[float]:
    words = [f"deepspeed.{name}={value}".replace("{folder}", str(run.parent)) for name, value in section.items()]
    words = [
        "beitforge",
        "pretrain",
        "--rank",
        tiny.config,
        f"train.run={run}",
        f"train.zero_stage={stage}",
        *SHORT,
        *words,
    ]
    done = run_ranks(*words, processes=processes)
    assert done.returncode == code, done.stderr
    if code:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.stderr, done.stderr
        return []
    return [line["loss"] for line in read_metrics(run, "train")]


def same_and_resumed(tiny: TinySet, folder: Any, stage: int, section: dict, processes: int) -> None:
    """The losses of a run without the section; and those again from a checkpoint in its middle."""
    plain = train(tiny, folder / "plain", stage, {}, processes)
    found = train(tiny, folder / "run", stage, section, processes)
    assert found == pytest.approx(plain, rel=1e-5) and len(found) == 4
    shutil.rmtree(folder / "run" / "checkpoints" / "step-4")
    assert train(tiny, folder / "run", stage, section, processes) == found


@pytest.mark.parametrize("name", TOGETHER)
def test_what_reaches_deepspeed(tiny, tmp_path, name):
    stage, section = TOGETHER[name]
    same_and_resumed(tiny, tmp_path, stage, section, 1)
    if section.get("csv_monitor"):
        assert list((tmp_path / "csv").rglob("*.csv")) and list((tmp_path / "board").rglob("events*"))


@nightly
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ALONE)
def test_each_of_what_reaches_deepspeed(tiny, tmp_path, name, processes):
    same_and_resumed(tiny, tmp_path, *ALONE[name], processes)


@pytest.mark.parametrize(
    "section",
    [{ZERO: {"reduce_bucket_size": -1}}, {"communication_data_type": "fp7"}, {"train_batch_size": 4}],
    ids=str,
)
def test_deepspeeds_own_objections_are_one_line(tiny, tmp_path, section):
    """Of two ranks of one host one says it."""
    train(tiny, tmp_path / "run", 2, section, 2, code=2)
    assert not (tmp_path / "run" / "checkpoints").exists()
