"""`finetune CONFIG`: supervised training of a pretrained encoder. Goes on by itself from its newest checkpoint."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from beitforge.pipeline.checkpoints.choice import newest_whole
from beitforge.pipeline.checkpoints.live_layout import averaged
from beitforge.pipeline.config.derived import refuse_tuning, tuning_micro_batch
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import say
from beitforge.pipeline.data.batches import even_batches, own_images
from beitforge.pipeline.data.labelled import num_classes, supervised, supervised_test
from beitforge.pipeline.data.pretraining import DataSource, fingerprints
from beitforge.pipeline.distributed.collectives import World, all_sum, broadcast_object
from beitforge.pipeline.distributed.deepspeed_config import Setup, setup_from
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.startup import open_and_join, run_on_all_ranks
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Classifier, initialise
from beitforge.pipeline.model.float8 import use_float8
from beitforge.pipeline.model.resize import finetuned_model
from beitforge.pipeline.plan.costs import training_flops
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.training.objectives import classification_loss, classified, encoder_input
from beitforge.pipeline.training.optim import layer_groups
from beitforge.pipeline.training.shutdown import shut_down
from beitforge.pipeline.training.trainer import Job, run_training
from beitforge.pipeline.weights.classifier import initialise_classifier_from
from beitforge.shards.stream.loader import Batch

# of `optimizer` and `train` only what fine-tuning takes from them
_OTHERS = ("train.precision", "optimizer.beta1", "optimizer.beta2", "optimizer.epsilon")
IDENTITY = ("data", "model", "finetune", "loader", *_OTHERS)


def run(config: Config, stop: Callable[[], str]) -> int:
    """Fine-tune; returns the exit code. `stop` says why to stop, or ''."""
    world, job = prepare(config, lambda: newest(Path(config.finetune.run), lambda _: None) is None)
    _, finished = run_training(config, job, world, stop)
    return shut_down(job.run, finished, stop, world)


def prepare(config: Config, begins: Callable[[], bool]) -> tuple[World, Job]:
    """Join the others and put the training together. begins: asked on the first rank, whether no checkpoint gives the
    weights, so that finetune.init has to."""
    tune = config.finetune
    world, (source, test, classes) = open_and_join(config, lambda: _opened(config), _fingerprints)
    setup = run_on_all_ranks(lambda: tuning_setup(config, world), world)
    classifier = new_classifier(config, classes)
    float8 = config.train.precision == "fp8" and run_on_all_ranks(lambda: use_float8(classifier, world.device), world)
    names = tuple(source.stream.images.manifest.classes)
    line = _start(config, classifier, names, begins, world)
    read = f"{source.samples} images of {classes} classes to train on, {test.samples if test else 'none'} to test"
    for said in (line, float8, read):
        if world.first and said:
            say(said)

    def evaluate(engine: Engine, step: int) -> dict[str, dict[str, float]]:
        if test is None:
            return {}
        if world.first:
            say(f"finetune: testing on {test.samples} images after step {step}")
        found = {"test": tested(config, engine, test)}
        if engine.average is not None:
            with averaged(engine):
                found["test_ema"] = tested(config, engine, test)
        for kind, values in found.items() if world.first else ():
            what = "moving average: " if kind == "test_ema" else ""
            right = f"{what}{values['accuracy']:.1%} of the test images right after step {step}"
            say(f"finetune: {right}, {values['top5']:.1%} among the first five")
        return found

    def step(engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return classification_loss(config, engine.model, batch, engine.dtype)

    job = Job(
        label="finetune",
        run=Path(tune.run),
        sections=IDENTITY,
        source=source,
        judged=() if test is None else (test,),
        module=classifier,
        groups=layer_groups(classifier, config.model.layers, tune.weight_decay, tune.layer_decay),
        setup=setup,
        duration=tune.duration,
        warmup=tune.warmup,
        peak_lr=tune.lr,
        end_lr=tune.lr_end,
        weight_decay=(tune.weight_decay, tune.last_weight_decay),
        save_every=config.checkpoint.every,
        objective=lambda engine, _: lambda _, batch, __: step(engine, batch),
        evaluate=evaluate if test is not None else None,
        heldout_every=tune.test_every if test is not None else None,
        flops=training_flops(classifier.model, classes, masked=1),
        classes=names,
    )
    return world, job


def _refuse(config: Config) -> None:
    """Raise ConfigError for what shows without reading any shard."""
    tune = config.finetune
    refuse_tuning(config)
    if not config.data.labelled_images:
        raise ConfigError("data.labelled_images is empty; `finetune` needs a labelled image shard set to train on")
    if any(side % config.model.patch_size for side in tune.input_size):
        raise ConfigError(
            f"finetune.input_size {tune.input_size} is not a multiple of model.patch_size {config.model.patch_size}"
        )
    if tune.init and Path(tune.init).resolve() == Path(tune.run).resolve():
        raise ConfigError(f"finetune.init and finetune.run are both {tune.run}: give the run a folder of its own")


def _opened(config: Config) -> tuple[DataSource, DataSource | None, int]:
    """What the run reads: images to train on, to test on, and how many classes they have."""
    _refuse(config)
    source, test = supervised(config), supervised_test(config)
    return source, test, _classes(config, source, test)


def _fingerprints(opened: tuple[DataSource, DataSource | None, int]) -> dict[str, str]:
    """What has to be the same on every host."""
    source, test, _ = opened
    return fingerprints({"labelled ": source, "test ": test})


def _classes(config: Config, source: DataSource, test: DataSource | None) -> int:
    """How many there are to learn. Raises ConfigError for fewer than two, and for a test with others."""
    classes = num_classes(source.stream.images)
    if classes < 2:
        raise ConfigError(
            f"data.labelled_images ({config.data.labelled_images}) has one class; there is nothing to learn"
        )
    others = num_classes(test.stream.images) if test is not None else 0
    if others > classes:
        raise ConfigError(
            f"data.labelled_test has labels up to {others - 1}, data.labelled_images up to {classes - 1}: pack both "
            f"from folders of the same classes"
        )
    return classes


def new_classifier(config: Config, classes: int) -> Classifier:
    """The config's encoder for fine-tuning, drawn from data.seed; its head scaled down by finetune.head_scale."""
    tune = config.finetune
    model = dataclasses.replace(finetuned_model(config.model, tune.input_size), drop_path=tune.drop_path)
    classifier = Classifier(model, classes, tune.pooling)
    initialise(classifier, config.data.seed, tune.init_truncation)
    with torch.no_grad():
        classifier.get_parameter("head.weight").mul_(tune.head_scale)
    classifier.dropout, classifier.attention_dropout = tune.dropout, tune.attention_dropout
    classifier.checkpointing = config.train.activation_checkpointing
    return classifier


