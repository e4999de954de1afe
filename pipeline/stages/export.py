"""`export RUN OUT`: encoder and head of a run's newest checkpoint as safetensors + config."""

from pathlib import Path

from pipeline.metrics import say
from pipeline.weights import checkpoint_weights, load_encoder, run_config, save_encoder


def run(run_folder: Path, out: Path) -> int:
    """Write OUT/model.safetensors and OUT/config.json, and load them back; returns the exit code."""
    config = run_config(run_folder)
    weights, state = checkpoint_weights(run_folder)
    save_encoder(out, weights, config, state)
    beit, _ = load_encoder(out)
    say(f"exported step {state.step} ({sum(w.numel() for w in beit.parameters()):,} parameters) to {out}")
    return 0
