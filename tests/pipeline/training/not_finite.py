"""A process of tests/pipeline/training/test_recovery.py under torchrun: `… CONFIG RUN loss|gradient STAGE`.

Trains through the loop with an objective that is not finite on rank 2 alone at chosen steps, and writes down
what this rank saw.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beitforge.pipeline.checkpoints import live_layout, zero_layout
from beitforge.pipeline.config.derived import micro_batch
from beitforge.pipeline.config.fields import Duration
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.distributed.deepspeed_config import setup_from
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import destroy_process_group, start_world
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.training.objectives import masked_token_loss
from beitforge.pipeline.training.optim import parameter_groups
from beitforge.pipeline.training.recovery import read_rollbacks
from beitforge.pipeline.training.trainer import Job, run_training

BAD = (3, 6, 7)


class NotFinite(torch.autograd.Function):
    """The loss as it is, with a gradient that is NaN."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def state(engine: Engine) -> str:
    """A digest of this rank's masters and moments, and of the step counter."""
    digest = hashlib.sha256()
    for name, piece in live_layout.engine_pieces(engine):
        digest.update(name.encode())
        for value in piece.values.values():
            digest.update(value.cpu().numpy().tobytes())
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state.values()
    return digest.hexdigest() + str([float(kept["step"]) for kept in states])


def main() -> None:
    """Ten steps; steps 6 and 7 are two in a row, which is one too many."""
    config_file, run, what, stage = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    overrides = [f"train.run={run}", f"train.zero_stage={stage}", "train.duration=10 steps", "faults.max_skipped=2"]
    config = load_config(config_file, [*overrides, "checkpoint.every=2 steps", "checkpoint.keep=9"])
    source, world = pretraining(config), start_world()
    beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    skipped: list[int] = []
    before: dict[int, str] = {}
    unchanged: list[bool] = []

    def objective(engine: Engine, _: int) -> Any:
        def loss_of(model: Any, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            # the state at the beginning of each step; that of a step after one left out must be that step's
            before[step] = state(engine) if step else ""
            if step - 1 in skipped:
                unchanged.append(before[step - 1] == before[step] or step - 1 == BAD[-1])
            if step in BAD and step not in skipped:
                skipped.append(step)
            loss, measures = masked_token_loss(config, model, batch, engine.dtype)
            if step in BAD and world.rank == 2:
                loss = loss * float("nan") if what == "loss" else NotFinite.apply(loss)
            return loss, measures

        return loss_of

    job = Job(
        label="pretrain",
        run=run,
        sections=("model",),
        source=source,
        module=beit,
        groups=parameter_groups(beit, config.optimizer.weight_decay),
        setup=setup_from(config, world, micro_batch(config.train.global_batch, 4, world.size, "")),
        duration=config.train.duration,
        warmup=Duration(0, "steps"),
        peak_lr=1e-3,
        end_lr=1e-3,
        save_every=config.checkpoint.every,
        objective=objective,
    )
    engine, finished = run_training(config, job, world, lambda: "")
    saved = zero_layout.open_checkpoint(run / "checkpoints" / "step-10", stage, engine.groups)
    weights = {name: tensor for name, tensor in saved.weights()}
    said = {
        "skipped": skipped,
        "returns": [[made.to, made.on] for made in read_rollbacks(run)],
        "weights": hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest(),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()),
        "done": 10 if finished else 0,
        "unchanged": bool(unchanged) and all(unchanged),
    }
    (run / f"said-{world.rank}.json").write_text(json.dumps(said))
    destroy_process_group()


if __name__ == "__main__":
    main()