def _start(
    config: Config, classifier: Classifier, names: tuple[str, ...], begins: Callable[[], bool], world: World
) -> str:
    """Load finetune.init unless there is a checkpoint to go on from; returns the line that says so, or ''."""
    if not broadcast_object(world.first and begins(), world):
        return ""
    if not config.finetune.init:
        return "finetune.init is empty: the encoder starts as drawn from data.seed"
    init, tell = Path(config.finetune.init), say if world.first else lambda _: None
    chosen = newest_whole(init, world, tell)  # each byte read by one rank, and all take the same
    return run_on_all_ranks(lambda: initialise_classifier_from(init, classifier, config.model, names, chosen), world)


def tuning_setup(config: Config, world: World) -> Setup:
    """DeepSpeed's, of a fine-tuning. Raises ConfigError for a global batch that does not divide."""
    tune = config.finetune
    micro = tuning_micro_batch(tune, world.size)
    return dataclasses.replace(
        setup_from(config, world, micro),
        global_batch=tune.global_batch,
        accumulation=tune.global_batch // (micro * world.size),
        clip_norm=tune.clip_norm,
        muon=False,  # the published recipe is AdamW with a rate per layer
        ema_decay=tune.ema_decay,
    )


@torch.no_grad()
def tested(config: Config, engine: Engine, test: DataSource) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy on the test set, each of its images counted once over all ranks, and one that
    cannot be read not at all."""
    world, totals = engine.world, torch.zeros(4, dtype=torch.float64, device=engine.world.device)
    micro = engine.setup.micro_batch
    for batch, weights in even_batches(
        config, test, samples=test.samples, micro=micro, rank=world.rank, world=world.size
    ):
        moved = batch.to(world.device)
        logits = engine.model(encoder_input(config, moved, engine.dtype), None)
        totals += classified(logits, moved.labels, (weights * own_images(batch)).to(world.device))
    loss, first, five, count = all_sum(totals).tolist()
    return {"loss": loss / count, "accuracy": first / count, "top5": five / count, "samples": count}
