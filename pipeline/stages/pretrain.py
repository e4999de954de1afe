"""`pretrain CONFIG`: the training run. Goes on by itself from the newest complete checkpoint of its run folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.attention import chosen
from pipeline.checkpoint import newest
from pipeline.config import ONLINE, Config, ConfigError, micro_batch
from pipeline.ending import end
from pipeline.engine import Engine, World, from_first, setup_from, start_world, sums
from pipeline.metrics import say
from pipeline.model import Beit, training_flops
from pipeline.objective import masked_token_loss, online_tokens
from pipeline.optim import parameter_groups
from pipeline.precision import computing
from pipeline.streams import (
    Source,
    evaluation_batches,
    fitting_tokenizer,
    heldout,
    pretraining,
    refuse_other_tokenizers,
)
from pipeline.training import Job, run_training
from pipeline.weights import start_from
from shards.loader import Batch

Loss = Callable[[Engine, Batch], tuple[Tensor, dict[str, Tensor]]]

IDENTITY = ("data", "view", "model", "mask", "optimizer", "train", "loader")


def run(config: Config, stop: Callable[[], str]) -> int:
    """Pretrain; returns the exit code. `stop` says why to stop, or ''."""
    source = pretraining(config)
    apart = heldout(config) if config.data.heldout_images else None
    refuse_other_tokenizers(config)
    online = ONLINE in (config.data.tokens, config.data.heldout_tokens)
    tokenizer = fitting_tokenizer(config)[0] if online else None
    world = start_world(config.faults.hang_seconds)
    micro = micro_batch(config.train.global_batch, config.train.micro_batch, world.size, "train.global_batch")
    beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    beit.checkpointing = config.train.activation_checkpointing
    run_folder = Path(config.train.run)
    lines = [f"attention: {_kernels(config, world)}"]
    if config.train.init and from_first(newest(run_folder, lambda _: None) is None, world):
        lines.append(start_from(Path(config.train.init), beit, config.tokenizer.vocabulary))
    for line in lines if world.first else ():
        say(line)
    if tokenizer is not None:
        tokenizer.to(world.device)

    def loss(engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if tokenizer is not None and batch.tokenizer_pixels.numel():
            with computing(config.tokenizer.precision, world.device):
                batch = batch._replace(tokens=online_tokens(tokenizer.tokenize, batch))
        return masked_token_loss(config, engine.model, batch, engine.dtype)

    def evaluate(engine: Engine, _: int) -> dict[str, dict[str, float]]:
        return {"heldout": heldout_loss(config, engine, apart, loss)} if apart is not None else {}

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
        evaluate=evaluate if apart is not None else None,
        heldout_every=config.log.heldout_every if apart is not None else None,
        flops=training_flops(config.model, config.tokenizer.vocabulary, config.mask.num_patches),
    )
    _, finished = run_training(config, job, world, stop)
    return end(run_folder, finished, stop, world)


def _kernels(config: Config, world: World) -> str:
    """What attention runs with. Raises ConfigError where it cannot."""
    try:
        return chosen(config.model.kernels, world.device, config.model.width // config.model.heads)
    except ValueError as error:
        raise ConfigError(f"model.kernels: {error}") from error


@torch.no_grad()
def heldout_loss(config: Config, engine: Engine, apart: Source, loss_of: Loss) -> dict[str, float]:
    """Loss and masked accuracy on the held-out pairs, without drop path; every rank takes an equal share."""
    world = engine.world
    samples = min(config.log.heldout_samples, apart.samples) // world.size * world.size
    totals = torch.zeros(3, device=world.device)
    micro = engine.setup.micro_batch
    for batch in evaluation_batches(config, apart, samples=samples, micro=micro, rank=world.rank, world=world.size):
        loss, measures = loss_of(engine, batch.to(world.device))
        totals += torch.stack([loss, measures["masked_accuracy"], torch.ones_like(loss)]) * len(batch.samples)
    loss, accuracy, count = sums(totals).tolist()
    return {"loss": loss / count, "masked_accuracy": accuracy / count, "samples": count} if count else {}
