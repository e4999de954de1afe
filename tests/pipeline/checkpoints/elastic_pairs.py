"""A process of test_elastic.py: `python -m tests.pipeline.checkpoints.elastic_pairs FOLDER [SAVED …]`.

Alone or under torchrun. Trains under every ZeRO stage, lays each checkpoint out under every other, and prints a
JSON list of findings.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

from beitforge.pipeline.checkpoints import live_layout, zero_layout
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.distributed.collectives import all_sum, barrier
from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import destroy_process_group, start_world
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.training.optim import muon_groups, parameter_groups

BATCH, STEPS, DECAY = 4, 3, 0.7
WORLD = start_world()


def engine(stage: int, precision: str, seed: int, offload: bool = False, muon: bool = False) -> Engine:
    """A tiny encoder with the real parameter groups. Its sizes divide by neither 2 nor 4, so shares are padded."""
    model = Model(input_size=Size(24, 24), patch_size=8, layers=1, width=30, heads=2)
    beit = Beit(model, 21, seed)
    setup = Setup(
        global_batch=BATCH,
        micro_batch=BATCH // WORLD.size,
        accumulation=1,
        precision=precision,
        zero_stage=stage,
        offload_optimizer=offload,
        compile=False,
        clip_norm=0.0 if muon else 3.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        overrides={"zero_optimization": {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000}},
        muon=muon,
        ema_decay=0.0 if muon else DECAY,
    )
    return Engine(beit, muon_groups(beit, 0.05, 0.95) if muon else parameter_groups(beit, 0.05), setup, WORLD)


def step(running: Engine, number: int) -> float:
    """One update on the batch of this number; the loss over all ranks."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randn(BATCH, 3, 24, 24, generator=generator).to(running.dtype)
    tokens = torch.randint(21, (BATCH, 9), generator=generator)
    mine = slice(WORLD.rank * BATCH // WORLD.size, (WORLD.rank + 1) * BATCH // WORLD.size)
    mask = torch.zeros(len(tokens[mine]), 9, dtype=torch.bool)
    mask[:, :4] = True
    loss, _, count = running.model(pixels[mine], mask, 4, None, tokens[mine])
    running.backward(loss / count)
    running.step(1e-2)
    return float(all_sum((loss / count).detach())) / WORLD.size


def everything(saved: zero_layout.CheckpointFiles) -> dict[str, torch.Tensor]:
    """Every value of every parameter of a checkpoint, whole."""
    found = {}
    for name, shape in saved.shapes.items():
        numbers = int(torch.Size(shape).numel())
        values = {value for piece in saved.pieces[name] for value in piece.values}
        target = zero_layout.Piece(0, {value: torch.empty(numbers) for value in values})
        saved.fill(name, target)
        found |= {f"{name} {value}": tensor for value, tensor in target.values.items()}
    return found


def masters(running: Engine) -> list[torch.Tensor]:
    """Of this rank, as they are now."""
    return [piece.values["fp32"].detach().clone() for _, piece in live_layout.engine_pieces(running)]


def wrong_averages(running: Engine, history: list[list[torch.Tensor]]) -> list[str]:
    """Names whose average is not timm's ModelEma of the masters at the beginning and after each update, to the bit."""
    found = []
    for number, (name, piece) in enumerate(live_layout.engine_pieces(running)):
        average = history[0][number].clone()
        for masters in history[1:]:
            average = average * DECAY + (1.0 - DECAY) * masters[number]
        found += [] if torch.equal(average, piece.values["average"]) else [name]
    return found


def swapped(running: Engine) -> bool:
    """Whether the model computes with the average inside of `averaged`, and is what it was behind it."""
    before = {name: piece.values for name, piece in live_layout.engine_pieces(running)}
    before = {name: {key: value.clone() for key, value in values.items()} for name, values in before.items()}
    plain = forward(running)
    with live_layout.averaged(running):
        inside = forward(running)
        exchanged = [
            torch.equal(piece.values["fp32"], before[name]["average"])
            for name, piece in live_layout.engine_pieces(running)
        ]
    same = [
        torch.equal(value, before[name][key])
        for name, piece in live_layout.engine_pieces(running)
        for key, value in piece.values.items()
    ]
    return all(exchanged) and all(same) and inside != plain and forward(running) == plain


@torch.no_grad()
def forward(running: Engine) -> float:
    """A loss of the model as it is; every rank takes part."""
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(77)).to(running.dtype)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, :4] = True
    return float(running.model(pixels, mask, 4, None, torch.zeros(2, 9, dtype=torch.long))[0])


