"""The encoder of a run's newest checkpoint, whatever the run was: with a head over tokens, or fine-tuned over classes.

Must not know shards, HTML or any stage.
"""

import dataclasses
from pathlib import Path

import torch

from pipeline.config import Config, ConfigError
from pipeline.model import Classifier, Encoder
from pipeline.weights import trained_weights, with_weights


def encoder_of(config: Config, run: Path, job: str) -> Encoder:
    """For use on the CPU, in float32. Raises ConfigError when the run has none, or another than its config says."""
    weights = trained_weights(run).all()
    if job != "finetune":
        return with_weights(config, weights, run)
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
    classifier = Classifier(model, classes=len(weights["head.weight"]))
    classifier.load_state_dict(weights)
    return classifier.eval()
