"""What no run can have: values outside their setting's rule, and settings that do not fit each other.

Each is refused with one line. The rule of a single setting stands in its field; here are those between settings.
"""

import dataclasses

from beitforge.pipeline.config.fields import find_rules, find_violation
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError


def validate(config: Config, where: str) -> None:
    """Raise ConfigError, with the value, the rule and the cure, for the first thing that cannot be."""
    for rules in (_fields, _pairs, _shapes):  # in this order: _shapes divides by what _fields has found to be positive
        for line in rules(config):
            raise ConfigError(f"{where}: {line}")


def _fields(config: Config) -> list[str]:
    """Every setting within its own rule."""
    lines = []
    for section in dataclasses.fields(config):
        if section.name == "deepspeed":
            continue
        values = getattr(config, section.name)
        for name, rule in find_rules(values).items():
            lines.append(find_violation(f"{section.name}.{name}", getattr(values, name), rule))
    return [line for line in lines if line]


def _pairs(config: Config) -> list[str]:
    """Settings that need each other, and ranges whose ends are in order."""
    data, train, view, tune = config.data, config.train, config.view, config.finetune
    muon = config.optimizer.kind == "muon"
    rules = (
        (
            not muon or train.precision != "fp16",
            "optimizer.kind muon is not for train.precision fp16: DeepSpeed adds up its momentum from gradients of "
            "changing loss scales; use bf16",
        ),
        (
            not muon or not train.offload_optimizer,
            "optimizer.kind muon is not for train.offload_optimizer; use a higher train.zero_stage, or adamw",
        ),
        (
            not muon or config.optimizer.clip_norm == 0,
            f"optimizer.kind muon is not for optimizer.clip_norm {config.optimizer.clip_norm:g}: under ZeRO, DeepSpeed "
            "would clip its updates, whose size the learning rate sets; set optimizer.clip_norm=0",
        ),
        (
            not train.offload_optimizer or train.zero_stage > 0,
            "train.offload_optimizer needs train.zero_stage 1, 2 or 3",
        ),
        (
            train.activation_checkpointing != "selective" or not train.compile,
            "train.activation_checkpointing selective is not for train.compile, with which torch chooses what to "
            "recompute; set it to none, or full",
        ),
        (
            train.precision != "fp8" or train.zero_stage < 3,
            "train.precision fp8 is not for train.zero_stage 3: torchao would keep gathered weights until backward; "
            "use a lower stage, or bf16",
        ),
        (
            bool(data.heldout_images) == bool(data.heldout_tokens),
            "data.heldout_images and data.heldout_tokens go together; give both or neither",
        ),
        (
            not data.labelled_test or bool(data.labelled_images),
            "data.labelled_test needs data.labelled_images; give both or neither",
        ),
        (
            view.area_min <= view.area_max,
            f"view.area_min {view.area_min} is more than view.area_max {view.area_max}; exchange them",
        ),
        (
            view.aspect_min <= view.aspect_max,
            f"view.aspect_min {view.aspect_min} is more than view.aspect_max {view.aspect_max}; exchange them",
        ),
        (
            tune.area_min <= tune.area_max,
            f"finetune.area_min {tune.area_min} is more than finetune.area_max {tune.area_max}; exchange them",
        ),
    )
    return [line for holds, line in rules if not holds]


def _shapes(config: Config) -> list[str]:
    """Grids that meet, widths that divide, blocks that fit."""
    model, mask, tokenizer = config.model, config.mask, config.tokenizer
    lines = []
    if any(side % model.patch_size for side in model.input_size):
        lines.append(f"model.input_size {model.input_size} is not a multiple of model.patch_size {model.patch_size}")
    if model.width % model.heads:
        lines.append(f"model.width {model.width} does not divide into model.heads {model.heads}; choose a multiple")
    hidden = int(model.width * model.mlp_ratio)
    if config.train.precision == "fp8" and (model.width % 16 or hidden % 16):
        lines.append(
            f"train.precision fp8 multiplies by 16 numbers at once: model.width {model.width} and the MLP's {hidden} "
            "(model.mlp_ratio) must be multiples of 16; or use bf16"
        )
    if any(side % tokenizer.stride for side in tokenizer.input_size):
        lines.append(
            f"tokenizer.input_size {tokenizer.input_size} is not a multiple of tokenizer.stride {tokenizer.stride}"
        )
    if tokenizer.width % 4:
        lines.append(f"tokenizer.width is {tokenizer.width}; it must be a multiple of 4")
    (rows, columns), (token_rows, token_columns) = model.grid, tokenizer.grid
    if model.grid != tokenizer.grid:
        lines.append(
            f"the encoder's grid is {rows}×{columns} (model.input_size / model.patch_size) but the tokenizer's "
            f"{token_rows}×{token_columns} (tokenizer.input_size / tokenizer.stride); they must be equal"
        )
    if mask.num_patches >= model.num_patches:
        lines.append(f"mask.num_patches {mask.num_patches} must be less than the {model.num_patches} patches of a view")
    if mask.min_block > mask.num_patches:
        lines.append(f"mask.min_block {mask.min_block} is more than mask.num_patches {mask.num_patches}")
    if 0 < mask.max_block < mask.min_block:
        lines.append(f"mask.max_block {mask.max_block} is less than mask.min_block {mask.min_block}; raise it")
    largest = (rows - 1) * (columns - 1)
    if mask.min_block > largest:
        lines.append(f"mask.min_block {mask.min_block} is more than the {largest} patches a block can have")
    return lines
