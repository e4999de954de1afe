"""`tokenizer CONFIG`: train a dVAE on the image shards, then write it, its codebook use and some reconstructions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beitforge.pipeline.config.derived import micro_batch
from beitforge.pipeline.config.settings import DVAE_STRIDE, Config
from beitforge.pipeline.console import say
from beitforge.pipeline.data.batches import evaluation_batches
from beitforge.pipeline.data.pretraining import DataSource, fingerprints, tokenizer_training
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.startup import open_and_join, run_on_all_ranks
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.pixels import jitter
from beitforge.pipeline.tokenizers.dvae import Dvae, save_dvae
from beitforge.pipeline.tokenizers.storage import codebook_use
from beitforge.pipeline.training.loop import Objective
from beitforge.pipeline.training.objectives import dvae_loss
from beitforge.pipeline.training.shutdown import shut_down
from beitforge.pipeline.training.trainer import Job, run_training
from beitforge.shards import counter_rng
from beitforge.shards.decode import codec
from beitforge.shards.stream.loader import Batch

_MEASURED = 2048  # images the codebook use is taken from
_SHOWN = 8
_WRITTEN = ("tokenizer.json", "tokenizer.safetensors", "measured.json", "reconstructions.png")


def run(config: Config, stop: Callable[[], str]) -> int:
    """Train and write the tokenizer; returns the exit code."""
    world, job = prepare(config, lambda: True)
    run_on_all_ranks(lambda: _refuse_others(job.run.parent), world)
    engine, finished = run_training(config, job, world, stop)
    if finished and world.first:
        _finish(config, engine, job.source, job.run.parent)
    return shut_down(job.run, finished, stop, world)


def prepare(config: Config, begins: Callable[[], bool]) -> tuple[World, Job]:
    """Join the others and put the training together. begins: not asked, since a tokenizer is never started from
    another's weights."""
    world, source = open_and_join(config, lambda: _opened(config), lambda source: fingerprints({"": source}))
    settings = config.tokenizer
    batch = settings.global_batch, settings.micro_batch
    micro = run_on_all_ranks(lambda: micro_batch(*batch, world.size, "tokenizer.global_batch"), world)
    dvae = Dvae(settings, config.data.seed)
    job = Job(
        label="tokenizer",
        run=Path(config.data.tokenizer) / "training",
        sections=("data", "view", "tokenizer", "loader"),
        source=source,
        module=dvae,
        groups=[{"params": list(dvae.parameters()), "weight_decay": 0.0}],
        setup=_setup(config, world, micro),
        duration=settings.duration,
        warmup=settings.warmup,
        peak_lr=settings.lr,
        end_lr=settings.lr_end,
        save_every=config.checkpoint.every,
        objective=lambda engine, steps: _objective(config, engine, steps),
    )
    return world, job


def _refuse_others(folder: Path) -> None:
    """Raise ConfigError for a folder that holds a tokenizer which was not trained there."""
    others = [name for name in _WRITTEN if (folder / name).exists()]
    if others and not (folder / "training" / "config.yaml").exists():
        raise ConfigError(
            f"{folder} holds {others[0]}, which no training of a tokenizer there wrote (an imported tokenizer?), so it "
            f"stays: set data.tokenizer to a new folder"
        )


def _opened(config: Config) -> DataSource:
    """What the run reads."""
    if config.tokenizer.stride != DVAE_STRIDE:
        raise ConfigError(
            f"tokenizer.stride is {config.tokenizer.stride}; the dVAE that `tokenizer` trains has {DVAE_STRIDE}: "
            f"set it so, or bring the other tokenizer with `import-tokenizer`"
        )
    return tokenizer_training(config)


def _setup(config: Config, world: World, micro: int) -> Setup:
    """Plain data parallel in fp32: a tokenizer is small, and its argmax should not depend on rounding."""
    return Setup(
        global_batch=config.tokenizer.global_batch,
        micro_batch=micro,
        accumulation=config.tokenizer.global_batch // (micro * world.size),
        precision="fp32",
        zero_stage=0,
        offload_optimizer=False,
        compile=False,
        clip_norm=1.0,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        overrides={},
    )


def _objective(config: Config, engine: Engine, steps: int) -> Objective:
    """The dVAE's loss, its Gumbel noise drawn from (seed, step, micro batch, rank)."""
    generator = torch.Generator(engine.world.device)
    turn = {"step": -1, "micro": 0}

    def of_batch(model: Callable, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        turn["micro"] = turn["micro"] + 1 if turn["step"] == step else 0
        turn["step"] = step
        seed = counter_rng.bits(counter_rng.GUMBEL, config.data.seed, step, turn["micro"], engine.world.rank)[0]
        generator.manual_seed(int(seed >> np.uint64(1)))
        return dvae_loss(config.tokenizer, model, batch, step, steps, generator)

    return of_batch


@torch.no_grad()
def _finish(config: Config, engine: Engine, source: DataSource, folder: Path) -> None:
    """Measure what the argmax tokenizer does, show some of it, and write it; tokenizer.json comes last."""
    dvae = engine.module.eval()
    assert isinstance(dvae, Dvae), "the tokenizer stage trains a Dvae"
    device = engine.world.device
    grid = config.tokenizer.grid
    counts = torch.zeros(config.tokenizer.vocabulary, dtype=torch.float64)
    error = 0.0
    shown: list[Tensor] = []
    samples = min(_MEASURED, source.samples)
    say(f"tokenizer: measuring how it uses its codes, on {samples} images")
    batches = evaluation_batches(config, source, samples=samples, micro=64, rank=0, world=1)
    for batch in (batch.to(device) for batch in batches):
        view = jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots)
        tokens = dvae.tokenize(view)
        rebuilt = dvae.decode(tokens, grid)
        counts += torch.bincount(tokens.flatten(), minlength=len(counts)).cpu()
        error += float((rebuilt - view).square().mean()) * len(tokens)
        if not shown:
            shown = [view[:_SHOWN].cpu(), rebuilt[:_SHOWN].cpu()]
    use = codebook_use(counts)
    measured = {**use, "psnr_db": -10 * float(np.log10(error / samples)), "pictures": samples}
    folder.mkdir(parents=True, exist_ok=True)
    rows = [torch.cat(list(row), dim=2) for row in shown]
    image = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    (folder / "reconstructions.png").write_bytes(codec.encode(image, "png", 95))
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    fingerprint = save_dvae(folder, dvae, config.tokenizer)
    say(
        f"tokenizer: {use['used']} of {len(counts)} codes used, perplexity {use['perplexity']:.0f}, reconstruction "
        f"{measured['psnr_db']:.1f} dB; fingerprint {fingerprint[:16]}; written to {folder}"
    )
