"""What no run can have: impossible values and combinations, each refused with one line. Knows the settings alone."""

import dataclasses

from beitforge.pipeline.config.settings import (
    DECODERS,
    KERNELS,
    POSITIONS,
    PRECISIONS,
    TOKENIZER_PRECISIONS,
    Config,
    Duration,
    Size,
)
from beitforge.pipeline.errors import ConfigError

_AT_LEAST_ONE = {
    "model": ("input_size", "patch_size", "layers", "width", "heads"),
    "tokenizer": ("input_size", "stride", "vocabulary", "width", "embedding", "global_batch", "micro_batch"),
    "train": ("global_batch", "micro_batch"),
    "finetune": ("input_size", "global_batch", "micro_batch"),
    "view": ("num_views",),
    "mask": ("num_patches", "min_block"),
    "loader": ("prefetch", "chunk", "window", "lanes"),
    "checkpoint": ("keep",),
    "faults": ("max_skipped",),
    "log": ("every_steps", "heldout_samples"),
}

_INSTEAD = {"log.heldout_every": "; log.evaluation_share=0 leaves evaluations out"}
_MAY_BE_NOTHING = ("optimizer.warmup", "tokenizer.warmup", "finetune.warmup", "checkpoint.keep_every")


def validate(config: Config, where: str) -> None:
    """Raise ConfigError, with the value, the rule and the cure, for the first thing that cannot be."""
    for rules in (_numbers, _places, _choices, _shapes, _ranges):  # in this order: the later ones divide by what counts
        for line in rules(config):
            raise ConfigError(f"{where}: {line}")


def _numbers(config: Config) -> list[str]:
    """Nothing but a seed is negative, what counts is at least one, and a seed fits 64 bits with its sign."""
    lines = []
    for section in dataclasses.fields(config):
        if section.name == "deepspeed":
            continue
        values = getattr(config, section.name)
        for item in dataclasses.fields(values):
            name, value = f"{section.name}.{item.name}", getattr(values, item.name)
            least = 1 if item.name in _AT_LEAST_ONE.get(section.name, ()) else 0
            least = -(2**63) if item.name == "seed" else least
            smallest = min(value) if isinstance(value, Size) else value
            if isinstance(smallest, int | float) and smallest < least:
                lines.append(f"{name} is {value}; it must be at least {least}")
            if isinstance(value, Duration) and name not in _MAY_BE_NOTHING and value.count <= 0:
                lines.append(f"{name} is {value}; it must be more than nothing{_INSTEAD.get(name, '')}")
            if item.name == "seed" and value >= 2**63:
                lines.append(f"{name} is {value}; it must be less than 2^63")
    return lines


def _places(config: Config) -> list[str]:
    """URLs where shard sets are read, and folders elsewhere."""
    data, train, finetune = config.data, config.train, config.finetune
    folders = {"data.cache": data.cache, "data.tokenizer": data.tokenizer, "train.run": train.run}
    folders |= {"finetune.run": finetune.run, "finetune.init": finetune.init}
    lines = [
        f"{name} is {where}, a URL; it must be a folder of this machine"
        for name, where in {**folders, "train.init": train.init}.items()
        if "://" in where
    ]
    names = ("images", "tokens", "heldout_images", "heldout_tokens", "labelled_images", "labelled_test")
    sets = {name: getattr(data, name) for name in names}
    for name, where in sets.items():
        scheme, colon, rest = where.partition(":/")
        if colon and scheme.isalnum() and not (rest.startswith("/") and rest.strip("/")):
            lines.append(f"data.{name} is {where}; a URL is written SCHEME://PLACE")
    return lines


def _choices(config: Config) -> list[str]:
    model, train = config.model, config.train
    taken = (
        ("model.positions", model.positions, POSITIONS),
        ("model.kernels", model.kernels, KERNELS),
        ("loader.decoder", config.loader.decoder, DECODERS),
        ("train.precision", train.precision, PRECISIONS),
        ("tokenizer.precision", config.tokenizer.precision, TOKENIZER_PRECISIONS),
        ("train.zero_stage", train.zero_stage, (0, 1, 2, 3)),
    )
    lines = [f"{n} is {v!r}; it takes {', '.join(map(str, known))}" for n, v, known in taken if v not in known]
    if train.offload_optimizer and train.zero_stage == 0:
        lines.append("train.offload_optimizer needs train.zero_stage 1, 2 or 3")
    if bool(config.data.heldout_images) != bool(config.data.heldout_tokens):
        lines.append("data.heldout_images and data.heldout_tokens go together; give both or neither")
    if config.data.labelled_test and not config.data.labelled_images:
        lines.append("data.labelled_test goes with data.labelled_images; give both or neither")
    return lines


