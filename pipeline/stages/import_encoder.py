"""`import SRC OUT`: a published or foreign BEiT becomes ours: an encoder, to pretrain further, probe and export, or a
classifier with its norm and head.

SRC is a folder of transformers, of timm, or of `export`; or a file: the released code's .pth, .safetensors, .bin. What
is written computes what the source's library computes from the source itself, where that library is installed.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from beitforge.pipeline.config.loading import from_dict, load_dict, to_dict, to_size
from beitforge.pipeline.config.settings import Config, Model, Tokenizer
from beitforge.pipeline.console import say
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.model.blocks import LayerNorm
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.runs.checkpoints import State
from beitforge.pipeline.weights.classifier import classifier_config, save_classifier
from beitforge.pipeline.weights.encoder import CLASSIFIER, ENCODER, save_encoder
from beitforge.pipeline.weights.export_formats import hf_config
from beitforge.pipeline.weights.foreign import IMAGENET, INCEPTION, TRANSFORMERS, Foreign, foreign, with_zero_biases
from beitforge.pipeline.weights.peers import NotInstalled, source_forward
from beitforge.pipeline.weights.sources import CURE, Saved, read_checkpoint
from beitforge.shards.storage.staging import refuse_strangers, staged_folder

_AGREES = 1e-5  # largest difference of logits, as a share of the largest: float32 rounding over all layers
_EPSILON = 1e-6  # of our LayerNorm
_SMALLER_EPSILON, _LARGER_EPSILON = 1e-2, 1e-4  # likewise, what it may change of a source with a smaller or larger one
_HEADS_OF_TRANSFORMERS = 12  # where its config.json does not say
_Assumed = dict[str, tuple[object, str]]  # setting: value, why


def run(source: Path, out: Path, overrides: list[str], encoder_alone: bool = False) -> int:
    """Write OUT/model.safetensors and OUT/config.json; returns the exit code. overrides: section.key=value.
    encoder_alone: of a classifier, leave out norm and head, so that the rest pretrains further."""
    refuse_strangers(out, replace=False)
    saved = read_checkpoint(source)
    found, tree, assumed = described(saved, overrides, encoder_alone)
    config = load_dict(tree, overrides, str(source))
    if found.classifies and saved.config.get("kind") != CLASSIFIER:
        tune = dataclasses.replace(config.finetune, input_size=config.model.input_size)
        config = dataclasses.replace(config, finetune=tune)
    module = _module(found, config)
    fresh = _load(module, found, source)
    compared = _compare(saved, found, config, module, fresh)
    state = State(step=0, samples_seen=0, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    with staged_folder(out, "import", replace=False) as folder:
        if found.classifies:
            save_classifier(folder, module.state_dict(), config, found.names, state, source=str(source))
        else:
            save_encoder(folder, module.state_dict(), config, state, source=str(source))
    _tell(saved, found, config, fresh, out)
    if assumed:
        values = [f"{name}={_typed(value)}{why and f' ({why})'}" for name, (value, why) in assumed.items()]
        say(f"assumed, since nothing says it: {', '.join(values)}; give section.key=value for another")
    say(compared)
    return 0


def described(saved: Saved, overrides: list[str], encoder_alone: bool) -> tuple[Foreign, dict, _Assumed]:
    """What a checkpoint is, the config sections that follow, and what had to be assumed. Raises ConfigError."""
    try:
        found = foreign(saved, encoder_alone)
        with_zero_biases(found)
        given = {override.partition("=")[0]: override for override in overrides}
        return found, *_sections(saved, found, given)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise error if str(saved.source) in str(error) else ConfigError(f"{saved.source}: {error}") from error
        raise ConfigError(f"{saved.source} describes no BEiT ({shown(str(error))}): {CURE}") from error


def _typed(value: object) -> str:
    return str(list(value)) if isinstance(value, list | tuple) else str(value)


def _module(found: Foreign, config: Config) -> Beit | Classifier:
    if not found.classifies:
        return Beit(config.model, config.tokenizer.vocabulary, config.data.seed)
    model = classifier_config(config, _shapes(found)).model
    return Classifier(model, len(found.weights.get("head.weight", ())), config.finetune.pooling)


def _load(module: nn.Module, found: Foreign, source: Path) -> list[str]:
    """Put the weights in; returns the names that the source has nothing for, which stay as they were drawn."""
    ours, weights = module.state_dict(), found.weights
    absent = [name for name in ours if name not in weights]
    may_lack = () if found.classifies else ("head.", "norm.", "mask_embedding")
    odd = sorted(set(weights) - set(ours)) + [name for name in absent if not name.startswith(may_lack)]
    if odd:
        raise ConfigError(f"{source}: {odd[0]} does not fit a BEiT of this shape ({len(odd)} such names): {CURE}")
    for name, tensor in weights.items():
        if tensor.shape != ours[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(ours[name].shape)}"
            raise ConfigError(f"{source}: {name} has shape {shapes}: set model.… or tokenizer.vocabulary to what it is")
        if not tensor.isfinite().all():
            raise ConfigError(f"{source}: {name} contains numbers that are not finite: {CURE}")
    module.load_state_dict(weights, strict=False)
    return absent


@torch.no_grad()
def _compare(saved: Saved, found: Foreign, config: Config, module: Beit | Classifier, fresh: list[str]) -> str:
    """What the source's library says of these weights, as a line. Raises ConfigError when the two differ, or when the
    epsilon of our LayerNorm would make a difference."""
    if found.library not in ("transformers", "timm", "unilm"):
        return "these are weights of ours; there is no other library to compare them with"
    ours = _module(found, dataclasses.replace(config, model=dataclasses.replace(config.model, kernels="auto")))
    ours.load_state_dict(module.state_dict())
    ours.eval()
    hidden = not found.classifies and any(name.startswith(("norm.", "head.")) for name in fresh)
    masks = not hidden and not found.classifies and found.library == TRANSFORMERS and "mask_embedding" not in fresh
    masks = masks and bool(saved.config.get("use_mask_token", not saved.config))
    pixels, mask = _example(config)
    before, changed = _under_their_epsilon(saved, found, ours, pixels, mask if masks else None, hidden)
    described = hf_config(config.model, 0 if found.classifies else config.tokenizer.vocabulary)
    try:
        words, forward = source_forward(saved, found, config, hidden, described)
        apart = _difference(before, forward(pixels, mask if masks else None))
    except NotInstalled as error:
        return f"not compared with its own library, which is not installed or does not load: {error}{changed}"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{saved.source}: its own library cannot compute it ({shown(' '.join(str(error).split()))}): not imported"
        ) from error
    what = "hidden states" if hidden else "logits" if "head.weight" in found.weights else "features"
    if not apart <= _AGREES:
        rows, columns = config.model.grid
        odd = "" if rows == columns else "; transformers mixes up the tables of images that are not square"
        raise ConfigError(
            f"{saved.source}: {words} computes {what} from it that differ by {apart:.2g} of the largest, more than "
            f"{_AGREES:.0g}: not imported; model.heads or another setting is not what it was trained with{odd}"
        )
    return f"compared with {words}: {what} differ by at most {apart:.1e} of the largest{changed}"


def _under_their_epsilon(
    saved: Saved, found: Foreign, ours: Beit | Classifier, pixels: Tensor, mask: Tensor | None, hidden: bool
) -> tuple[Tensor, str]:
    """What our arithmetic gives with the LayerNorm epsilon of the source, and words for what ours changes of it.

    transformers' published BEiTs say 1e-12 of weights that the released code trained with 1e-6; a larger one than ours
    is another model. Raises ConfigError beyond what either may change.
    """
    plain = _outputs(ours, pixels, mask, hidden)
    if found.epsilon in (None, _EPSILON):
        return plain, ""
    for each in ours.modules():
        if isinstance(each, LayerNorm):
            each.epsilon = found.epsilon
    theirs = _outputs(ours, pixels, mask, hidden)
    apart, most = _difference(theirs, plain), _SMALLER_EPSILON if found.epsilon < _EPSILON else _LARGER_EPSILON
    if not apart <= most:
        raise ConfigError(
            f"{saved.source}: layer_norm_eps is {found.epsilon:g}, here it is {_EPSILON:g}, which changes what it "
            f"computes by {apart:.1g} of the largest number, more than {most:g}"
        )
    return theirs, f"; layer_norm_eps is {found.epsilon:g} there and {_EPSILON:g} here, which changes {apart:.1e} of it"


def _outputs(ours: Beit | Classifier, pixels: Tensor, mask: Tensor | None, hidden: bool) -> Tensor:
    if hidden:
        return ours.hidden(pixels, None)[-1]
    return ours(pixels) if isinstance(ours, Classifier) else ours.all_logits(pixels, mask)


def _example(config: Config) -> tuple[Tensor, Tensor]:
    """Two images of noise, normalised, and a mask each."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *config.model.input_size, generator=generator)
    return pixels, torch.rand(2, config.model.num_patches, generator=generator) < 0.4


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))


