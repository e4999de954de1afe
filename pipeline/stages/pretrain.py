"""`pretrain CONFIG`: the training run. Goes on by itself from the newest complete checkpoint of its run folder."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from kernels.attention import chosen
from pipeline.checkpoint import newest
from pipeline.config import Config, ConfigError, micro_batch
from pipeline.ending import end
from pipeline.engine import Engine, World, from_first, setup_from
from pipeline.evaluation import Evaluations, Judged, judged, with_tokens
from pipeline.metrics import say
from pipeline.model import Beit, training_flops
from pipeline.objective import masked_token_loss
from pipeline.opening import on_every_rank, start_with
from pipeline.optim import parameter_groups
from pipeline.streams import Source, fingerprints, pretraining, refuse_other_tokenizers
from pipeline.training import Job, run_training
from pipeline.weights import start_from
from shards.stream.loader import Batch

IDENTITY = ("data", "view", "model", "mask", "optimizer", "train", "loader")


def run(config: Config, stop: Callable[[], str]) -> int:
    """Pretrain; returns the exit code. `stop` says why to stop, or ''."""
    world, (source, sets) = start_with(config, lambda: _opened(config), _facts)
    batch = config.train.global_batch, config.train.micro_batch
    micro = on_every_rank(lambda: micro_batch(*batch, world.size, "train.global_batch"), world)
    beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    beit.checkpointing = config.train.activation_checkpointing
    run_folder = Path(config.train.run)
    lines = [f"attention: {on_every_rank(lambda: _kernels(config, world), world)}"]
    if config.train.init and from_first(newest(run_folder, lambda _: None) is None, world):
        init = Path(config.train.init)
        lines.append(on_every_rank(lambda: start_from(init, beit, config.tokenizer.vocabulary), world))
    for line in lines if world.first else ():
        say(line)
    steps = config.train.duration.steps(source.samples, config.train.global_batch)

    def loss(engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return masked_token_loss(config, engine.model, with_tokens(config, sets.tokenizer, batch), engine.dtype)

    job = Job(
        label="pretrain",
        run=run_folder,
        sections=IDENTITY,
        source=source,
        module=beit,
        groups=parameter_groups(beit, config.optimizer.weight_decay),
        setup=setup_from(config, world, micro),
        duration=config.train.duration,
        warmup=config.optimizer.warmup,
        peak_lr=config.optimizer.lr,
        end_lr=config.optimizer.lr_end,
        save_every=config.checkpoint.every,
        objective=lambda engine, _: lambda _, batch, __: loss(engine, batch),
        evaluate=Evaluations(config, sets, world, steps, say),
        heldout_every=config.log.heldout_every,
        flops=training_flops(config.model, config.tokenizer.vocabulary, config.mask.num_patches),
    )
    _, finished = run_training(config, job, world, stop)
    return end(run_folder, finished, stop, world)


def _opened(config: Config) -> tuple[Source, Judged]:
    """What the run reads: the stream, and what it is judged on."""
    source = pretraining(config)
    refuse_other_tokenizers(config)
    return source, judged(config)


def _facts(opened: tuple[Source, Judged]) -> dict[str, str]:
    """What has to be the same on every host. New views need a tokenizer, without which they are left out."""
    source, sets = opened
    labelled, test = (*sets.labelled, None, None)[:2]
    return fingerprints({"": source, "held-out ": sets.heldout, "labelled ": labelled, "labelled test ": test})


def _kernels(config: Config, world: World) -> str:
    """What attention runs with. Raises ConfigError where it cannot."""
    try:
        return chosen(config.model.kernels, world.device, config.model.width // config.model.heads)
    except ValueError as error:
        raise ConfigError(f"model.kernels: {error}") from error
