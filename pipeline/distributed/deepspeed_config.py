"""DeepSpeed's own configuration, derived from ours."""

from dataclasses import dataclass
from typing import Any

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.distributed.collectives import World


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What DeepSpeed is configured from."""

    global_batch: int
    micro_batch: int
    accumulation: int
    precision: str
    zero_stage: int
    offload_optimizer: bool
    compile: bool
    clip_norm: float
    beta1: float
    beta2: float
    epsilon: float
    overrides: dict
    compile_mode: str = "default"
    muon: bool = False  # the groups are pipeline.training.optim.muon_groups
    ema_decay: float = 0.0  # of the moving average of AdamW's weights; 0: none is kept


# what a section asks DeepSpeed to print, which is else quiet
SPEAKS = ("wall_clock_breakdown", "memory_breakdown", "comms_logger", "dump_state", "flops_profiler", "steps_per_print")


def deepspeed_config(setup: Setup) -> dict:
    """DeepSpeed's own configuration. `setup.overrides` (the YAML's deepspeed section) goes into it, key by key; none of
    its keys is one of those derived here (pipeline.config.deepspeed_section), but for `steps_per_print`."""
    derived: dict[str, Any] = {
        "train_batch_size": setup.global_batch,
        "train_micro_batch_size_per_gpu": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "gradient_clipping": setup.clip_norm,
        "steps_per_print": 10 if any(name in setup.overrides for name in SPEAKS) else 10**9,
        "zero_optimization": {"stage": setup.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "betas": [setup.beta1, setup.beta2],
                "eps": setup.epsilon,
                "torch_adam": True,  # torch's own; DeepSpeed's would be compiled at run time
                "fused": True,
            },
        },
    }
    if setup.muon and setup.zero_stage == 3:
        derived["zero_optimization"]["reduce_scatter"] = False  # DeepSpeed refuses both
    if setup.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if setup.precision != "fp32":
        derived[setup.precision] = {"enabled": True}
    return _merged(derived, setup.overrides)


def _merged(base: dict, over: dict) -> dict:
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if nested else value
    return result


def setup_from(config: Config, world: World, micro: int) -> Setup:
    """The pretraining run's setup; `micro` from config.micro_batch."""
    train, optimizer = config.train, config.optimizer
    return Setup(
        global_batch=train.global_batch,
        micro_batch=micro,
        accumulation=train.global_batch // (micro * world.size),
        precision="bf16" if train.precision == "fp8" else train.precision,  # FP8 is inside the products
        zero_stage=train.zero_stage,
        offload_optimizer=train.offload_optimizer,
        compile=train.compile,
        compile_mode=train.compile_mode,
        clip_norm=optimizer.clip_norm,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        overrides=config.deepspeed,
        muon=optimizer.kind == "muon",
    )
