"""Trained weights out of a run, and back: safetensors and a JSON config, no pickle. Must not know shards or stages."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.config.loading import from_dict, load_config, to_dict
from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.console import say
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.model.resize import fit_grid, for_finetuning
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.reading import parse_json, read_object, read_regular, require_regular
from beitforge.pipeline.runs.checkpoints import State, candidates, newest

Small = TypeVar("Small", dict, list)
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


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


def fine_tuned(run: Path) -> bool:
    """Whether a run folder is a fine-tuning's: its weights are a classifier's (pipeline.model.beit.Classifier)."""
    return _read_small(run / "environment.json", dict).get("job") == "finetune"


def class_names(run: Path) -> tuple[str, ...]:
    """What a fine-tuning's classes are called, in the order of their labels; () where nobody said."""
    return tuple(map(str, _read_small(run / "classes.json", list)))


def _read_small(path: Path, kind: type[Small]) -> Small:
    """The JSON object or list in a file of a run folder; an empty one where there is no file. Raises ConfigError."""
    try:
        content = parse_json(read_regular(path))
    except FileNotFoundError:
        return kind()
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it") from error
    if not isinstance(content, kind):
        raise ConfigError(f"{path} is damaged: it holds a {type(content).__name__}; remove it")
    return content


@dataclass(frozen=True)
class Trained:
    """float32 weights that are read one after the other. `each` may be called again."""

    shapes: dict[str, tuple[int, ...]]
    each: Callable[[], Iterator[tuple[str, Tensor]]]
    state: State

    def all(self) -> dict[str, Tensor]:
        return dict(self.each())


def trained_weights(run: Path, checkpoint: tuple[Path, State] | None = None) -> Trained:
    """The weights of a run's newest complete checkpoint, put together from every process's part; or an encoder's.

    checkpoint: the one to take, where it has been chosen (`newest` with whole=True). Raises ConfigError when there is
    neither.
    """
    found = checkpoint or newest(run, say, whole=True)
    if found is not None:
        folder, state = found
        saved = zero_layout.open_checkpoint(folder, state.zero_stage, state.groups, state.files)
        return Trained(saved.shapes, saved.weights, state)
    if not (run / _CONFIG).exists():
        why = "no checkpoint that can be used" if candidates(run) else "no complete checkpoint yet"
        raise ConfigError(f"{run} has {why}; let `pretrain` save one")
    content, _, weights = _read_encoder(run)
    step, seen, tokens = _whole(content, "step"), _whole(content, "samples_seen"), str(content.get("tokens", ""))
    state = State(
        step=step, samples_seen=seen, tokens=tokens, world=1, zero_stage=0, precision="fp32", images="", config=""
    )
    return Trained(
        {name: tuple(tensor.shape) for name, tensor in weights.items()}, lambda: iter(weights.items()), state
    )


def _whole(content: dict, name: str) -> int:
    found = content.get(name)
    return found if isinstance(found, int) else 0


