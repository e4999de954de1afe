"""What the `deepspeed` section may hold: every key of DeepSpeed's that nothing of ours decides.

A key that contradicts what is derived trains another model, has no effect, or ends a run at its first checkpoint, and
DeepSpeed says nothing. So each key of its configuration stands in one of the lists here (DeepSpeed 0.19; a test holds
them against it). Must not import deepspeed.
"""

import difflib
from typing import Any

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown

_BATCH = "train.global_batch and train.micro_batch (of tokenizer or finetune there) decide it"
_PRECISION = "train.precision decides it"
_OPTIMIZER = "the section optimizer decides it (of tokenizer or finetune: their own lr, weight_decay, …)"
_SAVING = "the section checkpoint decides it; checkpoints are written and read here"
_ORDER = "the stream decides the order of samples: data.seed, and the section loader"
_LAYOUT = "it changes where ZeRO keeps weights, and no checkpoint could be read again; leave it out"
_NUMBERS = "it changes the numbers that are computed; leave it out"
_NOTHING = "it has no effect on this training; leave it out"
_PLAN = "the number of processes and train.zero_stage decide how the model is spread; leave it out"

# dotted key: what decides instead, or why not
OURS = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": "optimizer.clip_norm decides it (finetune.clip_norm there)",
    "gradient_allreduce_op": "the loss is a mean over the global batch; optimizer.lr scales an update",
    "optimizer": _OPTIMIZER,
    "scheduler": "optimizer.lr, optimizer.lr_end and optimizer.warmup decide it",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "data_types": _PRECISION,
    "fp16.enabled": _PRECISION,
    "fp16.auto_cast": _PRECISION,
    "fp16.fp16_master_weights_and_grads": _PRECISION,
    "zero_allow_untested_optimizer": "optimizer.kind decides it",
    "zero_force_ds_cpu_optimizer": "optimizer.kind and train.offload_optimizer decide it",
    "compile": "train.compile decides it",
    "activation_checkpointing": "train.activation_checkpointing decides it; DeepSpeed's own is never called",
    "checkpoint": _SAVING,
    "datastates_ckpt": _SAVING,
    "nebula": _SAVING,
    "dataloader_drop_last": _ORDER,
    "data_efficiency": _ORDER,
    "curriculum_learning": _ORDER,
    "progressive_layer_drop": "model.drop_path decides it",
    "elasticity": "a run goes on with any number of processes by itself",
    "seq_parallel_communication_data_type": _NOTHING,
    "sequence_parallel_size": _PLAN,
    "data_parallel_size": _PLAN,
    "tensor_parallel": _PLAN,
    "expert_parallel": _PLAN,
    "pipeline": _PLAN,
    "use_data_before_expert_parallelism": _PLAN,
    "hybrid_engine": _NOTHING,
    "autotuning": "`plan` and `doctor` find a setting; DeepSpeed's autotuning starts by another command",
    "weight_quantization": _NUMBERS,
    "quantize_training": _NUMBERS,
    "compression_training": _NUMBERS,
    "sparse_gradients": _NOTHING,
    "sparse_attention": "model.kernels decides it",
    "eigenvalue": _NOTHING,
    "graph_harvesting": "train.compile_mode=reduce-overhead records CUDA graphs",
    "vocabulary_size": "tokenizer.vocabulary decides it",
    "disable_allgather": _NOTHING,
    "zero_optimization.stage": "train.zero_stage decides it",
    "zero_optimization.cpu_offload": "train.offload_optimizer decides it",
    "zero_optimization.cpu_offload_param": "write offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory inside of offload_param or offload_optimizer",
    "zero_optimization.zenflow": _LAYOUT,
    "zero_optimization.round_robin_gradients": _LAYOUT,
    "zero_optimization.parameter_alignment": _LAYOUT,
    "zero_optimization.legacy_stage1": _LAYOUT,
    "zero_optimization.mics_shard_size": _LAYOUT,
    "zero_optimization.mics_hierarchical_params_gather": _LAYOUT,
    "zero_optimization.zeropp_loco_param": _NUMBERS,
    "zero_optimization.compute_grad_norm": "the norm of the gradient is always taken: it is logged, and finds faults",
    "zero_optimization.load_from_fp32_weights": _SAVING,
    "zero_optimization.elastic_checkpoint": _SAVING,
    "zero_optimization.pipeline_loading_checkpoint": _SAVING,
    "zero_optimization.gather_16bit_weights_on_model_save": "`export` writes weights",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "`export` writes weights",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "`export` writes weights",
    "zero_optimization.offload_optimizer.super_offload": _LAYOUT,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it goes with super_offload, which is not taken",
    "zero_optimization.offload_optimizer.ratio": _LAYOUT,
    "zero_optimization.offload_optimizer.fast_init": _NOTHING,
}

