"""What a foreign checkpoint is: the same weights under our names, and what its library says of them.

Each library's words (config.json, arguments, preprocessing) are read whole. What would compute other numbers here is
refused, what contradicts the weights, too; what nobody says is left open (None), for the caller to fill and to tell.
Must not know shards or any stage.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.weights.conversion import from_hf, from_unilm
from beitforge.pipeline.weights.preprocessing import read_preprocessing
from beitforge.pipeline.weights.sources import CURE, Saved, Weights
from beitforge.pipeline.weights.stated import agree, agree_positions, number, refuse, sizes, three, whole

TRANSFORMERS, TIMM, UNILM, OURS = "transformers", "timm", "unilm", "ours"
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
INCEPTION = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
# layers, width and heads by the names that the released code and timm share
_PUBLISHED = {"base": (12, 768, 12), "large": (24, 1024, 16), "24x544": (24, 544, 16), "huge": (32, 1280, 16)}
_PUBLISHED |= {"giant": (40, 1408, 16)}
_IN_MEMORY = (
    (r"\blayers\.(\d+)\.relative_position_bias\.", r"encoder.layer.\1.attention.attention.relative_position_bias."),
    (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"\bmlp\.fc1\.", "intermediate.dense."),
    (r"\bmlp\.fc2\.", "output.dense."),
    (r"\bshared_position_bias\.", "encoder.relative_position_bias."),
)
_DOWNSTREAM = ("decode_head.", "auxiliary_head.", "fpn", "beit.fpn")
_SECOND_HEAD = ("cls_pt_layers.", "cls_pt_norm.", "cls_pt_lm_head.")
# of model_args; anything else, unless it is off, is no BEiT of ours
_TIMM_KNOWN = re.compile(
    "img_size|patch_size|embed_dim|depth|mlp_ratio|num_classes|head_init_scale|init_values|num_heads|in_chans|"
    "global_pool|use_fc_norm|(drop|pos_drop|proj_drop|attn_drop|drop_path)_rate|qkv_bias|use_abs_pos_emb|"
    "use_rel_pos_bias|use_shared_rel_pos_bias"
)


@dataclass(kw_only=True)
class Foreign:
    """A checkpoint under our names. None: its library says nothing about it.

    weights: with `norm.` and `head.` of a pretraining or of a classifier, as `classifies` says. size: of images, in
    pixels, a side or [height, width]. epsilon: of its LayerNorms. settings: what is said of masks, as in their section,
    and of the tokenizer, the `side` of its images. notes: lines about what was left out or is different.
    """

    library: str
    weights: Weights
    classifies: bool
    normed: bool  # whether the norm is one over every position, as pretraining and cls pooling have it
    heads: int | None = None
    size: Any = None
    mean: list[float] | None = None
    std: list[float] | None = None
    epsilon: float | None = None
    drop_path: float | None = None
    layer_scale_init: float | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    pooling: str | None = None
    test_crop: float | None = None
    names: tuple[str, ...] = ()
    second_version: bool = False  # BEiT v2, whose published models take ImageNet's mean and VQ-KD's tokens
    settings: dict[str, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def foreign(saved: Saved, encoder_alone: bool) -> Foreign:
    """What a checkpoint of another library, or bare weights, are. encoder_alone: leave out a classifier's norm and
    head. Raises ConfigError for what is no BEiT, or would compute other numbers here."""
    library, renamed = _renamed(saved)
    found = _parts(library, renamed, saved, encoder_alone)
    {TRANSFORMERS: _read_transformers, TIMM: _read_timm, UNILM: _read_unilm, OURS: lambda *_: None}[library](
        saved, found
    )
    return found


def _renamed(saved: Saved) -> tuple[str, Weights]:
    """Whose names these weights have, and the weights under ours; heads and norms as _parts takes them."""
    weights, config = saved.weights, saved.config
    if any(re.match(r"(\w+\.)?layers\.\d+\.attention\.q_proj\.", name) for name in weights):
        weights = {_as_saved(name): tensor for name, tensor in weights.items()}
    if any(re.match(r"(\w+\.)?encoder\.layer\.\d+\.", name) for name in weights):
        prefix = next((p for p in ("beit.", "data2vec_vision.") if any(n.startswith(p) for n in weights)), "")
        return TRANSFORMERS, from_hf({_hf_name(name, prefix): tensor for name, tensor in weights.items()})
    if "patch_embed.proj.weight" in weights:
        if any(name.endswith("attn.qkv.bias") for name in weights):
            refuse(saved, f"its attention has one bias for queries, keys and values, a BEiT's keys have none: {CURE}")
        timm = "architecture" in config or "pretrained_cfg" in config or "model_args" in config
        tokens = timm and _timm_arguments(config).get("global_pool") == "" and "lm_head.weight" not in weights
        pairs = (("fc_norm.", "pooled_norm."), ("head.", "lm_head." if tokens else "classifier."))
        return TIMM if timm else UNILM, from_unilm({_swapped(name, pairs): tensor for name, tensor in weights.items()})
    if "patch_embedding.weight" in weights:
        return OURS, weights
    if any(name.startswith(("encode_task_layer.", "quantize.", "blocks.group_")) for name in weights):
        raise ConfigError(f"{saved.source} is a tokenizer: bring it in with `import-tokenizer {saved.source} OUT`")
    raise ConfigError(f"{saved.source} holds no weights of a BEiT (they begin with {sorted(weights)[:3]}): {CURE}")


def _as_saved(name: str) -> str:
    """A name that transformers 5 has in memory, as it saves it."""
    for memory, file in _IN_MEMORY:
        name = re.sub(memory, file, name)
    return name


def _hf_name(name: str, prefix: str) -> str:
    """A name as a checkpoint of BeitForMaskedImageModeling has it; those of other classes as _parts takes them."""
    heads = ("lm_head.", "classifier.", "layernorm.", *_DOWNSTREAM)
    inner = name.removeprefix(prefix) if prefix else name
    if prefix and not name.startswith(prefix):
        return name if name.startswith(heads) else f"{name} (outside of {prefix[:-1]})"
    if inner.startswith("layernorm."):
        return "inner_norm." + inner.removeprefix("layernorm.")
    if inner.startswith("pooler.layernorm."):
        return "pooled_norm." + inner.removeprefix("pooler.layernorm.")
    return inner if inner.startswith(_DOWNSTREAM) else f"beit.{inner}"


def _swapped(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


def _parts(library: str, weights: Weights, saved: Saved, encoder_alone: bool) -> Foreign:
    """Sort norms and heads: of a pretraining `norm.` and `head.`; of a classifier `pooled_norm.` behind mean pooling or
    `norm.` before cls pooling, and `classifier.`; what else there is, is left out and noted."""
    notes = list(saved.notes)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    halves = {str(tensor.dtype).removeprefix("torch.") for tensor in saved.weights.values()} - {"float32"}
    if halves:
        notes.append(f"stored as {', '.join(sorted(halves))}; float32 here")
    _leave_out(
        weights,
        _SECOND_HEAD,
        notes,
        "BEiT v2's second head over early layers; the encoder and lm_head, whose "
        "logits are the first of its two outputs, are taken",
    )
    _leave_out(weights, _DOWNSTREAM, notes, "a segmentation's")
    if any(name.startswith("inner_norm.") for name in weights):
        if any(name.startswith("norm.") for name in weights):
            refuse(saved, "use_mean_pooling is false, so a second LayerNorm stands under its head; there is none here")
        weights = {_swapped(name, (("inner_norm.", "norm."),)): tensor for name, tensor in weights.items()}
    pooled, normed = "pooled_norm.weight" in weights, "norm.weight" in weights
    if pooled and normed and "classifier.weight" in weights:
        refuse(saved, "it has a norm before the pooling and one behind it; a BEiT has one of them")
    tuned = "mask_embedding" not in weights or "ImageClassification" in str(saved.config.get("architectures"))
    classifies = "classifier.weight" in weights or (pooled and tuned and not normed)
    if "classifier.weight" in weights and "head.weight" in weights:
        refuse(saved, "it has a head over tokens and one over classes; give the pretraining or the classifier alone")
    if library == OURS:
        classifies, pooled = saved.config.get("kind") == "beit-classifier", False
    if not classifies:
        _leave_out(weights, ("pooled_norm.",), notes, "a pooler's")
    elif encoder_alone:
        cut = ("pooled_norm.", "classifier.") if pooled else ("norm.", "classifier.", "head.")
        _leave_out(weights, cut, notes, "a classifier's")
        classifies, normed = False, False
    else:
        _leave_out(weights, ("mask_embedding",), notes, "for masked patches, which a classifier never sees")
        pairs = (("pooled_norm.", "norm."), ("classifier.", "head."))
        weights = {_swapped(name, pairs): tensor for name, tensor in weights.items()}
    return Foreign(library=library, weights=weights, classifies=classifies, normed=normed, notes=notes)


def _leave_out(weights: Weights, prefixes: tuple[str, ...], notes: list[str], what: str) -> None:
    names = [name for name in weights if name.startswith(prefixes)]
    for name in names:
        del weights[name]
    if names:
        notes.append(f"left out: {len(names)} tensors such as {names[0]}, {what}")


def _read_transformers(saved: Saved, found: Foreign) -> None:
    config, weights = saved.config, found.weights
    if not config:
        read_preprocessing(saved, found)
        return
    kind = config.get("model_type", "beit")
    if kind not in ("beit", "data2vec-vision"):
        refuse(saved, f"its config.json is that of model_type {shown(kind)}, no BEiT: {CURE}")
    act = config.get("hidden_act", "gelu")
    if act not in ("gelu", "gelu_python"):
        refuse(
            saved, f"hidden_act is {shown(act)}; a BEiT here computes with gelu alone, so its numbers would be others"
        )
    if number(saved, config, "num_channels", 3) != 3:
        refuse(saved, f"num_channels is {shown(config['num_channels'])}; images here have 3")
    found.heads = whole(saved, config, "num_attention_heads", None)
    found.size = config.get("image_size")
    found.epsilon = number(saved, config, "layer_norm_eps", 1e-12)  # transformers' own default
    found.drop_path = number(saved, config, "drop_path_rate", None)
    found.layer_scale_init = number(saved, config, "layer_scale_init_value", None)
    found.dropout = number(saved, config, "hidden_dropout_prob", None)
    found.attention_dropout = number(saved, config, "attention_probs_dropout_prob", None)
    width, hidden, layers = sizes(saved, weights)
    agree(saved, config, "hidden_size", width)
    agree(saved, config, "num_hidden_layers", layers)
    agree(saved, config, "intermediate_size", hidden)
    _agree_rows(saved, config, found, "vocab_size", None)
    agree_positions(
        saved,
        config,
        weights,
        "use_absolute_position_embeddings",
        "use_relative_position_bias",
        "use_shared_relative_position_bias",
    )
    if found.layer_scale_init is not None and (found.layer_scale_init > 0) != ("blocks.0.gamma1" in weights):
        refuse(saved, f"layer_scale_init_value is {found.layer_scale_init:g}, which its weights contradict")
    mean_pooling = config.get("use_mean_pooling", True)
    if found.classifies:
        if mean_pooling is found.normed:
            refuse(saved, f"use_mean_pooling is {mean_pooling}, which its weights contradict")
        found.pooling = "mean" if mean_pooling else "cls"
        found.names = _labels(saved, weights)
    read_preprocessing(saved, found)


def _labels(saved: Saved, weights: Weights) -> tuple[str, ...]:
    """Names of the classes, where id2label gives one to each that is more than its number."""
    labels = saved.config.get("id2label")
    if "head.weight" not in weights or not isinstance(labels, dict):
        return ()
    if len(labels) != len(weights["head.weight"]):
        refuse(saved, f"id2label names {len(labels)} classes, its head has {len(weights['head.weight'])}")
    names = [labels.get(str(label)) for label in range(len(weights["head.weight"]))]
    if not all(isinstance(name, str) for name in names) or names == [f"LABEL_{i}" for i in range(len(names))]:
        return ()
    return tuple(str(name) for name in names)


def _timm_arguments(config: dict) -> dict:
    arguments = config.get("model_args")
    arguments = dict(arguments) if isinstance(arguments, dict) else {}
    if "global_pool" not in arguments and isinstance(config.get("global_pool"), str):
        arguments["global_pool"] = config["global_pool"]
    return arguments


def _read_timm(saved: Saved, found: Foreign) -> None:
    config, weights = saved.config, found.weights
    arguments = _timm_arguments(config)
    held = config.get("pretrained_cfg")
    pretrained: dict = held if isinstance(held, dict) else config  # older ones have its fields at the top
    name = str(config.get("architecture", pretrained.get("architecture", "beit")))
    if not name.startswith("beit"):
        refuse(saved, f"its architecture is {shown(name)}, no BEiT: {CURE}")
    for key, value in arguments.items():
        off = value in (None, False, 0, 0.0)
        if not _TIMM_KNOWN.fullmatch(key) and not off:
            refuse(saved, f"model_args.{key[:40]} is {shown(value)}; a BEiT here has nothing of the kind")
    width, _, layers = sizes(saved, weights)
    for key, value in (("embed_dim", width), ("depth", layers), ("in_chans", 3)):
        agree(saved, arguments, key, value)
    _agree_rows(saved, arguments, found, "num_classes", "num_classes")
    agree_positions(saved, arguments, weights, "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias")
    found.second_version = name.startswith("beitv2")
    found.heads = whole(saved, arguments, "num_heads", _published_heads(name, layers, width))
    size = pretrained.get("input_size")
    found.size = arguments.get("img_size", size[1:] if isinstance(size, list) and len(size) == 3 else None)
    found.epsilon = 1e-6
    found.drop_path = number(saved, arguments, "drop_path_rate", None)
    found.layer_scale_init = number(saved, arguments, "init_values", None)
    found.attention_dropout = number(saved, arguments, "attn_drop_rate", None)
    found.dropout = number(saved, arguments, "proj_drop_rate", None)
    if "mean" in pretrained and "std" in pretrained:
        found.mean, found.std = three(saved, "mean", pretrained["mean"]), three(saved, "std", pretrained["std"])
    if found.classifies:
        pool = arguments.get("global_pool", "avg" if not found.normed else "token")
        if pool not in ("avg", "token") or (pool == "avg" and found.normed):
            refuse(
                saved,
                f"global_pool is {shown(pool)} with {'norm' if found.normed else 'fc_norm'}; a classifier "
                "here has its norm behind the mean (avg) or pools the cls token (token)",
            )
        found.pooling = "mean" if pool == "avg" else "cls"
        found.test_crop = number(saved, pretrained, "crop_pct", None)
        labels = config.get("label_names")
        if isinstance(labels, list) and len(labels) == len(weights.get("head.weight", ())):
            found.names = tuple(map(str, labels))


def _read_unilm(saved: Saved, found: Foreign) -> None:
    said, weights = saved.arguments, found.weights
    width, _, layers = sizes(saved, weights)
    name = str(said.get("model", ""))
    found.epsilon = 1e-6
    found.second_version = any(n.startswith(_SECOND_HEAD) for n in saved.weights) or "tokenizer_model" in said
    _refuse_regression(saved, found, width)
    read_preprocessing(saved, found)
    _read_ours(saved, found)
    if not said:
        found.pooling = ("cls" if found.normed else "mean") if found.classifies else None
        return
    if said.get("act_layer") not in (None, "gelu"):
        refuse(saved, f"act_layer is {shown(said['act_layer'])}; a BEiT here computes with gelu alone")
    biased = any(n.endswith("q_bias") for n in saved.weights)
    if biased and (said.get("qkv_bias") is False or said.get("disable_qkv_bias") is True):
        refuse(saved, "its arguments say that queries and values have no biases, which its weights contradict")
    found.heads = _published_heads(name, layers, width)
    found.size = said.get("input_size") if found.classifies else None  # pretraining takes 224 whatever this says
    found.drop_path = number(saved, said, "drop_path", None)
    found.layer_scale_init = number(saved, said, "layer_scale_init_value", None)
    found.dropout = number(saved, said, "drop", None)
    found.attention_dropout = number(saved, said, "attn_drop_rate", None)
    if isinstance(said.get("imagenet_default_mean_and_std"), bool):
        found.mean, found.std = IMAGENET if said["imagenet_default_mean_and_std"] else INCEPTION
    elif said.get("mean") and said.get("std"):  # timm's training has words of its own
        found.mean, found.std = three(saved, "mean", said["mean"]), three(saved, "std", said["std"])
    bias = "use_rel_pos_bias" if found.classifies else "use_shared_rel_pos_bias"
    renamed = {"use_abs_pos_emb": said.get("abs_pos_emb"), bias: said.get("rel_pos_bias")}
    stated = {key: value for key, value in renamed.items() if isinstance(value, bool)}
    agree_positions(saved, stated, weights, "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias")
    if found.layer_scale_init is not None and (found.layer_scale_init > 0) != ("blocks.0.gamma1" in weights):
        refuse(saved, f"layer_scale_init_value is {found.layer_scale_init:g}, which its weights contradict")
    if found.classifies:
        pooled = said.get("use_mean_pooling", not found.normed)
        if pooled is found.normed:
            refuse(saved, f"use_mean_pooling is {pooled}, which its weights contradict")
        found.pooling = "mean" if pooled else "cls"
        found.test_crop = number(saved, said, "crop_pct", None)
    _agree_rows(saved, said, found, "codebook_size", "nb_classes")
    found.settings = _training(saved, said)


def _read_ours(saved: Saved, found: Foreign) -> None:
    """What `export --to unilm` adds, since the released code's arguments have no words for it."""
    model, head = saved.ours.get("model", {}), saved.ours.get("classifier", {})
    found.heads, found.size = whole(saved, model, "heads", None), model.get("input_size")
    found.drop_path = number(saved, model, "drop_path", None)
    found.layer_scale_init = number(saved, model, "layer_scale_init", None)
    if "mean" in model and "std" in model:
        found.mean, found.std = three(saved, "mean", model["mean"]), three(saved, "std", model["std"])
    found.test_crop = number(saved, head, "test_crop", None)
    names = head.get("names", [])
    if names and len(names) == len(found.weights.get("head.weight", ())):
        found.names = tuple(map(str, names))


