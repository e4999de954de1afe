"""Trained weights out of a run, and back: safetensors and a JSON config, no pickle. Must not know shards or stages."""

import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import zero
from pipeline.checkpoint import State, newest
from pipeline.config import Config, ConfigError, from_tree, load_config, to_tree
from pipeline.metrics import say
from pipeline.model import Beit
from pipeline.resize import fit_grid

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def refuse_full(out: Path) -> None:
    """Raise ConfigError when `out` is a file, or a folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: give a new folder")


def run_config(run: Path) -> Config:
    """The resolved config of a run folder, or of an exported or imported encoder."""
    if (run / "config.yaml").exists():
        return load_config(str(run / "config.yaml"), [])
    if (run / _CONFIG).exists():
        return _read_encoder(run)[1]
    raise ConfigError(
        f"{run} is neither a run folder (no config.yaml) nor an encoder ({_CONFIG}): give the train.run folder of a "
        f"pretraining, or what `export` or `import` wrote"
    )


def checkpoint_weights(run: Path) -> tuple[dict[str, Tensor], State]:
    """float32 weights of a run's newest complete checkpoint, put together from every process's part; or an encoder's.

    Raises ConfigError when there is neither.
    """
    found = newest(run, say)
    if found is not None:
        folder, state = found
        return dict(zero.saved(folder, state.zero_stage, state.groups).weights()), state
    if not (run / _CONFIG).exists():
        raise ConfigError(f"{run} has no complete checkpoint yet; let `pretrain` save one")
    content, _, weights = _read_encoder(run)
    seen = {name: content[name] for name in ("step", "samples_seen", "tokens")}
    return weights, State(**seen, world=1, zero_stage=0, precision="fp32", images="", config="")


def save_encoder(folder: Path, weights: dict[str, Tensor], config: Config, state: State, source: str = "") -> None:
    """Write model.safetensors and config.json, each by rename. source: what it was imported from, if it was."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_WEIGHTS}.partial"
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, partial, metadata={"format": "pt", "made_by": "beitforge"})
    partial.replace(folder / _WEIGHTS)
    content = {"kind": "beit", "step": state.step, "samples_seen": state.samples_seen, "tokens": state.tokens}
    content |= {"imported_from": source} if source else {}
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps({**content, "config": to_tree(config)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / _CONFIG)


def load_encoder(folder: Path) -> tuple[Beit, Config]:
    """An exported or imported encoder with its head. Raises ConfigError when the folder holds none."""
    _, config, weights = _read_encoder(folder)
    return with_weights(config, weights, folder), config


def with_weights(config: Config, weights: dict[str, Tensor], source: Path) -> Beit:
    """An encoder for use: with these weights, and kernels for whatever device it is on.

    Raises ConfigError when the weights, read from `source`, are not an encoder's of this config.
    """
    model = dataclasses.replace(config.model, kernels="auto")
    beit = Beit(model, config.tokenizer.vocabulary, config.data.seed)
    if weights.keys() != beit.state_dict().keys():
        raise ConfigError(f"the weights in {source} are no encoder's of its config; is it the training of a tokenizer?")
    beit.load_state_dict(weights)
    return beit.eval()


def _read_encoder(folder: Path) -> tuple[dict, Config, dict[str, Tensor]]:
    try:
        content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if content.get("kind") != "beit":
            raise ConfigError(f"{folder} holds another library's checkpoint; bring it in with `import {folder} OUT`")
        config = from_tree(content["config"], str(folder / _CONFIG))
        return content, config, load_file(folder / _WEIGHTS)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no exported encoder; make one with `export RUN {folder}`") from error
    except (json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{folder} is damaged ({error}); export or import it again") from error


def start_from(folder: Path, beit: Beit, vocabulary: int) -> str:
    """Load an encoder's weights into a fresh one, fitted to its grid; returns a line that says what was taken.

    A head over another vocabulary stays as it was drawn. Raises ConfigError when the two are of different shape.
    """
    _, config, weights = _read_encoder(folder)
    for name in ("layers", "width", "heads", "patch_size", "mlp_ratio", "positions", "layer_scale", "mean", "std"):
        theirs, ours = getattr(config.model, name), getattr(beit.model, name)
        if theirs != ours:
            raise ConfigError(
                f"train.init {folder} has model.{name} {theirs}, this config says {ours}; make them equal"
            )
    fitted = fit_grid(weights, config.model, beit.model)
    same_head = config.tokenizer.vocabulary == vocabulary
    if not same_head:
        fitted |= {name: tensor for name, tensor in beit.state_dict().items() if name.startswith("head.")}
    beit.load_state_dict(fitted)
    return f"starting from {folder}" + ("" if same_head else f", with a new head over {vocabulary} tokens")
