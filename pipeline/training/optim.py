"""Parameter groups of AdamW and of Muon, and the learning rate of every step (docs/recipe.md, "Optimiser", "Muon").

A group whose weight decay may follow a schedule says by what it divides the schedule's value (`decay_divisor`).
"""

import math

from torch import nn

from beitforge.pipeline.config.settings import Optimizer

# Vectors and biases by rank; these two by name, being three-dimensional.
_NO_DECAY = ("position_embedding", "cls_embedding")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to 1-D parameters, position and cls embeddings; yes to the mask embedding and
    the relative table, as the released code has it."""
    return parameter.dim() > 1 and not name.endswith(_NO_DECAY)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is Muon's where that is chosen: the matrices of the blocks, not their bias tables."""
    return name.startswith("blocks.") and parameter.dim() == 2 and not name.endswith("table")


def pretraining_groups(module: nn.Module, optimizer: Optimizer) -> list[dict]:
    """The groups of the optimizer that the settings choose."""
    if optimizer.kind == "muon":
        return muon_groups(module, optimizer.weight_decay, optimizer.muon_momentum)
    return parameter_groups(module, optimizer.weight_decay)


def muon_groups(module: nn.Module, weight_decay: float, momentum: float) -> list[dict]:
    """Groups for DeepSpeed's Muon: matrices by their number of inputs, then AdamW's two for all the rest.

    DeepSpeed makes a matrix [rows, columns] orthogonal and multiplies it by √max(1, rows / columns); times
    0.2 √columns (`lr_scale`) that is 0.2 √max(rows, columns), whose root mean square is that of AdamW's updates, so
    that rate and weight decay mean the same for both (Moonlight, arXiv 2502.16982, section 2.2; torch.optim.Muon's
    match_rms_adamw). The decay is divided by what the rate is multiplied with.
    """
    named = list(module.named_parameters())
    inputs: dict[int, list[nn.Parameter]] = {}
    for _, parameter in (each for each in named if is_matrix(*each)):
        inputs.setdefault(parameter.shape[1], []).append(parameter)
    groups: list[dict] = []
    for columns in sorted(inputs):
        scale = 0.2 * math.sqrt(columns)
        ordered = sorted(inputs[columns], key=lambda p: p.shape, reverse=True)  # the order that DeepSpeed would make
        own = {"use_muon": True, "momentum": momentum, "lr_scale": scale, "weight_decay": weight_decay / scale}
        groups.append({"params": ordered, **own, "decay_divisor": scale})
    rest = [(name, parameter) for name, parameter in named if not is_matrix(name, parameter)]
    return groups + [{**group, "use_muon": False} for group in _by_decay(rest, weight_decay)]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: with and without weight decay."""
    return _by_decay(list(module.named_parameters()), weight_decay)


def _by_decay(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    return [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay, "decay_divisor": 1.0},
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
        group |= {} if place[1] else {"decay_divisor": 1.0}
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
    return cosine(step - warmup, start=peak, end=end, steps=steps - warmup)


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` behind the last of `steps`; the same number throughout where both
    are equal. What the released code's schedules are made of (unilm, beit/utils.py, cosine_scheduler)."""
    progress = step / max(1, steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(1.0, progress)))
