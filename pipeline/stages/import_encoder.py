"""`import SRC OUT`: a published or foreign BEiT becomes an encoder that pretrains further, is probed and exported.

SRC is a folder of transformers, of timm, or of `export`; or a file: the released code's .pth, or .safetensors.
"""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beitforge.pipeline.config.loading import load_dict
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import say
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.reading import read_object, require_regular
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.tokenizers.safe_pickle import read_pickle
from beitforge.pipeline.weights.conversion import from_hf, from_unilm
from beitforge.pipeline.weights.encoder import save_encoder
from beitforge.shards.storage.staging import refuse_strangers, staged_folder

Weights = dict[str, Tensor]

_CURE = "give a folder of transformers or timm, an export of ours, or the released code's .pth"
_HEAD_SIZE = 64  # of every published BEiT; counts only where nothing else says how many heads there are
_DOWNSTREAM = ("fc_norm.", "classifier.", "beit.pooler.", "pooler.", "decode_head.", "auxiliary_head.", "fpn")


def run(source: Path, out: Path, overrides: list[str]) -> int:
    """Write OUT/model.safetensors and OUT/config.json; returns the exit code. overrides: section.key=value."""
    refuse_strangers(out, replace=False)
    content, foreign = _read(source)
    weights = _our_names(foreign)
    left_out = [name for name in weights if name.startswith(_DOWNSTREAM)]
    weights = {name: tensor.float() for name, tensor in weights.items() if name not in left_out}
    try:
        tree = described(weights, content)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source} describes no BEiT ({shown(str(error))}): {_CURE}") from error
    config = load_dict(tree, overrides, str(source))
    beit = Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    absent = [name for name in beit.state_dict() if name not in weights]
    fresh = [name for name in absent if name.startswith(("head.", "norm.", "mask_embedding"))]
    odd = sorted(set(weights) - set(beit.state_dict())) + sorted(set(absent) - set(fresh))
    if odd:
        raise ConfigError(f"{source}: {odd[0]} does not fit a BEiT of this shape ({len(odd)} such names): {_CURE}")
    _load(beit, weights, source)
    state = State(step=0, samples_seen=0, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    with staged_folder(out, "import", replace=False) as folder:
        save_encoder(folder, beit.state_dict(), config, state, source=str(source))
    _tell(config, weights, fresh, left_out, out)
    return 0


def _load(beit: Beit, weights: Weights, source: Path) -> None:
    for name, ours in beit.state_dict().items():
        if name in weights and weights[name].shape != ours.shape:
            shapes = f"{tuple(weights[name].shape)} instead of {tuple(ours.shape)}"
            raise ConfigError(f"{source}: {name} has shape {shapes}: set model.… or tokenizer.vocabulary to what it is")
    beit.load_state_dict(weights, strict=False)


def _tell(config: Config, weights: Weights, fresh: list[str], left_out: list[str], out: Path) -> None:
    model = config.model
    say(
        f"imported a BEiT of {model.layers} layers, width {model.width}, {model.heads} heads, positions "
        f"{model.positions}, {sum(w.numel() for w in weights.values()):,} parameters, to {out}"
    )
    if fresh:
        say(f"not in the source and drawn from data.seed: {', '.join(fresh)}")
    if left_out:
        say(f"not part of pretraining and left out: {len(left_out)} tensors such as {left_out[0]}")


def _read(source: Path) -> tuple[dict, Weights]:
    """What a config.json beside the weights says, or {}; and the weights under their own names."""
    try:
        if source.is_dir():
            content = read_object(source / "config.json")
            return {**_preprocessing(source), **content}, _folder_weights(source)
        if source.suffix == ".safetensors":
            return {}, load_file(require_regular(source))
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename or source} does not exist: {_CURE}") from error
    except ConfigError:
        raise
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{source} cannot be read ({' '.join(str(error).split())[:200]}): {_CURE}") from error
    return {}, read_pickle(source, _saved_weights)


def _saved_weights(saved: Any) -> dict[str, Any]:
    """The weights within what the released code saves: alone, or beside its optimizer, epoch and arguments."""
    inner = saved.get("model", saved.get("module", saved)) if isinstance(saved, dict) else {}
    if not isinstance(inner, dict):
        return {}
    return {str(name): value for name, value in inner.items() if not str(name).endswith("relative_position_index")}


