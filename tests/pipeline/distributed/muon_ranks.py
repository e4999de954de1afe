"""A process of test_muon.py: `python -m tests.pipeline.distributed.muon_ranks`, alone or under torchrun.

Trains a small encoder with Muon under every ZeRO stage, with accumulation and with activation checkpointing, and once
with a loss that is not finite; rank 0 prints a JSON list of findings.
"""

import hashlib
import json
import math

import torch

from beitforge.pipeline.checkpoints import live_layout
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.distributed.collectives import all_gather_objects, all_sum
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import destroy_process_group, start_world
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.training.optim import muon_groups

BATCH, STEPS, RATE, DECAY, MOMENTUM = 4, 6, 1e-2, 0.05, 0.95
MODEL = Model(input_size=Size(24, 24), patch_size=8, layers=2, width=30, heads=2)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, mask and tokens of step `number`."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randn(BATCH, 3, 24, 24, generator=generator)
    mask = torch.zeros(BATCH, 9, dtype=torch.bool)
    mask[:, :4] = True
    return pixels, mask, torch.randint(21, (BATCH, 9), generator=generator)


def engine(stage: int, precision: str, accumulation: int, checkpointing: str) -> Engine:
    world, beit = start_world(), Beit(MODEL, 21, 0)
    beit.checkpointing = checkpointing
    setup = Setup(
        global_batch=BATCH,
        micro_batch=BATCH // world.size // accumulation,
        accumulation=accumulation,
        precision=precision,
        zero_stage=stage,
        offload_optimizer=False,
        compile=False,
        clip_norm=0.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        overrides={"zero_optimization": {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000}},
        muon=True,
    )
    return Engine(beit, muon_groups(beit, DECAY, MOMENTUM), setup, world)


def step(running: Engine, number: int, factor: float = 1.0) -> tuple[float, bool]:
    """One update; the loss over all ranks, and whether it was made. factor: of the last rank's last loss."""
    pixels, mask, tokens = batch(number)
    world, micro, turns = running.world, running.setup.micro_batch, running.setup.accumulation
    total = torch.zeros(())
    for turn in range(turns):
        if turn:
            running.accumulate()
        first = (world.rank * turns + turn) * micro
        mine = slice(first, first + micro)
        loss, _, count = running.model(pixels[mine].to(running.dtype), mask[mine], 4, None, tokens[mine])
        spoilt = world.rank == world.size - 1 and turn == turns - 1
        running.backward(loss / count * (factor if spoilt else 1.0))
        total += (loss / count).detach().float() / turns
    made = running.step(RATE).updated
    return float(all_sum(total)) / world.size, made


def digest(running: Engine) -> list[str]:
    """Of every rank's masters, moments and momentum."""
    found = hashlib.sha256()
    for name, piece in live_layout.engine_pieces(running):
        found.update(name.encode())
        for value in piece.values.values():
            found.update(value.float().numpy().tobytes())
    return all_gather_objects(found.hexdigest(), running.world)


def main() -> None:
    findings = []
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            for accumulation, checkpointing in ((1, "none"), (2, "none"), (1, "full"), (1, "selective")):
                running = engine(stage, precision, accumulation, checkpointing)
                losses = [step(running, number)[0] for number in range(STEPS)]
                before = digest(running)
                _, made = step(running, STEPS, math.nan)
                findings.append(
                    {
                        "case": [precision, stage, accumulation, checkpointing],
                        "losses": losses,
                        "left out": not made and digest(running) == before,
                    }
                )
    if running.world.first:
        print(json.dumps(findings))
    destroy_process_group()


if __name__ == "__main__":
    main()
