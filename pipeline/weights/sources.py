"""What lies in a foreign checkpoint: its weights under their own names, and all that says what they are.

Reads files, runs nothing of them; what they mean is told in pipeline.weights.foreign. Must not know shards or stages.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.reading import read_object, require_regular
from beitforge.pipeline.tokenizers.safe_pickle import Inert, is_tensor, plain_settings, read_pickle

Weights = dict[str, Tensor]

CURE = "give a folder of transformers or timm, an export of ours, or the released code's .pth"
_CONFIG, _PREPROCESSOR, _PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
_PICKLES = (".bin", ".pth", ".pt")
_WRAPPERS = ("model", "module", "state_dict")  # what training puts weights into; the first two are the released code's
_PREFIXES = ("module.", "_orig_mod.", "model.")  # what wrappers of a whole model put before every name
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it lies there.

    config: config.json of whichever library; preprocessor: preprocessor_config.json, or what processor_config.json says
    of images; arguments: what a .pth says of the training that made it; ours: the sections that an export of ours adds
    to a .pth. read: the files of these; notes: lines for who imports it.
    """

    source: Path
    weights: Weights
    config: dict = field(default_factory=dict)
    preprocessor: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)
    read: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_checkpoint(source: Path) -> Saved:
    """A folder or a file of transformers, timm, the released code or ours. Raises ConfigError for what cannot be read.

    A .pth with arguments of its own is described by them; any other file by what lies beside it, as in its folder.
    """
    try:
        if not source.exists():
            raise ConfigError(f"{source} does not exist: {CURE}")
        files = _files(source) if source.is_dir() else [source]
        weights, said, notes = _weights(files)
        folder = source if source.is_dir() else source.parent
        beside = {} if said else {name: read_object(folder / name) for name in _beside(folder)}
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({error.strerror or error}): {CURE}") from error
    except ConfigError:
        raise
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{source} cannot be read ({shown(' '.join(str(error).split()))}): {CURE}") from error
    if not weights:
        raise ConfigError(f"{source} holds no weights: {CURE}")
    return Saved(
        source=source,
        weights=_without_prefix(weights),
        config=beside.get(_CONFIG, {}),
        preprocessor=beside.get(_PREPROCESSOR) or _nested(beside.get(_PROCESSOR, {})),
        arguments=said.get("args", {}),
        ours=said.get("beitforge", {}),
        read=(*(file.name for file in files), *beside, *(["its own arguments"] if said else [])),
        notes=notes,
    )


def _beside(folder: Path) -> list[str]:
    return [name for name in (_CONFIG, _PREPROCESSOR, _PROCESSOR) if (folder / name).exists()]


def _nested(processor: dict) -> dict:
    """What a processor's config says of its image processor."""
    held = processor.get("image_processor")
    return held if isinstance(held, dict) else {}


def _files(folder: Path) -> list[Path]:
    """The file or the shards that hold a folder's weights; safetensors before pickles. Raises ConfigError where that is
    not clear."""
    for suffixes, usual in (((".safetensors",), "model"), (_PICKLES, "pytorch_model")):
        held = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        indexes = [path for path in (folder / f"{usual}{suffix}.index.json" for suffix in suffixes) if path.exists()]
        whole = [path for path in held if path.stem == usual]
        if whole or indexes:
            return whole[:1] or _indexed(indexes[0])
        if len(held) > 1:
            return _all_shards(held)
        if held:
            return held
    raise ConfigError(f"{folder} holds no file of weights (.safetensors, .bin, .pth): {CURE}")


def _indexed(index: Path) -> list[Path]:
    """The shards that an index of transformers names; each must lie beside it."""
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ConfigError(f"{index} is damaged: it has no weight_map of names and files; download the folder again")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise ConfigError(f"{index} names {shown(name)}, which does not lie beside it; nothing was read")
        if not (index.parent / name).exists():
            raise ConfigError(f"{index} names {shown(name)}, which is missing: download the folder whole")
    return [index.parent / name for name in names]


def _all_shards(files: list[Path]) -> list[Path]:
    """Files called …-00001-of-0000N, all N of them. Raises ConfigError for any others."""
    found = [_SHARD.fullmatch(file.name) for file in files]
    names = sorted(file.name for file in files)
    if not all(found) or len({(match[1], match[3], match[4]) for match in found if match}) != 1:
        raise ConfigError(f"{files[0].parent} holds several files of weights ({', '.join(names[:4])}): give one as SRC")
    wanted = int(found[0][3]) if found[0] else 0
    if len(files) != wanted:
        raise ConfigError(f"{files[0].parent} holds {len(files)} of {wanted} parts of its weights: download it whole")
    return files


def _weights(files: list[Path]) -> tuple[Weights, dict[str, dict], tuple[str, ...]]:
    """The weights of all files; what a .pth says beside them; and lines about what else it holds."""
    merged: Weights = {}
    said: dict[str, dict] = {}
    notes: list[str] = []
    for file in files:
        tensors_alone = file.suffix == ".safetensors"
        found = load_file(require_regular(file)) if tensors_alone else _pickled(file, said, notes)
        twice = [name for name, times in Counter([*merged, *found]).items() if times > 1]
        if twice:
            raise ConfigError(f"{file} holds {shown(twice[0])}, as another part does, too: {CURE}")
        merged |= found
    return merged, said, tuple(notes)


def _pickled(file: Path, said: dict[str, dict], notes: list[str]) -> Weights:
    """The tensors of a file of torch.save: alone, or beside optimizer, epoch and arguments, which go into `said`."""

    def pick(saved: Any) -> dict[str, Inert]:
        if not isinstance(saved, dict):
            return {}
        if settings := plain_settings(saved.get("args")):
            said["args"] = settings
        if isinstance(saved.get("beitforge"), dict):
            said["beitforge"] = {str(name): plain_settings(each) for name, each in saved["beitforge"].items()}
        notes.extend(f"{name} is there, too, and was not taken" for name in saved if str(name).endswith("_ema"))
        for name in _WRAPPERS:
            if isinstance(saved.get(name), dict):
                saved = saved[name]
        return {str(name): value for name, value in saved.items() if is_tensor(value) and not _follows(name)}

    return read_pickle(file, pick)


def _follows(name: Any) -> bool:
    """Whether a buffer follows from the shape: the row of the bias table for each pair of positions."""
    return str(name).endswith("relative_position_index")


def _without_prefix(weights: Weights) -> Weights:
    weights = {name: tensor for name, tensor in weights.items() if not _follows(name)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights
