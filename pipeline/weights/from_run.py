"""The encoder of a run's newest checkpoint, whatever the run was: with a head over tokens, or fine-tuned over classes.

Must not know shards, HTML or any stage.
"""

from pathlib import Path

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.model.beit import Encoder
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.weights.classifier import build_classifier
from beitforge.pipeline.weights.encoder import build_encoder, trained_weights


def encoder_of(config: Config, run: Path, job: str, state: State | None = None) -> Encoder:
    """For use on the CPU, in float32. state: of the checkpoint to take, where one has been chosen. Raises ConfigError
    when the run has none, or another than its config says."""
    chosen = (run / "checkpoints" / f"step-{state.step}", state) if state else None
    weights = trained_weights(run, chosen).all()
    return (build_classifier if job == "finetune" else build_encoder)(config, weights, run)
