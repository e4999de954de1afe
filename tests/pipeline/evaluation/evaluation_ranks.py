"""A process of test_evaluation.py: `python -m tests.pipeline.evaluation.evaluation_ranks CONFIG [SETTINGS …]`.

Alone or under torchrun. Under every ZeRO stage: an evaluation of an encoder as it was drawn, and the losses of a few
steps with an evaluation after each and without any. Rank 0 prints a JSON list of findings.
"""

import dataclasses
import json
import os
import sys

import torch
import torch.distributed as dist

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.batches import training_batches
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.distributed.deepspeed_config import setup_from
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import start_world
from beitforge.pipeline.evaluation.evaluations import Evaluations, open_evaluation_sets
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.training.objectives import masked_token_loss
from beitforge.pipeline.training.optim import parameter_groups

MICRO, STEPS, DONE = 2, 3, 1
# ZeRO stage, positions, precision. All parameters of stage 3 are cut and gathered: the smallest are not kept whole.
CASES = [
    (0, "absolute", "fp32"),
    (1, "relative", "fp32"),
    (2, "relative_shared", "fp32"),
    (3, "relative_shared", "fp32"),
    (3, "relative", "fp32"),
    (2, "relative", "bf16"),
]
CUT = {"stage3_param_persistence_threshold": 0}


def with_case(config: Config, positions: str) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, positions=positions))


def encoder(config: Config) -> Beit:
    """Weights under which predictions and attention are far from uniform."""
    beit = Beit(config.model, config.tokenizer.vocabulary, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in beit.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return beit


def engine_of(config: Config, stage: int, precision: str, world: World) -> Engine:
    beit = encoder(config)
    setup = dataclasses.replace(
        setup_from(config, world, MICRO),
        zero_stage=stage,
        precision=precision,
        overrides={"zero_optimization": CUT} if stage == 3 else {},
    )
    return Engine(beit, parameter_groups(beit, 0.05), setup, world)


def losses(config: Config, engine: Engine, evaluations: Evaluations | None) -> list[float]:
    """This rank's loss of each micro batch of a few steps."""
    world, size, found = engine.world, config.train.global_batch, []
    turns = engine.setup.accumulation
    batches = training_batches(
        config,
        pretraining(config),
        first_sample=0,
        global_batch=size,
        micro=MICRO,
        rank=world.rank,
        world=world.size,
        steps=STEPS,
    )
    for number, batch in enumerate(batches):
        if number % turns:
            engine.accumulate()
        loss, _ = masked_token_loss(config, engine.model, batch, engine.dtype)
        engine.backward(loss)
        found.append(float(loss))
        if number % turns == turns - 1:
            engine.step(1e-2)
            if evaluations is not None:
                evaluations(engine, number // turns + 1)
    return found


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    world, findings = start_world(), []
    for stage, positions, precision in CASES:
        case = with_case(config, positions)
        evaluations = Evaluations(case, open_evaluation_sets(case), world, STEPS, print)
        found = evaluations(engine_of(case, stage, precision, world), DONE)
        with_them = losses(case, engine_of(case, stage, precision, world), evaluations)
        without = losses(case, engine_of(case, stage, precision, world), None)
        findings.append({"found": found, "same": with_them == without, "losses": without})
    everyone: list = [None] * world.size
    dist.all_gather_object(everyone, [finding["same"] for finding in findings])
    if world.first:
        for number, finding in enumerate(findings):
            finding["same"] = all(same[number] for same in everyone)
        print(json.dumps(findings), flush=True)
    dist.barrier()
    os._exit(0)  # now and then gloo aborts when it is taken apart


if __name__ == "__main__":
    main()
