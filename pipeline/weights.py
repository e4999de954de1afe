"""Trained weights out of a run, and back: safetensors and a JSON config, no pickle. Must not know shards or stages."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoint import State, newest
from pipeline.config import Config, ConfigError, from_tree, load_config, to_tree
from pipeline.engine import consolidated_weights
from pipeline.metrics import say
from pipeline.model import Beit

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def run_config(run: Path) -> Config:
    """The resolved config of a run folder."""
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is not a run folder (no config.yaml); give the train.run folder of a pretraining")
    return load_config(str(run / "config.yaml"), [])


def checkpoint_weights(run: Path) -> tuple[dict[str, Tensor], State]:
    """float32 weights of the newest complete checkpoint, put together from every process's part."""
    found = newest(run, say)
    if found is None:
        raise ConfigError(f"{run} has no complete checkpoint yet; let `pretrain` save one")
    folder, state = found
    return consolidated_weights(folder, state.zero_stage), state


def save_encoder(folder: Path, weights: dict[str, Tensor], config: Config, state: State) -> None:
    """Write model.safetensors and config.json, each by rename."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_WEIGHTS}.partial"
    save_file(weights, partial, metadata={"format": "pt", "made_by": "beitforge"})
    partial.replace(folder / _WEIGHTS)
    content = {"kind": "beit", "step": state.step, "samples_seen": state.samples_seen, "tokens": state.tokens}
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps({**content, "config": to_tree(config)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / _CONFIG)


def load_encoder(folder: Path) -> tuple[Beit, Config]:
    """An exported encoder with its head. Raises ConfigError when the folder holds none."""
    try:
        content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        config = from_tree(content["config"], str(folder / _CONFIG))
        weights = load_file(folder / _WEIGHTS)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no exported encoder; make one with `export RUN {folder}`") from error
    except (json.JSONDecodeError, KeyError) as error:
        raise ConfigError(f"{folder / _CONFIG} is damaged ({error}); export again") from error
    beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    beit.load_state_dict(weights)
    return beit.eval(), config
