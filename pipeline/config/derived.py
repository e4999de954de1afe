"""What follows from the settings and the number of processes: micro batches, folders, limits. Must not know torch."""

from pathlib import Path

from beitforge.pipeline.config.deepspeed_section import optimizer_device, refuse_deepspeed
from beitforge.pipeline.config.settings import Config, Finetune
from beitforge.pipeline.errors import ConfigError


def micro_batch(global_batch: int, at_most: int, world: int, where: str) -> int:
    """The largest micro batch ≤ `at_most` that `world` processes can build `global_batch` from."""
    if global_batch % world:
        raise ConfigError(
            f"{where} {global_batch} does not divide over {world} processes; choose a multiple of {world}"
        )
    per_process = global_batch // world
    return max(size for size in range(1, min(at_most, per_process) + 1) if per_process % size == 0)


def tuning_micro_batch(tune: Finetune, world: int) -> int:
    """The micro batch of fine-tuning on `world` processes: an even number where images are mixed in pairs."""
    where = "finetune.global_batch"
    if not tune.mixes:
        return micro_batch(tune.global_batch, tune.micro_batch, world, where)
    if tune.global_batch % (2 * world) or tune.micro_batch < 2:
        raise ConfigError(
            f"{where} {tune.global_batch}, finetune.micro_batch {tune.micro_batch}: mixup and cutmix mix pairs, which "
            f"these do not divide into over {world} processes; choose a multiple of {2 * world} and at least 2, or set "
            f"finetune.mixup=0 finetune.cutmix=0"
        )
    return 2 * micro_batch(tune.global_batch // 2, tune.micro_batch // 2, world, where)


def work_folder(verb: str, config: Config) -> Path:
    """The folder that a verb writes to: a run folder, or the token shards of tokenize. Raises ConfigError for a URL."""
    folders = {
        "pretrain": config.train.run,
        "finetune": config.finetune.run,
        "doctor": config.train.run,
        "tokenizer": f"{config.data.tokenizer}/training",
        "tokenize": config.data.tokens,
    }
    if "://" in folders[verb]:
        raise ConfigError(f"{folders[verb]} is a URL: `{verb}` writes into a folder; upload it when it is complete")
    return Path(folders[verb])


def refuse_world(verb: str, config: Config, world: int) -> None:
    """Raise ConfigError when `world` processes cannot build the verb's global batch, or the deepspeed section says what
    other settings decide."""
    if verb != "tokenize":
        refuse_deepspeed(config)
    if verb in ("pretrain", "doctor"):
        micro_batch(config.train.global_batch, config.train.micro_batch, world, "train.global_batch")
    if verb == "finetune":
        refuse_tuning(config)
        tuning_micro_batch(config.finetune, world)
    if verb == "tokenizer":
        micro_batch(config.tokenizer.global_batch, config.tokenizer.micro_batch, world, "tokenizer.global_batch")


def refuse_tuning(config: Config) -> None:
    """Raise ConfigError for settings of fine-tuning that do not go with those it takes from other sections."""
    tune, kernels = config.finetune, config.model.kernels
    if tune.attention_dropout and kernels in ("fused", "sdpa"):
        raise ConfigError(
            f"finetune.attention_dropout is not for model.kernels {kernels}, which never holds attention's "
            f"probabilities; use auto"
        )
    if tune.ema_decay and optimizer_device(config.deepspeed) == "nvme":
        raise ConfigError(
            "finetune.ema_decay is not for deepspeed.zero_optimization.offload_optimizer.device nvme, from where its "
            "average would have to be read at every step; use cpu"
        )


def allowed_bad(samples: int, share: float) -> int:
    """How many samples of a set may be bad that were not known to be: the share of them (data.bad_sample_budget),
    rounded up."""
    return -int(-(samples * share) // 1)