def save(running: Engine, folder: Path) -> zero_layout.CheckpointFiles:
    running.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    barrier()
    return zero_layout.open_checkpoint(folder, running.setup.zero_stage, running.groups)


def carried(
    source: zero_layout.CheckpointFiles,
    stage: int,
    precision: str,
    folder: Path,
    offload: bool = False,
    muon: bool = False,
) -> dict:
    """What became of a checkpoint under another stage: differing values, settings, and the losses that follow."""
    running = engine(stage, precision, seed=9, offload=offload, muon=muon)
    live_layout.load_into(running, source)
    before, after = everything(source), everything(save(running, folder))
    states = getattr(running.optimizer, "optimizer", running.optimizer).state.values()
    states = [state for state in states if "step" in state]  # Muon keeps none
    return {
        "differ": [name for name in before if not torch.equal(before[name], after[name])],
        "steps": sorted({float(state["step"]) for state in states}),
        "shared": len({id(state["step"]) for state in states}) != len(states),
        "decays": [group["weight_decay"] for group in running.optimizer.param_groups],
        "losses": [step(running, number) for number in range(STEPS, 2 * STEPS)],
    }


def main() -> None:
    """FOLDER: where checkpoints go. SAVED …: folders of runs of other numbers of processes."""
    folder, findings, groups = Path(sys.argv[1]), [], {}
    for kind, precision in itertools.product(("adamw", "muon"), ("fp32", "bf16")):
        muon = kind == "muon"
        for stage in range(4):
            running = engine(stage, precision, seed=0, muon=muon)
            groups[kind] = running.groups
            history = [] if muon else [masters(running)]
            for number in range(STEPS):
                step(running, number)
                history += [] if muon else [masters(running)]
            averages = {} if muon else {"wrong": wrong_averages(running, history), "swaps": swapped(running)}
            sources = {f"{WORLD.size}": save(running, folder / f"{kind}-{precision}-{stage}" / "step")}
            for other in sys.argv[2:]:
                path = Path(other) / f"{kind}-{precision}-{stage}" / "step"
                sources[Path(other).name] = zero_layout.open_checkpoint(path, stage, running.groups)
            expected = [step(running, number) for number in range(STEPS, 2 * STEPS)]
            for world, source in sources.items():
                every = not muon and world == str(WORLD.size) and WORLD.size == 1
                for other in range(4) if every else ((stage + 1) % 4,):
                    where = folder / f"{kind}-{precision}-{stage}-{other}-{world}" / "step"
                    pair = {"from": [world, stage], "to": [str(WORLD.size), other], "precision": precision}
                    found = carried(source, other, precision, where, muon=muon)
                    findings.append({**pair, "kind": kind, "expected": expected, **found, **averages})
    if WORLD.size > 1:
        source = zero_layout.open_checkpoint(folder / "adamw-fp32-0" / "step", 0, groups["adamw"])
        where = folder / "offload" / "step"
        pair = {"from": [str(WORLD.size), 0], "to": [str(WORLD.size), 2], "precision": "fp32"}
        pair["kind"] = "adamw"
        expected = findings[0]["expected"]
        findings.append({**pair, "expected": expected, **carried(source, 2, "fp32", where, offload=True)})
    if WORLD.first:
        print(json.dumps(findings))
    destroy_process_group()


if __name__ == "__main__":
    main()
