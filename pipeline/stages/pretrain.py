"""`pretrain CONFIG`: the training run. Goes on by itself from the newest complete checkpoint of its run folder."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from beitforge.kernels.attention import chosen
from beitforge.pipeline.config.derived import micro_batch
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import say
from beitforge.pipeline.data.batches import require_decoder
from beitforge.pipeline.data.pretraining import DataSource, fingerprints, pretraining, refuse_other_tokenizers
from beitforge.pipeline.distributed.collectives import World, broadcast_object
from beitforge.pipeline.distributed.deepspeed_config import setup_from
from beitforge.pipeline.distributed.device import DTYPES
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.startup import open_and_join, run_on_all_ranks
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.evaluation.evaluations import Evaluations, EvaluationSets, open_evaluation_sets, with_tokens
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.model.float8 import use_float8
from beitforge.pipeline.plan.costs import training_flops
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.training.objectives import masked_token_loss
from beitforge.pipeline.training.optim import pretraining_groups
from beitforge.pipeline.training.shutdown import shut_down
from beitforge.pipeline.training.trainer import Job, run_training
from beitforge.pipeline.weights.encoder import initialise_from
from beitforge.shards.stream.loader import Batch

IDENTITY = ("data", "view", "model", "mask", "optimizer", "train", "loader")


def run(config: Config, stop: Callable[[], str]) -> int:
    """Pretrain; returns the exit code. `stop` says why to stop, or ''."""
    world, job = prepare(config, lambda: newest(Path(config.train.run), lambda _: None) is None)
    _, finished = run_training(config, job, world, stop)
    return shut_down(job.run, finished, stop, world)


def prepare(config: Config, begins: Callable[[], bool]) -> tuple[World, Job]:
    """Join the others and put the training together. begins: asked on the first rank, whether no checkpoint gives the
    weights, so that train.init has to."""
    world, (source, sets) = open_and_join(config, lambda: _opened(config), _fingerprints)
    batch = config.train.global_batch, config.train.micro_batch
    micro = run_on_all_ranks(lambda: micro_batch(*batch, world.size, "train.global_batch"), world)
    beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    beit.checkpointing = config.train.activation_checkpointing
    lines = [f"attention: {run_on_all_ranks(lambda: _kernels(config, world), world)}"]
    if config.train.precision == "fp8":
        lines.append(run_on_all_ranks(lambda: use_float8(beit, world.device), world))
    if config.train.init and broadcast_object(world.first and begins(), world):
        init = Path(config.train.init)
        lines.append(run_on_all_ranks(lambda: initialise_from(init, beit, config.tokenizer.vocabulary), world))
    for line in lines if world.first else ():
        say(line)
    steps = config.train.duration.steps(source.samples, config.train.global_batch)

    def loss(engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return masked_token_loss(config, engine.model, with_tokens(config, sets.tokenizer, batch), engine.dtype)

    job = Job(
        label="pretrain",
        run=Path(config.train.run),
        sections=IDENTITY,
        source=source,
        judged=tuple(apart for apart in (sets.heldout, *sets.labelled) if apart is not None),
        module=beit,
        groups=pretraining_groups(beit, config.optimizer),
        setup=setup_from(config, world, micro),
        duration=config.train.duration,
        warmup=config.optimizer.warmup,
        peak_lr=config.optimizer.lr,
        end_lr=config.optimizer.lr_end,
        weight_decay=(config.optimizer.weight_decay, config.optimizer.last_weight_decay),
        save_every=config.checkpoint.every,
        objective=lambda engine, _: lambda _, batch, __: loss(engine, batch),
        evaluate=Evaluations(config, sets, world, steps, say),
        heldout_every=config.log.heldout_every if config.log.evaluation_share else None,
        flops=training_flops(config.model, config.tokenizer.vocabulary, config.mask.num_patches),
    )
    return world, job


def _opened(config: Config) -> tuple[DataSource, EvaluationSets]:
    """What the run reads: the stream, and what it is judged on."""
    source = pretraining(config)
    require_decoder(source.stream)
    refuse_other_tokenizers(config)
    return source, open_evaluation_sets(config)


def _fingerprints(opened: tuple[DataSource, EvaluationSets]) -> dict[str, str]:
    """What has to be the same on every host. New views need a tokenizer, without which they are left out."""
    source, sets = opened
    labelled, test = (*sets.labelled, None, None)[:2]
    return fingerprints({"": source, "held-out ": sets.heldout, "labelled ": labelled, "labelled test ": test})


def _kernels(config: Config, world: World) -> str:
    """What attention runs with. Raises ConfigError where it cannot."""
    try:
        model, dtype = config.model, DTYPES[config.train.precision]
        positions, head_size = model.num_patches + 1, model.width // model.heads
        return chosen(model.kernels, world.device, positions, model.heads, head_size, dtype)
    except ValueError as error:
        raise ConfigError(f"model.kernels: {error}") from error