def _refuse_regression(saved: Saved, found: Foreign, width: int) -> None:
    """data2vec's lm_head gives hidden vectors, no logits over tokens."""
    rows = len(found.weights["head.weight"]) if "head.weight" in found.weights and not found.classifies else 0
    if "target_layers" in saved.arguments or rows == width >= 192:
        _leave_out(found.weights, ("head.",), found.notes, "which predicts data2vec's hidden vectors, no tokens")


def _training(saved: Saved, said: dict) -> dict[str, dict]:
    """Masks of the released pretraining, and the size that its tokenizer takes."""
    pairs = (("num_mask_patches", "num_patches"), ("min_mask_patches_per_block", "min_block"))
    mask = {ours: whole(saved, said, theirs, None) for theirs, ours in pairs if said.get(theirs)}
    size = whole(saved, said, "second_input_size", None) if said.get("second_input_size") else None
    return {"mask": mask, "tokenizer": {"side": size}}


def _published_heads(name: str, layers: int, width: int) -> int | None:
    """Heads of a published architecture, where the weights are of its shape."""
    shapes = [shape for word, shape in _PUBLISHED.items() if f"_{word}_" in f"{name}_"]
    return shapes[0][2] if shapes and shapes[0][:2] == (layers, width) else None


def _agree_rows(saved: Saved, said: dict, found: Foreign, tokens: str, classes: str | None) -> None:
    """Whether the head has as many rows as is said of tokens or classes, where that is said, and more than 0."""
    key = classes if found.classifies else tokens
    if key and said.get(key) and "head.weight" in found.weights:
        agree(saved, said, key, len(found.weights["head.weight"]))


def with_zero_biases(found: Foreign) -> None:
    """A model without biases of queries and values (--disable_qkv_bias) computes as one whose biases are zero."""
    width = len(found.weights["patch_embedding.weight"])
    if not any(name.endswith(("q_bias", "v_bias")) for name in found.weights):
        layers = [name.removesuffix("qkv_weight") for name in found.weights if name.endswith("attention.qkv_weight")]
        found.weights |= {f"{layer}{bias}": torch.zeros(width) for layer in layers for bias in ("q_bias", "v_bias")}
        found.notes.append("it has no biases of queries and values; they are zero here, which computes the same")