def _tell(saved: Saved, found: Foreign, config: Config, fresh: list[str], out: Path) -> None:
    model, numbers = config.model, sum(tensor.numel() for tensor in found.weights.values())
    classes = len(found.weights.get("head.weight", ()))
    named = ", with their names" if found.names else ""
    kind = f"classifier of {classes} classes{named}," if found.classifies else "BEiT of"
    say(
        f"imported a {kind} {model.layers} layers, width {model.width}, {model.heads} heads, positions "
        f"{model.positions}, {numbers:,} parameters, to {out}; read {', '.join(saved.read)}"
    )
    if fresh:
        say(f"not in the source and drawn from data.seed: {', '.join(fresh)}")
    for note in found.notes:
        say(note)


def _sections(saved: Saved, found: Foreign, given: dict[str, str]) -> tuple[dict, _Assumed]:
    """The config sections that the weights and what is said of them imply, and what had to be assumed."""
    if saved.config.get("kind") in (ENCODER, CLASSIFIER):
        return _own_sections(saved, found), {}
    weights = found.weights
    assumed: _Assumed = {}
    if not {"patch_embedding.weight", "blocks.0.fc1.weight", "blocks.0.attention.qkv_weight"} <= weights.keys():
        raise ConfigError(f"{saved.source}: these weights have no blocks or no positions of a BEiT: {CURE}")
    width, inputs = weights["patch_embedding.weight"].shape
    patch, hidden = math.isqrt(inputs // 3), len(weights["blocks.0.fc1.weight"])
    table, positions = _positions(saved, found)
    rows, columns = _grid(saved, found, table, patch, given)
    model: dict[str, object] = {
        "input_size": f"{rows * patch}x{columns * patch}",
        "patch_size": patch,
        "layers": sum(name.endswith("attention.qkv_weight") for name in weights),
        "width": width,
        "heads": _heads(saved, found, table, width, given, assumed),
        "mlp_ratio": hidden / width if int(width * (hidden / width)) == hidden else math.nextafter(hidden / width, 256),
        "positions": positions,
        "layer_scale": "blocks.0.gamma1" in weights,
    }
    _say_or_assume(model, found, given, assumed)
    return {"model": model, **_others(found, rows, columns, given, assumed)}, assumed


def _own_sections(saved: Saved, found: Foreign) -> dict:
    """The config of a folder of ours; where it is of a classifier whose encoder alone is taken, with its own shape."""
    tree = dict(saved.config["config"])
    if saved.config["kind"] == ENCODER:
        return tree
    found.names = tuple(map(str, saved.config.get("classes", ())))
    if found.classifies:
        return tree
    config = classifier_config(from_dict(tree, str(saved.source)), _shapes(found))
    rows, columns = config.model.grid
    stride, patches = config.tokenizer.stride, rows * columns
    tree = to_dict(config)
    tree["tokenizer"]["input_size"] = f"{rows * stride}x{columns * stride}"
    for name in ("num_patches", "min_block"):
        tree["mask"][name] = min(tree["mask"][name], patches)
    return tree


def _shapes(found: Foreign) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in found.weights.items()}


