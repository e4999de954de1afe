"""Where DeepSpeed keeps each parameter: in a running engine, and in the files of its checkpoints.

Of every parameter this process, or one file, holds a piece: part of its float32 master and of Adam's two moments.
With pieces of both sides a checkpoint of any ZeRO stage and number of processes goes into an engine of any other, and
weights come out one tensor at a time. DeepSpeed's own universal checkpoint does not serve: under ZeRO-3 it gives every
parameter group the first one's settings and one step counter, and it takes 1, 2 and 3 for different things.

Knows the insides of DeepSpeed 0.19, held by tests/pipeline/checkpoints/test_elastic.py. Must not know model, shards or
any stage.
"""

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beitforge.pipeline.distributed.collectives import all_max
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from beitforge.pipeline.errors import ConfigError

VALUES = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Numbers start … start + length of a flattened parameter. values: views of VALUES, each 1-D of that length."""

    start: int
    values: dict[str, Tensor]

    @property
    def end(self) -> int:
        return self.start + self.values["fp32"].numel()


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's parameters: their shapes, their pieces in its (memory-mapped) files, and Adam's step counter."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[Piece]]
    step: float

    @torch.no_grad()
    def fill(self, name: str, target: Piece) -> None:
        """Copy what the target wants of a parameter. Raises ConfigError when the files do not hold all of it."""
        filled = 0
        for piece in self.pieces.get(name, []):
            first, last = max(piece.start, target.start), min(piece.end, target.end)
            if first >= last:
                continue
            for value, into in target.values.items():
                if value not in piece.values:
                    raise ConfigError(f"{self.folder} holds weights but not what the optimizer knows of {name}")
                found = piece.values[value][first - piece.start : last - piece.start]
                into[first - target.start : last - target.start].copy_(found)
            filled += last - first
        if filled != target.end - target.start:
            wanted = target.end - target.start
            raise ConfigError(f"{self.folder} is damaged: it holds {filled} of {wanted} numbers of {name}; remove it")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """float32 weights, one after the other; only one of them is in memory."""
        for name, shape in self.shapes.items():
            whole = torch.empty(math.prod(shape))
            self.fill(name, Piece(0, {"fp32": whole}))
            yield name, whole.view(shape)


def open_checkpoint(folder: Path, stage: int, groups: list[list[str]]) -> CheckpointFiles:
    """The parameters of a checkpoint folder. groups: names in the order of the optimizer's groups (state.json).

    Raises ConfigError when a file of it cannot be read.
    """
    try:
        if stage == 0:
            return _saved_whole(folder, groups)
        return _saved_flat(folder) if stage < 3 else _saved_partitioned(folder)
    except (RuntimeError, EOFError, KeyError, IndexError, pickle.UnpicklingError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder} is damaged ({reason}); remove it to fall back to the one before") from error


def _load(path: Path) -> dict:
    """A file DeepSpeed wrote, its tensors left on disk until they are read."""
    quiet_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _saved_whole(folder: Path, groups: list[list[str]]) -> CheckpointFiles:
    """ZeRO-0: one file with everything; masters apart from the weights unless these are float32 themselves."""
    content = _load(folder / "mp_rank_00_model_states.pt")
    module, optimizer = content["module"], content.get("optimizer")
    shapes = {name: tuple(tensor.shape) for name, tensor in module.items()}
    masters = dict(module)
    if optimizer is None or not groups:  # weights alone: a checkpoint of before the groups' names were saved
        alone = {name: [Piece(0, {"fp32": tensor.reshape(-1)})] for name, tensor in module.items()}
        return CheckpointFiles(folder, shapes, alone, 0.0)
    if "fp32_groups" in optimizer:
        for names, tensors in zip(groups, optimizer["fp32_groups"], strict=True):
            masters.update(zip(names, tensors, strict=True))
        optimizer = optimizer["optimizer_state_dict"]
    order = [name for names in groups for name in names]
    pieces = {}
    for number, name in enumerate(order):
        moments = optimizer["state"][number]
        values = {"fp32": masters[name], "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
        pieces[name] = [Piece(0, {key: tensor.reshape(-1) for key, tensor in values.items()})]
    return CheckpointFiles(folder, shapes, pieces, float(optimizer["state"][0]["step"]))


def _rank_files(folder: Path) -> list[dict]:
    """The optimizer files of all ranks, in rank order."""
    found = {
        int(path.name.partition("pp_rank_")[2].partition("_")[0]): path for path in folder.glob("*_optim_states.pt")
    }
    if not found or sorted(found) != list(range(len(found))):
        raise FileNotFoundError(f"optimizer files of ranks {sorted(found)}")
    return [_load(found[rank])["optimizer_state_dict"] for rank in sorted(found)]


def _in_order(shapes: dict[str, tuple[int, ...]], groups: list[dict]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in the module's order, which DeepSpeed's groups do not have."""
    wanted = {name: tuple(shape) for group in groups for name, shape in group.items()}
    return {name: wanted[name] for name in shapes if name in wanted}


