"""A process of test_layered.py: `python -m tests.pipeline.training.layered_stages FOLDER` under torchrun.

Fine-tunes a tiny classifier with layer-wise rates under every ZeRO stage, lays each checkpoint out under the next
stage, and prints a JSON list of what it found.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from beitforge.pipeline.checkpoints import live_layout
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.distributed.collectives import all_sum
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import destroy_process_group
from beitforge.pipeline.model.beit import Classifier, initialise
from beitforge.pipeline.training.optim import layer_groups
from tests.pipeline.checkpoints.elastic_pairs import WORLD, everything, save

BATCH, STEPS, LAYERS, DECAY, RATE = 4, 3, 3, 0.5, 1e-2


def classifier(seed: int) -> Classifier:
    """Its sizes divide by neither 2 nor 4, so shares are padded."""
    model = Model(input_size=Size(24, 24), patch_size=8, layers=LAYERS, width=30, heads=2, positions="relative")
    made = Classifier(model, 7)
    initialise(made, seed)
    return made


def engine(stage: int, seed: int) -> Engine:
    module = classifier(seed)
    setup = Setup(
        global_batch=BATCH,
        micro_batch=BATCH // WORLD.size,
        accumulation=1,
        precision="fp32",
        zero_stage=stage,
        offload_optimizer=False,
        compile=False,
        clip_norm=0.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        overrides={"zero_optimization": {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000}},
    )
    return Engine(module, layer_groups(module, LAYERS, 0.05, DECAY), setup, WORLD)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randn(BATCH, 3, 24, 24, generator=generator)
    return pixels, torch.randint(7, (BATCH,), generator=generator)


def step(running: Engine, number: int) -> float:
    """One update; the loss over all ranks."""
    mine = slice(WORLD.rank * BATCH // WORLD.size, (WORLD.rank + 1) * BATCH // WORLD.size)
    pixels, labels = (tensor[mine] for tensor in batch(number))
    loss = F.cross_entropy(running.model(pixels), labels)
    running.backward(loss)
    running.step(RATE)
    return float(all_sum(loss.detach())) / WORLD.size


def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    """torch's AdamW with one group a parameter, its rate written out: losses, and the weights after STEPS."""
    module = classifier(0)
    groups = []
    for name, parameter in module.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        layer = LAYERS + 1 if name.startswith(("head", "norm")) else layer
        decay = 0.05 if parameter.dim() > 1 and "cls" not in name else 0.0
        groups.append({"params": [parameter], "lr": RATE * DECAY ** (LAYERS + 1 - layer), "weight_decay": decay})
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    losses = []
    for number in range(STEPS):
        pixels, labels = batch(number)
        loss = F.cross_entropy(module(pixels), labels)
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in module.named_parameters()}


def main() -> None:
    folder, findings = Path(sys.argv[1]), []
    expected, wanted = plain()
    for stage in range(4):
        running = engine(stage, seed=0)
        losses = [step(running, number) for number in range(STEPS)]
        saved = save(running, folder / f"{stage}" / "step")
        apart = {name: float((tensor - wanted[name]).abs().max()) for name, tensor in saved.weights()}
        rates = {round(group["lr"] / RATE, 9) for group in running.optimizer.param_groups}
        after = [step(running, number) for number in range(STEPS, 2 * STEPS)]
        other = engine((stage + 1) % 4, seed=9)
        live_layout.load_into(other, saved)
        kept = everything(save(other, folder / f"{stage}-next" / "step"))
        findings.append(
            {
                "stage": stage,
                "losses": losses,
                "expected": expected,
                "apart": max(apart.values()),
                "rates": sorted(rates),
                "differ": [name for name, tensor in everything(saved).items() if not torch.equal(kept[name], tensor)],
                "after": after,
                "after_next": [step(other, number) for number in range(STEPS, 2 * STEPS)],
            }
        )
    if WORLD.first:
        print(json.dumps(findings))
    destroy_process_group()


if __name__ == "__main__":
    main()