def _positions(saved: Saved, found: Foreign) -> tuple[Tensor | None, str]:
    """The bias table of the first layer, or the shared one, and the kind of positions."""
    kinds = {
        "absolute": "position_embedding",
        "relative": "blocks.0.attention.own_bias.table",
        "relative_shared": "shared_bias.table",
    }
    held = [kind for kind, name in kinds.items() if name in found.weights]
    if len(held) != 1:
        has = (
            f"have positions of several kinds ({', '.join(held)})"
            if held
            else "have no blocks or no positions of a BEiT"
        )
        raise ConfigError(f"{saved.source}: these weights {has}: {CURE}")
    return (None if held[0] == "absolute" else found.weights[kinds[held[0]]]), held[0]


def _heads(
    saved: Saved, found: Foreign, table: Tensor | None, width: int, given: dict[str, str], assumed: _Assumed
) -> int:
    if table is not None:
        if found.heads not in (None, table.shape[1]) and saved.config:
            raise ConfigError(
                f"{saved.source}: its config says {found.heads} heads, its bias table has {table.shape[1]}"
            )
        return table.shape[1]
    if found.heads is not None or "model.heads" in given:
        return found.heads or 1  # the override wins
    if found.library == TRANSFORMERS and saved.config:
        assumed["model.heads"] = _HEADS_OF_TRANSFORMERS, "the library's default"
        return _HEADS_OF_TRANSFORMERS
    raise ConfigError(
        f"{saved.source}: nothing says how many attention heads its width of {width} is cut into, and no weight shows "
        f"it: give model.heads=N (a published BEiT has {max(1, width // 64)} at this width)"
    )