# what reaches DeepSpeed, by section ("": the top): None where DeepSpeed itself refuses what it does not know
_STAGE_3 = (
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
    *("max_reuse_distance", "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
)
REACHES: dict[str, tuple[str, ...] | None] = {
    "": (
        *("zero_optimization", "fp16", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
        *(
            "comms_logger",
            "flops_profiler",
            "wall_clock_breakdown",
            "memory_breakdown",
            "steps_per_print",
            "dump_state",
        ),
        *("tensorboard", "wandb", "csv_monitor", "comet", "aio", "timers", "disable_python_gc", "log_level"),
        "torch_autocast",
    ),
    "fp16": (
        *("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis"),
        "min_loss_scale",
    ),
    "flops_profiler": (
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "comms_logger": None,
    "tensorboard": None,
    "wandb": None,
    "csv_monitor": None,
    "comet": None,
    "timers": None,
    "zero_optimization": (
        *("contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "offload_param", "offload_optimizer"),
        *("sub_group_size", "ignore_unused_parameters", "zero_hpz_partition_size", "memory_efficient_linear"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        *("override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "leaf_module"),
        *("save_muon_momentum_buffer_in_memory", *_STAGE_3, *(f"stage3_{name}" for name in _STAGE_3)),
    ),
    "zero_optimization.offload_optimizer": (
        *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write"),
    ),
    "zero_optimization.offload_param": None,
    "zero_optimization.leaf_module": None,
}


def refuse_deepspeed(config: Config) -> None:
    """Raise ConfigError, with the setting to use instead, for the first key of the section that is ours, is unknown, or
    has no effect beside the other settings."""
    _refuse_keys(config.deepspeed, "")
    _refuse_automatic(config.deepspeed, "deepspeed")
    for line in _conflicts(config):
        raise ConfigError(line)


def _refuse_keys(section: Any, where: str) -> None:
    known = REACHES.get(where, ())
    if not isinstance(section, dict):
        raise ConfigError(f"deepspeed.{where} is {shown(section)}; it must be a mapping of DeepSpeed's own keys")
    for key, value in section.items():
        name = f"{where}.{key}" if where else key
        if name in OURS:
            raise ConfigError(f"deepspeed.{name} is not passed on: {OURS[name]}")
        if known is not None and key not in known:
            others = [*known, *(ours.rpartition(".")[2] for ours in OURS if ours.rpartition(".")[0] == where)]
            near = difflib.get_close_matches(key[:100], others, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"deepspeed.{name[-100:]} is unknown to DeepSpeed, which would ignore it; {hint}")
        if name in REACHES:
            _refuse_keys(value, name)


def _refuse_automatic(value: Any, name: str) -> None:
    if isinstance(value, str) and value.strip().lower() == "auto":
        raise ConfigError(
            f"{name[-100:]} is auto, which means something to the transformers library alone; write a value, or leave "
            f"it out"
        )
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _refuse_automatic(inner, f"{name}.{key}")


def _conflicts(config: Config) -> list[str]:
    """Parts of the section that need other settings."""
    section, train = config.deepspeed, config.train
    zero = section.get("zero_optimization", {})
    optimizer, parameters = (_device(zero.get(name)) for name in ("offload_optimizer", "offload_param"))
    rules = (
        (
            "fp16" not in section or train.precision == "fp16",
            f"deepspeed.fp16 has no effect with train.precision {train.precision}; set train.precision=fp16, or leave "
            "it out",
        ),
        (
            "torch_autocast" not in section or train.precision == "fp32",
            f"deepspeed.torch_autocast needs train.precision fp32, which is {train.precision}; leave it out",
        ),
        (
            not parameters or train.zero_stage == 3,
            f"deepspeed.zero_optimization.offload_param needs train.zero_stage 3, which is {train.zero_stage}",
        ),
        (
            not optimizer or train.zero_stage > 0,
            "deepspeed.zero_optimization.offload_optimizer needs train.zero_stage 1, 2 or 3, which is 0",
        ),
        (
            optimizer != "nvme" or train.zero_stage == 3,
            f"deepspeed.zero_optimization.offload_optimizer.device nvme needs train.zero_stage 3, which is "
            f"{train.zero_stage}; cpu is for the others",
        ),
        (
            not optimizer or config.optimizer.kind != "muon",
            "deepspeed.zero_optimization.offload_optimizer is not for optimizer.kind muon; use adamw",
        ),
        (
            optimizer != "nvme" or isinstance(zero["offload_optimizer"].get("nvme_path"), str),
            "deepspeed.zero_optimization.offload_optimizer.device nvme needs nvme_path, a folder of every host",
        ),
        (
            optimizer != "nvme" or _buffers(zero["offload_optimizer"]),
            "deepspeed.zero_optimization.offload_optimizer.buffer_count must be at least 4 for device nvme (weights, "
            "gradient and two moments), 8 with pipeline_read or pipeline_write, 12 with both",
        ),
        (
            parameters != "nvme",
            "deepspeed.zero_optimization.offload_param.device nvme is not supported: DeepSpeed then keeps no copy of "
            "the weights that a checkpoint could be read into; use offload_param: {device: cpu}, and "
            "offload_optimizer: {device: nvme} for the optimizer, which is most of it",
        ),
    )
    return [line for holds, line in rules if not holds]


def optimizer_device(section: dict) -> str:
    """Where the section puts the optimizer: cpu, nvme, or '' for the device."""
    return _device(section.get("zero_optimization", {}).get("offload_optimizer"))


def _device(offload: Any) -> str:
    found = offload.get("device", "none") if isinstance(offload, dict) else "none"
    return "" if found == "none" else str(found)


def _buffers(offload: dict) -> bool:
    """Whether there are enough for what is on its way at once; DeepSpeed has 4 where none are named."""
    count, ways = offload.get("buffer_count", 4), ("pipeline_read", "pipeline_write")
    return not isinstance(count, int) or count >= 4 * (1 + sum(bool(offload.get(way)) for way in ways))
