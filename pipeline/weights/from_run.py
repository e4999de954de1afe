"""The encoder of a run's newest checkpoint, whatever the run was: with a head over tokens, or fine-tuned over classes.

Must not know shards, HTML or any stage.
"""

import dataclasses
from pathlib import Path

import torch

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Classifier, Encoder
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.weights.encoder import build_encoder, trained_weights


def encoder_of(config: Config, run: Path, job: str, state: State | None = None) -> Encoder:
    """For use on the CPU, in float32. state: of the checkpoint to take, where one has been chosen. Raises ConfigError
    when the run has none, or another than its config says."""
    chosen = (run / "checkpoints" / f"step-{state.step}", state) if state else None
    weights = trained_weights(run, chosen).all()
    if job != "finetune":
        return build_encoder(config, weights, run)
    if "head.weight" not in weights:
        raise ConfigError(f"the weights in {run} are no classifier's; is it a fine-tuning run?")
    own, shared = "blocks.0.attention.own_bias.table" in weights, "shared_bias.table" in weights
    positions = "relative" if own else "relative_shared" if shared else "absolute"
    model = dataclasses.replace(
        config.model, input_size=config.finetune.input_size, positions=positions, kernels="auto"
    )
    with torch.device("meta"):
        classifier = Classifier(model, classes=len(weights["head.weight"]))
    wanted = {name: tensor.shape for name, tensor in classifier.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in weights.items()}:
        raise ConfigError(f"the weights in {run} are no classifier's of its config")
    classifier = Classifier(model, len(weights["head.weight"]), config.finetune.pooling)
    classifier.load_state_dict(weights)
    return classifier.eval()
