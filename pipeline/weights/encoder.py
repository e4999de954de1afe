"""Trained weights out of a run, and back: safetensors and a JSON config, no pickle. Must not know shards or stages.

A folder of weights holds an encoder with its head over tokens, or a classifier (pipeline.weights.classifier).
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.model.resize import fit_grid
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.reading import parse_json, read_object, read_regular, require_regular
from beitforge.pipeline.runs.checkpoints import State, candidates, newest
from beitforge.pipeline.runs.record import CLASSIFIER

Small = TypeVar("Small", dict, list)
WEIGHTS, _CONFIG = "model.safetensors", "config.json"
ENCODER = "beit"  # a kind of folder of weights, as CLASSIFIER is


def run_config(run: Path) -> Config:
    """The resolved config of a run folder, or of exported or imported weights."""
    if (run / "config.yaml").exists():
        return load_config(str(run / "config.yaml"), [])
    if (run / _CONFIG).exists():
        return read_described(run)[1]
    raise ConfigError(
        f"{run} is neither a run folder (no config.yaml) nor an encoder or a classifier ({_CONFIG}): give the folder "
        f"of a run, or what `export` or `import` wrote"
    )


def fine_tuned(folder: Path) -> bool:
    """Whether the weights of a run folder, or of exported or imported weights, are a classifier's
    (pipeline.model.beit.Classifier)."""
    if (folder / "config.yaml").exists() or not (folder / _CONFIG).exists():
        return _read_small(folder / "environment.json", dict).get("job") == "finetune"
    return read_described(folder)[0]["kind"] == CLASSIFIER


def class_names(folder: Path) -> tuple[str, ...]:
    """What a classifier's classes are called, in the order of their labels; () where nobody said."""
    if (folder / "config.yaml").exists() or not (folder / _CONFIG).exists():
        return tuple(map(str, _read_small(folder / "classes.json", list)))
    return tuple(read_described(folder)[0].get("classes", ()))


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


def trained_weights(run: Path, checkpoint: tuple[Path, State] | None = None, average: bool = False) -> Trained:
    """The weights of a run's newest complete checkpoint, put together from every process's part; or those of a folder
    of weights.

    checkpoint: the one to take, where it has been chosen (`newest` with whole=True). average: their moving average
    (finetune.ema_decay) instead. Raises ConfigError when there is none of what is asked for.
    """
    found = checkpoint or newest(run, say, whole=True)
    if found is not None:
        folder, state = found
        saved = zero_layout.open_checkpoint(folder, state.zero_stage, state.groups, state.files)
        if average and not saved.keeps(zero_layout.AVERAGE):
            raise ConfigError(
                f"{run} keeps no moving average of its weights: finetune.ema_decay was 0; leave out --ema"
            )
        return Trained(saved.shapes, partial(saved.weights, zero_layout.AVERAGE if average else "fp32"), state)
    if average:
        raise ConfigError(f"{run} is no run with a checkpoint, whose moving average --ema would take; leave it out")
    if not (run / _CONFIG).exists():
        why = "no checkpoint that can be used" if candidates(run) else "no complete checkpoint yet"
        raise ConfigError(f"{run} has {why}; let `{'finetune' if fine_tuned(run) else 'pretrain'}` save one")
    content, weights = read_described(run)[0], _read_weights(run)
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
    write_folder(folder, {"kind": ENCODER}, weights, config, source)


def write_folder(folder: Path, said: dict, weights: Trained, config: Config, source: str) -> None:
    """Write a folder of weights of any kind; said: what its config.json holds beside the config and the state."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS}.partial"
    _write_safetensors(partial, weights)
    partial.replace(folder / WEIGHTS)
    state = weights.state
    content = {**said, "step": state.step, "samples_seen": state.samples_seen, "tokens": state.tokens}
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
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
        return names == weights.shapes.keys() and all(torch.equal(file.get_tensor(n), t) for n, t in weights.each())


def refuse_others(config: Config, shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise ConfigError when weights of these shapes, read from `source`, are not an encoder's of this config."""
    with torch.device("meta"):
        beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    if {name: tuple(tensor.shape) for name, tensor in beit.state_dict().items()} != shapes:
        raise ConfigError(
            f"the weights in {source} are no pretraining's of its config; a tokenizer's training has no encoder"
        )


def load_encoder(folder: Path) -> tuple[Beit, Config]:
    """An exported or imported encoder with its head. Raises ConfigError when the folder holds none."""
    config, weights = _read_encoder(folder)
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


def read_described(folder: Path) -> tuple[dict, Config]:
    """What config.json of a folder of weights says, of a kind that is known, and the config in it; no weights are read.
    Raises ConfigError."""
    with _as_one_line(folder):
        content = read_object(folder / _CONFIG)
        if content.get("kind") not in (ENCODER, CLASSIFIER):
            raise ConfigError(f"{folder} holds another library's checkpoint; bring it in with `import {folder} OUT`")
        names = content.get("classes", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("classes is no list of names")
        if names and len(names) != content.get("num_classes"):
            raise ValueError(f"{len(names)} names for {content.get('num_classes')} classes")
        return content, from_dict(dict(content["config"]), str(folder / _CONFIG))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    with _as_one_line(folder):
        return load_file(require_regular(folder / WEIGHTS))


def _read_encoder(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    content, config = read_described(folder)
    if content["kind"] != ENCODER:
        raise ConfigError(
            f"{folder} holds a classifier, which has no head over visual tokens: give the pretraining that it was "
            f"made from, or what `export` wrote of that"
        )
    return config, _read_weights(folder)


@contextlib.contextmanager
def _as_one_line(folder: Path) -> Iterator[None]:
    """What may be wrong with a folder of weights, as ConfigError."""
    try:
        yield
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
    config, weights = _read_encoder(folder)
    refuse_other_shapes(f"train.init {folder}", config.model, beit.model)
    fitted = fit_grid(weights, config.model, beit.model)
    same_head = config.tokenizer.vocabulary == vocabulary
    if not same_head:
        fitted |= {name: tensor for name, tensor in beit.state_dict().items() if name.startswith("head.")}
    beit.load_state_dict(fitted)
    return f"starting from {folder}" + ("" if same_head else f", with a new head over {vocabulary} tokens")


def refuse_other_shapes(what: str, theirs: Model, ours: Model) -> None:
    """Raise ConfigError where weights of one shape do not fit another; the size of images may differ. what: names the
    setting and the folder."""
    for name in ("layers", "width", "heads", "patch_size", "mlp_ratio", "positions", "layer_scale", "mean", "std"):
        if getattr(theirs, name) != getattr(ours, name):
            raise ConfigError(
                f"{what} has model.{name} {getattr(theirs, name)}, this config says {getattr(ours, name)}; make them "
                f"equal"
            )
