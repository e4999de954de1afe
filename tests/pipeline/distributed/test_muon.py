"""DeepSpeed's Muon as it is set up here against torch's: updates, trainings under every ZeRO stage, steps left out."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from beitforge.pipeline.distributed.deepspeed_config import Setup
from beitforge.pipeline.distributed.muon import muon_optimizer
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.plan.costs import muon_flops
from beitforge.pipeline.training.optim import is_matrix, muon_groups
from tests.pipeline.distributed import muon_ranks
from tests.pipeline.distributed.muon_ranks import BATCH, DECAY, MODEL, MOMENTUM, RATE, STEPS
from tests.ranks import run_ranks

SHAPES = {"fc1": (96, 24), "fc2": (24, 96), "out": (24, 24), "qkv": (72, 24)}


def plain(module: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's Muon and AdamW over the parameters that ours have."""
    named = list(module.named_parameters())
    matrices = [p for name, p in named if is_matrix(name, p)]
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in muon_groups(module, DECAY, MOMENTUM)
        if not group["use_muon"]
    ]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-8)]


def setup() -> Setup:
    return Setup(
        global_batch=BATCH,
        micro_batch=BATCH,
        accumulation=1,
        precision="fp32",
        zero_stage=0,
        offload_optimizer=False,
        compile=False,
        clip_norm=0.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-8,
        overrides={},
        muon=True,
    )


class Matrices(nn.Module):
    """Named as a block's, with a vector beside them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
        self.blocks = nn.ModuleList([nn.ParameterDict({**drawn, "gamma": nn.Parameter(torch.ones(24))})])


def test_four_updates_are_torchs():
    """What each matrix has moved, to torch's rounding in bfloat16; the vector's AdamW to the last bits."""
    ours, theirs = Matrices(), Matrices()
    make = muon_optimizer(setup())
    assert make is not None
    optimizer, others = make(muon_groups(ours, DECAY, MOMENTUM)), plain(theirs)
    generator = torch.Generator().manual_seed(1)
    for group in optimizer.param_groups:
        group["lr"] = RATE * group.get("lr_scale", 1.0)
    for _ in range(4):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for each in (optimizer, *others):
            each.step()
    start = dict(Matrices().named_parameters())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        moved = (other - start[name]).norm()
        error = float((mine - other).detach().norm() / moved.detach())
        assert error < (0.02 if is_matrix(name, mine) else 1e-6), (name, error)
        assert float(moved.detach()) > 0.1 * RATE * mine.numel() ** 0.5, name


def test_nothing_is_compiled_and_operations_are_counted():
    """Of each shape, in products; a compiled update would be one opaque operation."""
    muon_optimizer(setup())(muon_groups(Matrices(), DECAY, MOMENTUM))  # type: ignore[misc]
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    for shape in SHAPES.values():
        with FlopCounterMode(display=False) as counter:
            muon_update(torch.randn(shape), torch.zeros(shape))
        assert counter.get_total_flops() == muon_flops(*shape), shape


def test_which_parameters_are_muons():
    """The four matrices of every block, and no table, embedding or head; every parameter in one group."""
    beit = Beit(MODEL, 21, 0)
    names = {id(parameter): name for name, parameter in beit.named_parameters()}
    groups = [([names[id(p)] for p in group["params"]], group) for group in muon_groups(beit, DECAY, MOMENTUM)]
    assert sorted(name for found, _ in groups for name in found) == sorted(names.values())
    muon = {name for found, group in groups for name in found if group["use_muon"]}
    parts = ("attention.qkv_weight", "attention.out.weight", "fc1.weight", "fc2.weight")
    assert muon == {f"blocks.{layer}.{part}" for layer in range(MODEL.layers) for part in parts}
    assert [group["weight_decay"] for found, group in groups if "head.weight" in found] == [DECAY]
    own = Beit(type(MODEL)(**{**vars(MODEL), "positions": "relative"}), 21, 0)
    tables = [name for name, p in own.named_parameters() if name.endswith("table") and is_matrix(name, p)]
    assert tables == []


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Losses of plain torch on whole batches."""
    beit, losses = Beit(MODEL, 21, 0), []
    optimizers = plain(beit)
    for number in range(STEPS):
        pixels, mask, tokens = muon_ranks.batch(number)
        loss, _, count = beit(pixels, mask, 4, None, tokens)
        (loss / count).backward()
        losses.append((loss / count).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("processes", [1, 2])
def test_every_stage_with_accumulation_and_checkpointing(processes, expected):
    """The losses of plain torch, whose Muon rounds to bfloat16; a loss that is not finite changes nothing anywhere.
    Selective checkpointing changes no bit, also where ZeRO-3 has put its own product in the place of torch's."""
    done = run_ranks("tests.pipeline.distributed.muon_ranks", processes=processes)
    assert done.returncode == 0, done.stderr
    findings = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    cases = {tuple(finding["case"]) for finding in findings}
    assert len(cases) == len(findings) == 2 * 4 * 4
    for finding in findings:
        tolerance = 5e-5 if finding["case"][0] == "fp32" else 1e-3
        assert finding["losses"] == pytest.approx(expected, rel=tolerance), finding
        assert finding["left out"], finding
    losses = {tuple(finding["case"]): finding["losses"] for finding in findings}
    for precision, stage in itertools.product(("fp32", "bf16"), range(4)):
        assert losses[precision, stage, 1, "selective"] == losses[precision, stage, 1, "none"], (precision, stage)