def _shapes(config: Config) -> list[str]:
    """Grids that meet, widths that divide, blocks that fit."""
    model, mask, tokenizer = config.model, config.mask, config.tokenizer
    lines = []
    if any(side % model.patch_size for side in model.input_size):
        lines.append(f"model.input_size {model.input_size} is not a multiple of model.patch_size {model.patch_size}")
    if model.width % model.heads:
        lines.append(f"model.width {model.width} does not divide into model.heads {model.heads}; choose a multiple")
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
    largest = (rows - 1) * (columns - 1)
    if mask.min_block > largest:
        lines.append(f"mask.min_block {mask.min_block} is more than the {largest} patches a block can have")
    return lines


def _ranges(config: Config) -> list[str]:
    """Shares, probabilities and other numbers with two ends."""
    model, view, optimizer, tokenizer = config.model, config.view, config.optimizer, config.tokenizer
    tune = config.finetune
    rules = (
        (0 < config.mask.aspect_min <= 1, f"mask.aspect_min is {config.mask.aspect_min}; it lies in (0, 1]"),
        (model.drop_path < 1, f"model.drop_path is {model.drop_path}; it lies in [0, 1)"),
        (model.mlp_ratio > 0, f"model.mlp_ratio is {model.mlp_ratio}; it must be more than 0"),
        (min(model.std) > 0, f"model.std is {list(model.std)}; each must be more than 0"),
        (view.flip <= 1, f"view.flip is {view.flip}; a probability lies in [0, 1]"),
        (0 < view.area_min <= view.area_max <= 1, "view.area_min and view.area_max must satisfy 0 < min ≤ max ≤ 1"),
        (0 < view.aspect_min <= view.aspect_max, "view.aspect_min and view.aspect_max must satisfy 0 < min ≤ max"),
        (optimizer.beta1 < 1, f"optimizer.beta1 is {optimizer.beta1}; it lies in [0, 1)"),
        (optimizer.beta2 < 1, f"optimizer.beta2 is {optimizer.beta2}; it lies in [0, 1)"),
        (tokenizer.temperature_start > 0, "tokenizer.temperature_start must be more than 0"),
        (tokenizer.temperature_end > 0, "tokenizer.temperature_end must be more than 0"),
        (tokenizer.anneal_share <= 1, f"tokenizer.anneal_share is {tokenizer.anneal_share}; it lies in [0, 1]"),
        (tokenizer.vocabulary <= 65536, f"tokenizer.vocabulary {tokenizer.vocabulary} does not fit 16 bits (65536)"),
        (0 < tune.label_share <= 1, f"finetune.label_share is {tune.label_share}; it lies in (0, 1]"),
        (0 < tune.layer_decay <= 1, f"finetune.layer_decay is {tune.layer_decay}; it lies in (0, 1]"),
        (tune.drop_path < 1, f"finetune.drop_path is {tune.drop_path}; it lies in [0, 1)"),
        (0 < tune.area_min <= tune.area_max <= 1, "finetune.area_min and area_max must satisfy 0 < min ≤ max ≤ 1"),
        (tune.flip <= 1, f"finetune.flip is {tune.flip}; a probability lies in [0, 1]"),
        (tune.erase <= 1, f"finetune.erase is {tune.erase}; a probability lies in [0, 1]"),
        (tune.smoothing < 1, f"finetune.smoothing is {tune.smoothing}; it lies in [0, 1)"),
        (0 < tune.test_crop <= 1, f"finetune.test_crop is {tune.test_crop}; it lies in (0, 1]"),
        (config.log.evaluation_share <= 1, f"log.evaluation_share is {config.log.evaluation_share}; it lies in [0, 1]"),
        (config.data.cache_gb > 0, f"data.cache_gb is {config.data.cache_gb}; it must be more than 0"),
        (config.data.bad_sample_budget <= 1, "data.bad_sample_budget is a share of the set, in [0, 1]"),
    )
    return [line for holds, line in rules if not holds]
