"""Folders that `transformers`, timm and the released code read, and what those libraries then compute.

The peers are imported inside the functions: only who exports to one needs it. Must not know shards, deepspeed or any
stage.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.blocks import RelativeBias
from beitforge.pipeline.weights.conversion import to_hf, to_unilm
from beitforge.pipeline.weights.peers import (
    TIMM_POOLS,
    Forward,
    all_loaded,
    library,
    model_class,
    patches_alone,
    timm_arguments,
)

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
UNILM_FILE = "beit.pth"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class ClassifierHead:
    """Of a classifier: how many classes, 0 for none; what they are called, where that is known; the central view it was
    tested on, its side as a share of the image's shorter side; and what the head sees (finetune.pooling)."""

    classes: int = 0
    names: tuple[str, ...] = ()
    test_crop: float = 1.0
    pooling: str = "mean"


def write_hf(
    folder: Path, weights: Weights, model: Model, vocabulary: int, head: ClassifierHead = ClassifierHead()
) -> None:
    """A folder for from_pretrained: BeitForMaskedImageModeling, or with vocabulary 0 BeitForImageClassification with
    this head.

    Every field whose default differs from BEiT's own is written. Raises ConfigError for what the peer cannot do.
    """
    height, width = model.input_size
    if height != width:
        raise ConfigError(
            f"model.input_size is {model.input_size}; transformers' BEiT interpolates bias and positions of images "
            f"that are not square as if they were: export --to timm, or train on square views"
        )
    renamed = to_hf(weights, model)
    if not vocabulary:
        norm = "beit.pooler.layernorm." if head.pooling == "mean" else "beit.layernorm."
        pairs = {"layernorm": norm, "lm_head": "classifier."}
        cut = {name: name.partition(".") for name in renamed}
        renamed = {pairs.get(cut[n][0], f"{cut[n][0]}.") + cut[n][2]: w for n, w in renamed.items()}
    _write(folder, renamed, hf_config(model, vocabulary, head))
    preprocessor = _preprocessor(model, head.test_crop)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n", encoding="utf-8")


def hf_config(model: Model, vocabulary: int, head: ClassifierHead = ClassifierHead()) -> dict:
    """transformers' config.json of a pretraining, or with vocabulary 0 of a classifier with this head."""
    height, _ = model.input_size
    config = {
        "architectures": ["BeitForMaskedImageModeling" if vocabulary else "BeitForImageClassification"],
        "model_type": "beit",
        "vocab_size": vocabulary or 8192,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": height,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "use_mask_token": bool(vocabulary),
        "use_absolute_position_embeddings": model.positions == "absolute",
        "use_relative_position_bias": model.positions == "relative",
        "use_shared_relative_position_bias": model.positions == "relative_shared",
        "layer_scale_init_value": model.layer_scale_init if model.layer_scale else 0.0,
        "drop_path_rate": model.drop_path,
        # false would put a second LayerNorm under the pretraining head
        "use_mean_pooling": bool(vocabulary) or head.pooling == "mean",
        "num_labels": head.classes,
    }
    if vocabulary:
        del config["num_labels"]
    if head.names:
        config["id2label"] = dict(enumerate(head.names))
        config["label2id"] = {name: label for label, name in enumerate(head.names)}
    return config


def _preprocessor(model: Model, share: float) -> dict:
    """transformers' words for normalising an image, the whole of it or the central square of so large a share of its
    shorter side."""
    height, width = model.input_size
    whole = {"height": height, "width": width}
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": whole if share == 1.0 else {"shortest_edge": round(height / share)},
        "resample": 3,
        "do_center_crop": share != 1.0,
        "crop_size": whole,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }


