"""AdamW's parameter groups and the learning rate of every step (docs/recipe.md, "Optimiser")."""

import math

from torch import nn

# Vectors and biases by rank; these two by name, being three-dimensional.
_NO_DECAY = ("position_embedding", "cls_embedding")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to 1-D parameters, position and cls embeddings; yes to the mask embedding and
    the relative table, as the released code has it."""
    return parameter.dim() > 1 and not name.endswith(_NO_DECAY)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: with and without weight decay."""
    named = list(module.named_parameters())
    return [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]


def layer_groups(module: nn.Module, layers: int, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups for AdamW in which a layer learns at `layer_decay` times the rate of the one above it (`lr_scale`), with
    and without weight decay; as the released code (unilm, beit/optim_factory.py, LayerDecayValueAssigner)."""
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        place = _layer(name, layers), not decays(name, parameter)
        scale = layer_decay ** (layers + 1 - place[0])
        group = {"params": [], "weight_decay": 0.0 if place[1] else weight_decay, "lr_scale": scale}
        groups.setdefault(place, group)["params"].append(parameter)
    return [groups[place] for place in sorted(groups)]


def _layer(name: str, layers: int) -> int:
    """0 for the embeddings, l for block l from 1, layers + 1 for the norm behind the pooling and the head."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return layers + 1 if name.startswith(("norm.", "head.")) else 0


def learning_rate(step: int, *, peak: float, end: float, warmup: int, steps: int) -> float:
    """Rate of step 0 … steps - 1: linear from 0 over `warmup` steps, then a cosine from `peak` to `end`."""
    if step < warmup:
        return peak * step / max(1, warmup - 1) if warmup > 1 else peak
    progress = (step - warmup) / max(1, steps - warmup)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(1.0, progress)))
