"""The same encoder for another input: tables and positions on another grid, one shared table in every layer.

As the released fine-tuning code does it (unilm, beit/run_class_finetuning.py). Must not know shards, deepspeed or any
stage.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model

Grid = tuple[int, int]
Weights = dict[str, Tensor]

_SPECIAL = 3  # rows of a bias table that are not about two patches


def for_finetuning(weights: Weights, model: Model, size: Size, pooling: str = "mean") -> tuple[Weights, Model]:
    """Weights of model.Classifier without a head, and its shape, for images of `size`.

    A shared table becomes every layer's own. The pretraining head and the mask embedding are left out. The norm behind
    a mean over patches starts anew; that of the cls token, which pretraining's is, goes on.
    """
    target = finetuned_model(model, size)
    resized = fit_grid(weights, model, target)
    shared = resized.pop("shared_bias.table", None)
    left_out = ("head.", "mask_embedding") if pooling == "cls" else ("head.", "norm.", "mask_embedding")
    kept = {name: tensor for name, tensor in resized.items() if not name.startswith(left_out)}
    if shared is not None:
        kept |= {f"blocks.{layer}.attention.own_bias.table": shared.clone() for layer in range(model.layers)}
    if pooling != "cls":
        kept |= {"norm.weight": torch.ones(model.width), "norm.bias": torch.zeros(model.width)}
    return kept, target


def finetuned_model(model: Model, size: Size) -> Model:
    """The shape of the classifier that fine-tuning makes of an encoder: a bias table per layer, images of `size`."""
    positions = "relative" if model.positions == "relative_shared" else model.positions
    return dataclasses.replace(model, input_size=size, positions=positions)


def fit_grid(weights: Weights, model: Model, target: Model) -> Weights:
    """The weights with bias tables and positions interpolated from model.grid to target.grid; others are untouched."""
    if model.grid == target.grid:
        return dict(weights)
    fitted = dict(weights)
    for name, tensor in weights.items():
        if name.endswith("bias.table"):
            fitted[name] = resize_table(tensor, model.grid, target.grid)
        elif name == "position_embedding":
            fitted[name] = resize_positions(tensor, model.grid, target.grid)
    return fitted


def resize_table(table_RA: Tensor, old: Grid, new: Grid) -> Tensor:
    """A relative-position table of another window: cubic splines over distances that grow geometrically.

    The old distances 0, 1, 2, … are laid at 0, 1, 1 + q, 1 + q + q², … with q such that the outermost meet the new
    window's: near neighbours keep their bias, far ones are stretched. The rows of [S] are kept.
    """
    from scipy.interpolate import RectBivariateSpline

    old_sides, new_sides = (tuple(2 * side - 1 for side in grid) for grid in (old, new))
    places = [_places(a, b) for a, b in zip(old_sides, new_sides, strict=True)]
    wanted = [[float(i - side // 2) for i in range(side)] for side in new_sides]
    degrees = [min(3, side - 1) for side in old_sides]
    columns = []
    for head in table_RA[:-_SPECIAL].double().T:
        spline = RectBivariateSpline(*places, head.view(old_sides).numpy(), kx=degrees[0], ky=degrees[1])
        columns.append(torch.from_numpy(spline(*wanted)).flatten())
    resized = torch.stack(columns, dim=1).to(table_RA.dtype)
    return torch.cat([resized, table_RA[-_SPECIAL:]])


def _places(old: int, new: int) -> list[float]:
    """Where the `old` offsets of a side, -(old // 2) … old // 2, lie on the scale of the `new` ones.

    A side that stays as it is keeps its places; the released code resizes squares alone.
    """
    if old == new:
        return [float(i - old // 2) for i in range(old)]
    low, high = 1.01, 1.5  # the released code's bounds of q
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (old // 2)) / (1 - q) > new // 2:
            high = q
        else:
            low = q
    right, place = [], 1.0
    for i in range(old // 2):
        right.append(place)
        place += q ** (i + 1)
    return [-x for x in reversed(right)] + [0.0] + right


def resize_positions(embedding_1SD: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position embeddings [1, S, D] of another grid: bicubic, [S] kept."""
    cls, patches = embedding_1SD[:, :1], embedding_1SD[:, 1:]
    square = patches.view(1, *old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