def hf_forward(folder: Path) -> Forward:
    """What transformers computes from a folder of write_hf: logits of every patch, or a classifier's logits
    [B, classes], without a head its features [B, D]."""
    pretraining = "MaskedImageModeling" in json.loads((folder / _CONFIG).read_text())["architectures"][0]
    name = "BeitForMaskedImageModeling" if pretraining else "BeitForImageClassification"
    kind = model_class(name, "--to hf is checked by")
    peer, found = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    all_loaded("transformers", found["missing_keys"], found["unexpected_keys"])
    peer = peer.eval()

    def forward(pixels_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        return peer(pixels_BCHW, bool_masked_pos=mask_BN).logits if pretraining else peer(pixels_BCHW).logits

    return forward


def write_timm(
    folder: Path, weights: Weights, model: Model, vocabulary: int, head: ClassifierHead = ClassifierHead()
) -> None:
    """A folder for timm.create_model("local-dir:FOLDER", pretrained=True): logits of every position over the
    vocabulary, or with vocabulary 0 a classifier's of this head, without classes its pooled features. timm has no mask
    embedding.
    """
    outputs = vocabulary or head.classes
    pool = "" if vocabulary else TIMM_POOLS[head.pooling]
    arguments = {**timm_arguments(model), "num_classes": outputs, "global_pool": pool}
    described = {
        "num_classes": outputs,
        "input_size": [3, *model.input_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": head.test_crop,
        "mean": list(model.mean),
        "std": list(model.std),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {"architecture": "beit_base_patch16_224", "num_classes": outputs, "num_features": model.width}
    names = {"label_names": list(head.names)} if head.names else {}
    _write(
        folder,
        timm_weights(weights, model, vocabulary, head.pooling),
        {**config, **names, "model_args": arguments, "pretrained_cfg": described},
    )


def timm_weights(weights: Weights, model: Model, vocabulary: int, pooling: str = "mean") -> Weights:
    """The released code's names with timm's for head and pooled norm, and without the mask embedding."""
    renamed = {name.replace("lm_head.", "head."): w for name, w in to_unilm(weights, model).items()}
    renamed.pop("mask_token", None)
    if not vocabulary and pooling == "mean":
        renamed = {f"fc_{name}" if name.startswith("norm.") else name: w for name, w in renamed.items()}
    return renamed


def timm_forward(folder: Path) -> Forward:
    """What timm computes from a folder of write_timm: logits of every patch, or features [B, D]."""
    timm = library("timm", "--to timm is checked by")
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return patches_alone(peer)


def write_unilm(
    folder: Path, weights: Weights, model: Model, vocabulary: int, head: ClassifierHead = ClassifierHead()
) -> None:
    """FOLDER/beit.pth as the released code saves and loads it, strictly: {"model": tensors}, index buffers among them;
    its pretraining model's, or with vocabulary 0 its fine-tuning model's with this head. The one place that writes a
    pickle, since that code reads nothing else; it holds tensors, names and
    numbers only."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = to_unilm(weights, model) if vocabulary else timm_weights(weights, model, 0, head.pooling)
    said = {name: getattr(model, name) for name in ("heads", "drop_path", "layer_scale_init")}
    said |= {name: list(getattr(model, name)) for name in ("input_size", "mean", "std")}
    # no code of theirs reads this; `import` need not assume it
    ours = {"model": said, "classifier": {"names": list(head.names), "test_crop": head.test_crop}}
    saved = {"model": renamed | _index_buffers(renamed, model), "beitforge": ours}
    torch.save(saved, folder / UNILM_FILE)


def _index_buffers(weights: Weights, model: Model) -> Weights:
    """What the released code keeps beside each bias table: the table's row for each pair of positions."""
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    names = [name.replace("bias_table", "index") for name in tables]
    return {name: RelativeBias(model.grid, model.heads).index_SS for name in names}


def unilm_forward(folder: Path, model: Model, vocabulary: int, head: ClassifierHead = ClassifierHead()) -> Forward:
    """What timm's model, which is the released one under the same names, computes from write_unilm's file: as
    timm_forward. Raises ConfigError unless every weight and index buffer is its own, too."""
    timm_beit = library("timm.models.beit", "--to unilm is checked by")
    weights = torch.load(folder / UNILM_FILE, weights_only=True)["model"]
    weights = {name.replace("lm_head.", "head."): w for name, w in weights.items() if name != "mask_token"}
    outputs, pool = (vocabulary, "") if vocabulary else (head.classes, TIMM_POOLS[head.pooling])
    peer = timm_beit.Beit(**timm_arguments(model), num_classes=outputs, global_pool=pool)
    named = dict(peer.named_buffers())  # not saved by timm, saved by the released code
    buffers = {name: w for name, w in named.items() if name.endswith("relative_position_index")}
    unequal = [name for name, w in buffers.items() if name not in weights or not torch.equal(w, weights[name])]
    found = peer.load_state_dict({name: w for name, w in weights.items() if name not in buffers}, strict=False)
    all_loaded("timm", [*found.missing_keys, *unequal], found.unexpected_keys)
    return patches_alone(peer.eval())


def _write(folder: Path, weights: Weights, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # save_file would leave the file to its owner alone, whatever the umask
    (folder / _WEIGHTS).write_bytes(save({name: w.contiguous() for name, w in weights.items()}, {"format": "pt"}))
    (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
