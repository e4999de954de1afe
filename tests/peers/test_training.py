"""Ten steps of our trainer against ten of a plain loop around transformers' BEiT: the published recipe, no code of ours
but the batches and the initial weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.batches import training_batches
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.training.objectives import encoder_input
from beitforge.pipeline.weights import export_formats
from tests.pipeline.training.test_trainer import trained

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS, WARMUP, PEAK, END = 10, 4, 2e-3, 1e-5
SETTINGS = [
    "model.drop_path=0",
    "optimizer.lr=2e-3",
    "optimizer.warmup=4 steps",
    "train.duration=10 steps",
    "log.every_steps=1",
    "data.heldout_images=",
    "data.heldout_tokens=",
]


def published_schedule() -> np.ndarray:
    """Linear from 0 to the peak, both included, then half a cosine (unilm, beit/utils.py cosine_scheduler)."""
    left = STEPS - WARMUP
    cosine = [END + 0.5 * (PEAK - END) * (1 + math.cos(math.pi * i / left)) for i in range(left)]
    return np.concatenate([np.linspace(0, PEAK, WARMUP), cosine])


def published_groups(peer: torch.nn.Module) -> list[dict]:
    """No decay on vectors, biases, positions and [S] (unilm, beit/optim_factory.py get_parameter_groups)."""
    plain, decayed = [], []
    for name, parameter in peer.named_parameters():
        free = parameter.dim() == 1 or name.endswith((".bias", "position_embeddings", "cls_token"))
        (plain if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]


def peer_losses(config, folder: Path) -> list[float]:
    beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    export_formats.write_hf(folder, beit.state_dict(), config.model, config.tokenizer.vocabulary)
    peer = transformers.BeitForMaskedImageModeling.from_pretrained(
        folder, attn_implementation="eager", drop_path_rate=0.0
    ).train()
    adamw = torch.optim.AdamW(published_groups(peer), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    size = config.train.global_batch
    batches = training_batches(
        config, pretraining(config), first_sample=0, global_batch=size, micro=size, rank=0, world=1, steps=STEPS
    )
    losses = []
    for batch, rate in zip(batches, published_schedule(), strict=True):
        mask = batch.draws["mask"]
        loss = peer(encoder_input(config, batch), bool_masked_pos=mask, labels=batch.tokens[mask]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 3.0)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ten_steps_are_transformers(tiny, tmp_path, stage):
    run = tmp_path / "run"
    trained(tiny, run, *SETTINGS, f"train.zero_stage={stage}")
    theirs = peer_losses(load_config(str(tiny.config), SETTINGS), tmp_path / "peer")
    ours = [line["loss"] for line in read_metrics(run, "train")]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(ours) - min(ours) > 0.05, "nothing was learned, so nothing was compared"
