"""Checkpoints as the libraries and the released code write them, small and with random weights."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beitforge.pipeline.stages import import_encoder

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
from timm.models.beit import Beit as TimmBeit  # noqa: E402

SIZE, PATCH, WIDTH, LAYERS, HEADS, TOKENS, CLASSES = 32, 8, 32, 2, 4, 64, 5
IMAGENET = (0.485, 0.456, 0.406)
HF = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 96,
    "image_size": SIZE, "patch_size": PATCH, "vocab_size": TOKENS, "use_mask_token": True,
    "use_shared_relative_position_bias": True,
}  # fmt: skip
OWN = {"use_shared_relative_position_bias": False, "use_relative_position_bias": True}
ABSOLUTE = {"use_shared_relative_position_bias": False, "use_absolute_position_embeddings": True}


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter away from its first value, norms among them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def hf(folder: Path, kind: str, preprocessor: dict | None = None, **settings) -> nn.Module:
    """A folder as transformers saves it."""
    family = "Data2VecVision" if kind.startswith("Data2Vec") else "Beit"
    config = getattr(transformers, f"{family}Config")(**{**HF, "num_labels": CLASSES, **settings})
    model = randomised(getattr(transformers, kind)(config))
    model.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


def changed(folder: Path, **fields) -> Path:
    """The folder with other words in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def as_pickle(folder: Path) -> Path:
    """The same weights as transformers wrote them before safetensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def as_in_memory(folder: Path) -> Path:
    """torch.save(model.state_dict()) has the names of the modules, which transformers 5 saves under others."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.BeitForMaskedImageModeling.from_pretrained(folder, config=config)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder


def in_shards(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(weights), {}
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[part::3]}, folder / file)
        where |= dict.fromkeys(names[part::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def released(pretraining: bool, pool: str = "avg", **settings) -> tuple[TimmBeit, dict[str, Tensor]]:
    """timm's BEiT and its weights under the released code's names, index buffers among them."""
    shape = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    shape |= {"mlp_ratio": 3, "use_abs_pos_emb": False, "init_values": 0.1}
    bias = "use_shared_rel_pos_bias" if pretraining else "use_rel_pos_bias"
    outputs = {"num_classes": TOKENS if pretraining else CLASSES, "global_pool": "" if pretraining else pool}
    model = randomised(TimmBeit(**{**shape, bias: True, **outputs, **settings}))
    weights = dict(model.state_dict())
    buffers = {name: b for name, b in model.named_buffers() if name.endswith("relative_position_index")}
    weights |= buffers
    if pretraining:
        weights = {name.replace("head.", "lm_head."): w for name, w in weights.items()}
        weights["mask_token"] = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(4))
    return model, weights


def imported(source: Path, folder: Path, *settings: str, encoder: bool = False) -> Path:
    assert import_encoder.run(source, folder, list(settings), encoder) == 0
    return folder


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < 1e-4 * theirs.abs().max())


ARGUMENTS = {
    "model": "beit_base_patch16_224_8k_vocab", "rel_pos_bias": True, "abs_pos_emb": False, "input_size": SIZE,
    "layer_scale_init_value": 0.1, "drop_path": 0.25, "num_mask_patches": 6, "min_mask_patches_per_block": 4,
    "imagenet_default_mean_and_std": True, "device": torch.device("cuda"), "opt_betas": [0.9, 0.98],
    "output_dir": Path("checkpoints"), "gpu": 0, "nb_classes": CLASSES, "crop_pct": None,
}  # fmt: skip


def pth(path: Path, weights: dict[str, Tensor], key: str = "model", **arguments) -> Path:
    """As the released code saves its training."""
    more = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 799, "scaler": {"scale": 65536.0}}
    more |= {"param_shapes": {"a": torch.Size([3])}, "csr_tensor_module_names": set()}  # DeepSpeed's
    torch.save({key: weights, **more, **({"args": argparse.Namespace(**arguments)} if arguments else {})}, path)
    return path


def saved_by_timm(folder: Path, model: TimmBeit, architecture: str = "beit_base_patch16_224", **fields) -> Path:
    """config.json and weights as on the hub."""
    folder.mkdir()
    arguments = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    arguments |= {"mlp_ratio": 3, "use_abs_pos_emb": False, "init_values": 0.1, "use_rel_pos_bias": True}
    said = {"mean": list(IMAGENET), "std": [0.2] * 3, "input_size": [3, SIZE, SIZE], "crop_pct": 0.95}
    content = {"architecture": architecture, "num_classes": CLASSES, "pretrained_cfg": said}
    content |= {"model_args": {**arguments, **fields}}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