def save_encoder(folder: Path, weights: dict[str, Tensor], config: Config, state: State, source: str = "") -> None:
    """Write model.safetensors and config.json, each by rename. source: what it was imported from, if it was."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    stream_encoder(folder, Trained(shapes, lambda: iter(weights.items()), state), config, source)


def stream_encoder(folder: Path, weights: Trained, config: Config, source: str = "") -> None:
    """As save_encoder, with no more than one tensor in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_WEIGHTS}.partial"
    _write_safetensors(partial, weights)
    partial.replace(folder / _WEIGHTS)
    state = weights.state
    content = {"kind": "beit", "step": state.step, "samples_seen": state.samples_seen, "tokens": state.tokens}
    content |= {"imported_from": source} if source else {}
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps({**content, "config": to_dict(config)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / _CONFIG)


def _write_safetensors(path: Path, weights: Trained) -> None:
    """The format of safetensors (a length, a JSON header, the tensors end to end), which its library writes only from
    memory."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt", "made_by": "beitforge"}}
    end = 0
    for name, shape in weights.shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), wanted in zip(weights.each(), weights.shapes, strict=True):
            assert name == wanted, "weights come in the order of their shapes"
            file.write(tensor.detach().cpu().float().contiguous().numpy().tobytes())


def written_as_read(folder: Path, weights: Trained) -> bool:
    """Whether the encoder in a folder has these weights, bit for bit; one tensor at a time."""
    with safe_open(folder / _WEIGHTS, "pt") as file:
        names = set(file.keys())
        return names == weights.shapes.keys() and all(torch.equal(file.get_tensor(n), t) for n, t in weights.each())


def refuse_others(config: Config, shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise ConfigError when weights of these shapes, read from `source`, are not an encoder's of this config."""
    with torch.device("meta"):
        beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    if {name: tuple(tensor.shape) for name, tensor in beit.state_dict().items()} != shapes:
        raise ConfigError(
            f"the weights in {source} are no pretraining's of its config; of a fine-tuning, `export {source} OUT "
            f"--to hf` and `import OUT ENCODER` make an encoder, a tokenizer's training has none"
        )


def load_encoder(folder: Path) -> tuple[Beit, Config]:
    """An exported or imported encoder with its head. Raises ConfigError when the folder holds none."""
    _, config, weights = _read_encoder(folder)
    return build_encoder(config, weights, folder), config


def build_encoder(config: Config, weights: dict[str, Tensor], source: Path) -> Beit:
    """An encoder for use: with these weights, and kernels for whatever device it is on.

    Raises ConfigError when the weights, read from `source`, are not an encoder's of this config.
    """
    refuse_others(config, {name: tuple(tensor.shape) for name, tensor in weights.items()}, source)
    model = dataclasses.replace(config.model, kernels="auto")
    beit = Beit(model, config.tokenizer.vocabulary, config.data.seed)
    beit.load_state_dict(weights)
    return beit.eval()


def _read_encoder(folder: Path) -> tuple[dict, Config, dict[str, Tensor]]:
    try:
        content = read_object(folder / _CONFIG)
        if content.get("kind") != "beit":
            raise ConfigError(f"{folder} holds another library's checkpoint; bring it in with `import {folder} OUT`")
        config = from_dict(dict(content["config"]), str(folder / _CONFIG))
        return content, config, load_file(require_regular(folder / _WEIGHTS))
    except FileNotFoundError as error:
        cure = f"`export {folder} OUT` and give OUT" if (folder / "config.yaml").exists() else "`export RUN OUT`"
        raise ConfigError(f"{folder} holds no exported encoder; make one with {cure}") from error
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{folder} is damaged ({shown(str(error))}); export or import it again") from error


def initialise_from(folder: Path, beit: Beit, vocabulary: int) -> str:
    """Load an encoder's weights into a fresh one, fitted to its grid; returns a line that says what was taken.

    A head over another vocabulary stays as it was drawn. Raises ConfigError when the two are of different shape.
    """
    _, config, weights = _read_encoder(folder)
    _refuse_other_shapes(f"train.init {folder}", config.model, beit.model)
    fitted = fit_grid(weights, config.model, beit.model)
    same_head = config.tokenizer.vocabulary == vocabulary
    if not same_head:
        fitted |= {name: tensor for name, tensor in beit.state_dict().items() if name.startswith("head.")}
    beit.load_state_dict(fitted)
    return f"starting from {folder}" + ("" if same_head else f", with a new head over {vocabulary} tokens")


def _refuse_other_shapes(what: str, theirs: Model, ours: Model) -> None:
    for name in ("layers", "width", "heads", "patch_size", "mlp_ratio", "positions", "layer_scale", "mean", "std"):
        if getattr(theirs, name) != getattr(ours, name):
            raise ConfigError(
                f"{what} has model.{name} {getattr(theirs, name)}, this config says {getattr(ours, name)}; make them "
                f"equal"
            )


def initialise_classifier_from(
    folder: Path, classifier: Classifier, model: Model, checkpoint: tuple[Path, State] | None = None
) -> str:
    """Load an encoder, of a run folder, exported or imported, into a classifier for images of its own size; returns
    a line that says what was taken. The head stays as it was drawn.

    model: the config's. checkpoint: as `trained_weights` takes it. Raises ConfigError when the two are of different
    shape, or there are no weights.
    """
    config, found = run_config(folder), trained_weights(folder, checkpoint)
    _refuse_other_shapes(f"finetune.init {folder}", config.model, model)
    refuse_others(config, found.shapes, folder)
    size = classifier.model.input_size
    weights, _ = for_finetuning(found.all(), config.model, size, classifier.pooling)
    head = {name: tensor for name, tensor in classifier.state_dict().items() if name.startswith("head.")}
    classifier.load_state_dict(weights | head)
    resized = f", its {config.model.input_size} px windows laid on {size}" if size != config.model.input_size else ""
    return f"starting from step {found.state.step} of {folder}{resized}"