def _preprocessing(folder: Path) -> dict:
    """Mean and standard deviation, where transformers keeps them, as timm's config.json has them."""
    path = folder / "preprocessor_config.json"
    content = read_object(path) if path.exists() else {}
    if "image_mean" not in content or "image_std" not in content:
        return {}
    return {"pretrained_cfg": {"mean": content["image_mean"], "std": content["image_std"]}}


def _folder_weights(folder: Path) -> Weights:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no .safetensors file: {_CURE}")
    return {name: tensor for file in files for name, tensor in load_file(require_regular(file)).items()}


def _our_names(weights: Weights) -> Weights:
    if any(name.startswith("beit.encoder.layer.") for name in weights):
        return from_hf(weights)
    if any(name.startswith("encoder.layer.") for name in weights):  # saved from BeitModel, without its prefix
        return from_hf({f"beit.{name}": tensor for name, tensor in weights.items()})
    if "patch_embed.proj.weight" in weights:
        names = {name: "lm_head." + name.removeprefix("head.") for name in weights if name.startswith("head.")}
        classifier = any(name.startswith("fc_norm.") for name in weights)
        names = {} if "lm_head.weight" in weights else names
        renamed = {names.get(name, name): tensor for name, tensor in weights.items()}
        if classifier:
            renamed = {n.replace("lm_head.", "classifier."): tensor for n, tensor in renamed.items()}
        return from_unilm(renamed)
    if "patch_embedding.weight" in weights:
        return weights
    raise ConfigError(f"these are no weights of a BEiT (they begin with {sorted(weights)[:3]}): {_CURE}")


def described(weights: Weights, content: dict) -> dict:
    """The config sections that weights under our names, and a config.json of whichever library, imply."""
    if content.get("kind") == "beit":
        return content["config"]
    needed = ("patch_embedding.weight", "blocks.0.fc1.weight", "blocks.0.attention.qkv_weight")
    places = ("position_embedding", "shared_bias.table", "blocks.0.attention.own_bias.table")
    if any(name not in weights for name in needed) or not any(name in weights for name in places):
        raise ConfigError(f"these weights have no blocks or no positions of a BEiT: {_CURE}")
    width, inputs = weights["patch_embedding.weight"].shape
    patch = math.isqrt(inputs // 3)
    layers = sum(name.endswith("attention.qkv_weight") for name in weights)
    own = "blocks.0.attention.own_bias.table" in weights
    table = weights.get("shared_bias.table", weights.get("blocks.0.attention.own_bias.table"))
    arguments, pretrained = content.get("model_args", {}), content.get("pretrained_cfg", {})
    stated = content.get("num_attention_heads", arguments.get("num_heads", width // _HEAD_SIZE))
    size = content.get("image_size", arguments.get("img_size", (pretrained.get("input_size") or [0])[1:]))
    rows, columns = _grid(weights, table, size, patch)
    model = {
        "input_size": f"{rows * patch}x{columns * patch}",
        "patch_size": patch,
        "layers": layers,
        "width": width,
        "heads": table.shape[1] if table is not None else stated,
        "mlp_ratio": weights["blocks.0.fc1.weight"].shape[0] / width,
        "positions": "relative" if own else "relative_shared" if table is not None else "absolute",
        "layer_scale": "blocks.0.gamma1" in weights,
    }
    started = content.get("layer_scale_init_value", arguments.get("init_values")) or 0.0
    model |= {"layer_scale_init": started} if started else {}
    model |= {name: list(pretrained[name]) for name in ("mean", "std") if name in pretrained}
    # the published share of masked patches, and of the smallest block
    mask = {"num_patches": max(1, 75 * rows * columns // 196), "min_block": max(1, 16 * rows * columns // 196)}
    tokenizer: dict = {"input_size": f"{rows * 8}x{columns * 8}"}
    if "head.weight" in weights:
        tokenizer["vocabulary"] = weights["head.weight"].shape[0]
    return {"model": model, "mask": mask, "tokenizer": tokenizer}


def _grid(weights: Weights, table: Tensor | None, size: object, patch: int) -> tuple[int, int]:
    """Rows and columns: as the config says, else a square that fits the table or the positions."""
    if isinstance(size, int) and size:
        return size // patch, size // patch
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0] // patch, size[1] // patch
    if table is not None:
        side = (math.isqrt(table.shape[0] - 3) + 1) // 2
    else:
        side = math.isqrt(weights["position_embedding"].shape[1] - 1)
    return side, side