def _saved_flat(folder: Path) -> CheckpointFiles:
    """ZeRO-1 and 2: a group's parameters lie end to end, rank r holds the r-th of equal shares. The master's ends with
    the last parameter, the moments' with the padding."""
    content = _load(folder / "mp_rank_00_model_states.pt")
    ranks = _rank_files(folder)
    pieces: dict[str, list[Piece]] = {}
    for group, shapes in enumerate(content["param_shapes"]):
        moments = [rank["base_optimizer_state"]["state"][group] for rank in ranks]
        masters = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        share, offset = moments[0]["exp_avg"].numel(), 0
        for (name, shape), padding in zip(shapes.items(), ranks[0]["param_alignment_paddings"][group], strict=True):
            end, pieces[name] = offset + math.prod(shape), []
            for rank in range(offset // share, min(len(ranks), -(-end // share))):
                first, last = max(offset, rank * share), min(end, (rank + 1) * share)
                here = slice(first - rank * share, last - rank * share)
                values = {"fp32": masters[rank][here], **{key: moments[rank][key][here] for key in VALUES[1:]}}
                pieces[name].append(Piece(first - offset, values))
            offset = end + padding
    step = float(ranks[0]["base_optimizer_state"]["state"][0]["step"])
    return CheckpointFiles(folder, _in_order(content["module"], content["param_shapes"]), pieces, step)


def _saved_partitioned(folder: Path) -> CheckpointFiles:
    """ZeRO-3: every parameter is cut into equal shares, rank r holds the r-th of each, one after the other, in one or
    more flat tensors that end between two parameters."""
    content = _load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    ranks = _rank_files(folder)
    pieces: dict[str, list[Piece]] = {}
    flat, offset = 0, 0
    for name, shape in (item for group in content["param_shapes"] for item in group.items()):
        if offset == ranks[0]["fp32_flat_groups"][flat].numel():
            flat, offset = flat + 1, 0
        numbers = math.prod(shape)
        share, pieces[name] = -(-numbers // len(ranks)), []
        for rank, file in enumerate(ranks):
            length = min(share, numbers - rank * share)
            if length > 0:
                here, moments = slice(offset, offset + length), file["optimizer_state_dict"]["state"][flat]
                values = {"fp32": file["fp32_flat_groups"][flat][here]}
                values |= {key: moments[key][here] for key in VALUES[1:]}
                pieces[name].append(Piece(rank * share, values))
        offset += share
    step = float(ranks[0]["optimizer_state_dict"]["state"][0]["step"])
    return CheckpointFiles(folder, _in_order(content["module"], content["param_shapes"]), pieces, step)


def load_into(engine: Engine, source: CheckpointFiles) -> None:
    """Give the engine the weights, moments and step counter of a checkpoint that another shape of run saved.

    Every rank calls it. Settings of the parameter groups stay the engine's. Raises ConfigError when the parameters are
    not the engine's.
    """
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    if shapes != source.shapes:
        apart = sorted(shapes.keys() ^ source.shapes.keys()) or [n for n in shapes if shapes[n] != source.shapes[n]]
        raise ConfigError(f"{source.folder} holds another model: it differs in {', '.join(apart[:3])}")
    for name, piece in engine_pieces(engine, source.step):
        source.fill(name, piece)
    _refresh(engine)


def engine_pieces(engine: Engine, step: float | None = None) -> list[tuple[str, Piece]]:
    """This rank's pieces, as views into the running optimizer. step: set its counters to this, making the moments of an
    optimizer that has not stepped yet."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.setup.zero_stage
    if stage == 0:
        return _live_whole(engine, names, step)
    return _live_flat(engine, names, step) if stage < 3 else _live_partitioned(engine, names, step)


def finite(engine: Engine) -> bool:
    """Whether every master weight of every rank is a finite number."""
    broken = any(not bool(torch.isfinite(piece.values["fp32"]).all()) for _, piece in engine_pieces(engine))
    return not all_max([float(broken)], engine.world)[0]


def _moments(optimizer: Any, master: Tensor, step: float | None) -> dict[str, Tensor]:
    """Master and moments of one of the inner optimizer's tensors, each flat. Before its first step, which in fp16 the
    search for a loss scale puts off, they are what it would begin with."""
    state = optimizer.state[master]
    if step is None and not all(key in state for key in VALUES[1:]):
        step = 0.0
    if step is not None:
        group = optimizer.param_groups[0]  # alike in how they are computed; under ZeRO-3 they list no tensors
        device = master.device if group.get("fused") or group.get("capturable") else "cpu"
        state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
        for key in VALUES[1:]:
            state.setdefault(key, torch.zeros_like(master, memory_format=torch.preserve_format))
    return {"fp32": master.detach().view(-1), **{key: state[key].view(-1) for key in VALUES[1:]}}


def _live_whole(engine: Engine, names: dict[int, str], step: float | None) -> list[tuple[str, Piece]]:
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = [pair for group in pairs for pair in zip(*group, strict=True)]
        optimizer = optimizer.optimizer
    else:
        masters = [(parameter, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    return [(names[id(p)], Piece(0, _moments(optimizer, master, step))) for p, master in masters]


def _live_flat(engine: Engine, names: dict[int, str], step: float | None) -> list[tuple[str, Piece]]:
    optimizer, found = engine.optimizer, []
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        whole = _moments(optimizer.optimizer, flat, step)
        for parameter in group:
            if parameter._hp_mapping is None:
                continue  # no part of it is this rank's
            here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            part = slice(there.start, there.start + there.numel)
            found.append((names[id(parameter)], Piece(here.start, {key: v[part] for key, v in whole.items()})))
    return found


def _live_partitioned(engine: Engine, names: dict[int, str], step: float | None) -> list[tuple[str, Piece]]:
    optimizer, found = engine.optimizer, []
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        whole, offset = _moments(optimizer.optimizer, flat, step), 0
        for parameter in group:
            share = parameter.partition_numel()
            length = min(share, parameter.ds_numel - engine.world.rank * share)
            if length > 0:
                values = {key: value[offset : offset + length] for key, value in whole.items()}
                found.append((names[id(parameter)], Piece(engine.world.rank * share, values)))
            offset += share
    return found


@torch.no_grad()
def _refresh(engine: Engine) -> None:
    """The model's weights from the masters."""
    optimizer, stage = engine.optimizer, engine.setup.zero_stage
    if stage == 0:
        for group, masters in zip(
            getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
        ):
            for parameter, master in zip(group, masters, strict=True):
                parameter.copy_(master)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        optimizer.checkpoint_event_prologue()
        for master, flat, group in zip(
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups,
            strict=True,
        ):
            flat.copy_(master)
            for part, values in zip(group, optimizer.unflatten(flat, group), strict=True):
                part.data = values.data
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