def _grid(saved: Saved, found: Foreign, table: Tensor | None, patch: int, given: dict[str, str]) -> tuple[int, int]:
    """Rows and columns: as given or stated, else a square that fits the table or the positions."""
    size = found.size
    if "model.input_size" in given:
        size = list(to_size(given["model.input_size"].partition("=")[2], "model.input_size"))
    if table is None:
        patches = found.weights["position_embedding"].shape[1] - 1
        side = math.isqrt(patches)
        square = side * side == patches
    else:
        side = (math.isqrt(max(0, table.shape[0] - 3)) + 1) // 2
        square = (2 * side - 1) ** 2 == table.shape[0] - 3
    sides = [size, size] if isinstance(size, int) else list(size or ())
    if len(sides) == 2 and all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in sides):
        rows, columns = sides[0] // patch, sides[1] // patch
        count = rows * columns + 1 if table is None else (2 * rows - 1) * (2 * columns - 1) + 3
        held = table.shape[0] if table is not None else patches + 1
        if count != held or sides[0] % patch or sides[1] % patch:
            of = f"a grid of {side}×{side}" if square else f"{held} positions"
            raise ConfigError(
                f"{saved.source}: images are said to be {sides[0]}x{sides[1]}, but its weights are for {of}"
            )
        return rows, columns
    if not square:
        raise ConfigError(
            f"{saved.source}: its images are not square, and nothing says their size: give model.input_size"
        )
    return side, side


def _say_or_assume(model: dict[str, object], found: Foreign, given: dict[str, str], assumed: _Assumed) -> None:
    """Fill in what shows in no weight."""
    if found.mean is not None and found.std is not None:
        model |= {"mean": found.mean, "std": found.std}
    else:
        whose = "as published BEiT v2 models take" if found.second_version else "as published BEiT models take"
        pair = IMAGENET if found.second_version else INCEPTION
        for name, value in zip(("mean", "std"), pair, strict=True):
            model[name] = value
            if f"model.{name}" not in given:
                assumed[f"model.{name}"] = value, whose
    usual, own = Model(), "finetune" if found.classifies else "model"
    for name, section in (("drop_path", own), ("layer_scale_init", "model")):
        if stated := getattr(found, name) is not None:
            model[name] = getattr(found, name)
        if not stated and f"{section}.{name}" not in given and (name == "drop_path" or model["layer_scale"]):
            assumed[f"{section}.{name}"] = getattr(usual, name), ""
    if found.classifies and found.test_crop is None and "finetune.test_crop" not in given:
        assumed["finetune.test_crop"] = "auto", ""


def _others(found: Foreign, rows: int, columns: int, given: dict[str, str], assumed: _Assumed) -> dict[str, dict]:
    """Masks and tokens for pretraining further, and how a classifier is tuned and tested."""
    patches, said = rows * columns, found.settings
    mask = {name: value for name, value in said.get("mask", {}).items() if value <= patches}
    # the published share of masked patches, and of the smallest block
    usual = {"num_patches": max(1, 75 * patches // 196), "min_block": max(1, 16 * patches // 196)}
    side = said.get("tokenizer", {}).get("side") or 0
    stated = side in (8 * rows, 16 * rows) and rows == columns
    stride = side // rows if stated else 16 if found.second_version else 8
    tokenizer: dict[str, object] = {"input_size": f"{rows * stride}x{columns * stride}", "stride": stride}
    if "head.weight" in found.weights and not found.classifies:
        tokenizer["vocabulary"] = len(found.weights["head.weight"])
    names = ("drop_path", "dropout", "attention_dropout", "pooling", "test_crop") if found.classifies else ()
    finetune = {name: getattr(found, name) for name in names if getattr(found, name) is not None}
    for name in () if found.classifies else ("dropout", "attention_dropout"):
        if share := getattr(found, name):
            found.notes.append(f"trained with {name} {share:g}, which changes no number outside of training")
    if not found.classifies:
        for name, value in {"mask.num_patches": usual["num_patches"], "mask.min_block": usual["min_block"]}.items():
            if name.partition(".")[2] not in mask and name not in given:
                assumed[name] = value, ""
        if "tokenizer.input_size" not in given and not stated:
            assumed["tokenizer.input_size"] = tokenizer["input_size"], ""
        if "vocabulary" not in tokenizer and "tokenizer.vocabulary" not in given:
            assumed["tokenizer.vocabulary"] = Tokenizer().vocabulary, ""
    return {"mask": usual | mask, "tokenizer": tokenizer, "finetune": finetune}
