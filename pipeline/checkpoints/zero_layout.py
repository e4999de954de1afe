"""Where DeepSpeed keeps each parameter: in a running engine, and in the files of its checkpoints.

Of every parameter this process, or one file, holds pieces: part of its float32 master, and of Adam's two moments or
of Muon's momentum.
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

_ADAM, _MUON = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)


@dataclass(frozen=True)
class Piece:
    """Numbers start … start + length of a flattened parameter. values: `fp32` and what the optimizer keeps, views that
    are 1-D of that length."""

    start: int
    values: dict[str, Tensor]

    @property
    def end(self) -> int:
        return self.start + next(iter(self.values.values())).numel()


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
        there = self.pieces.get(name, [])
        for value, into in target.values.items():
            filled, holding = 0, [piece for piece in there if value in piece.values]
            if there and not holding:
                raise ConfigError(f"{self.folder} holds weights but not what the optimizer knows of {name}")
            for piece in holding:
                first, last = max(piece.start, target.start), min(piece.end, target.end)
                if first < last:
                    found = piece.values[value][first - piece.start : last - piece.start]
                    into[first - target.start : last - target.start].copy_(found)
                    filled += last - first
            wanted = target.end - target.start
            if filled != wanted:
                raise ConfigError(
                    f"{self.folder} is damaged: it holds {filled} of {wanted} numbers of {name}; remove it"
                )

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
        values = {"fp32": masters[name], **_own(optimizer["state"][number])}
        pieces[name] = [Piece(0, {key: tensor.reshape(-1) for key, tensor in values.items()})]
    return CheckpointFiles(folder, shapes, pieces, _step(optimizer["state"]))


def _own(state: dict[str, Any]) -> dict[str, Tensor]:
    """Of the state of one of the optimizer's tensors what it keeps of each number."""
    return {key: state[key] for key in (*_ADAM, *_MUON) if key in state}


def _step(states: dict[int, dict]) -> float:
    """The step counter, which all of AdamW's tensors share and Muon's have not."""
    return float(next(state["step"] for state in states.values() if "step" in state))


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
    the last parameter, the moments' with the padding. Muon's momentum is kept whole by every rank whose share the
    parameter reaches into."""
    content = _load(folder / "mp_rank_00_model_states.pt")
    ranks = _rank_files(folder)
    pieces: dict[str, list[Piece]] = {}
    for group, shapes in enumerate(content["param_shapes"]):
        own = [_own(rank["base_optimizer_state"]["state"].get(group, {})) for rank in ranks]
        masters = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        share, offset, behind = masters[0].numel(), 0, [0] * len(ranks)
        for (name, shape), padding in zip(shapes.items(), ranks[0]["param_alignment_paddings"][group], strict=True):
            numbers = math.prod(shape)
            end, pieces[name] = offset + numbers, []
            for rank in range(offset // share, min(len(ranks), -(-end // share))):
                first, last = max(offset, rank * share), min(end, (rank + 1) * share)
                here = slice(first - rank * share, last - rank * share)
                alike = {key: own[rank][key][here] for key in _ADAM if key in own[rank]}
                pieces[name].append(Piece(first - offset, {"fp32": masters[rank][here], **alike}))
                whole = {
                    key: own[rank][key][behind[rank] : behind[rank] + numbers] for key in _MUON if key in own[rank]
                }
                if whole and first == offset:
                    pieces[name].append(Piece(0, whole))
                behind[rank] += numbers
            offset = end + padding
    shapes = _in_order(content["module"], content["param_shapes"])
    return CheckpointFiles(folder, shapes, pieces, _step(ranks[0]["base_optimizer_state"]["state"]))


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
                here, own = slice(offset, offset + length), _own(file["optimizer_state_dict"]["state"][flat])
                values = {"fp32": file["fp32_flat_groups"][flat], **own}
                pieces[name].append(Piece(rank * share, {key: value[here] for key, value in values.items()}))
        offset += share
    shapes = _in_order(content["module"], content["param_shapes"])
    return CheckpointFiles(folder, shapes, pieces, _step(ranks[0]["optimizer_state_dict"]["state"]))


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
    masters = [piece.values["fp32"] for _, piece in engine_pieces(engine) if "fp32" in piece.values]
    broken = any(not bool(torch.isfinite(master).all()) for master in masters)
    return not all_max([float(broken)], engine.world)[0]


def _moments(optimizer: Any, group: dict, master: Tensor, step: float | None) -> dict[str, Tensor]:
    """Master and moments of one of the inner optimizer's tensors, each flat. Before its first step, which in fp16 the
    search for a loss scale puts off, they are what it would begin with. group: its settings."""
    state, muon = optimizer.state[master], group.get("use_muon", False)
    if step is None and not _own(state):
        step = 0.0
    if step is not None:
        device = master.device if group.get("fused") or group.get("capturable") else "cpu"
        if not muon:
            state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
        for key in _MUON if muon else _ADAM:
            state.setdefault(key, torch.zeros_like(master, memory_format=torch.preserve_format))
    return {"fp32": master.detach().view(-1), **{key: value.view(-1) for key, value in _own(state).items()}}


def _live_whole(engine: Engine, names: dict[int, str], step: float | None) -> list[tuple[str, Piece]]:
    optimizer, inner, found = engine.optimizer, getattr(engine.optimizer, "optimizer", engine.optimizer), []
    of_groups = [group["params"] for group in inner.param_groups]
    weights = getattr(optimizer, "fp16_groups", of_groups)
    for group, parameters, masters in zip(inner.param_groups, weights, of_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            found.append((names[id(parameter)], Piece(0, _moments(inner, group, master, step))))
    return found


def _live_flat(engine: Engine, names: dict[int, str], step: float | None) -> list[tuple[str, Piece]]:
    optimizer, found = engine.optimizer, []
    flats = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    for number, (group, flat) in enumerate(flats):
        settings = optimizer.optimizer.param_groups[number]
        if settings.get("use_muon", False):
            found += _whole_momenta(engine, names, number, step)
            whole = {"fp32": flat.detach()}
        else:
            whole = _moments(optimizer.optimizer, settings, flat, step)
        for parameter in group:
            if parameter._hp_mapping is None:
                continue  # no part of it is this rank's
            here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            part = slice(there.start, there.start + there.numel)
            found.append((names[id(parameter)], Piece(here.start, {key: v[part] for key, v in whole.items()})))
    return found


def _whole_momenta(engine: Engine, names: dict[int, str], number: int, step: float | None) -> list[tuple[str, Piece]]:
    """Muon's momentum under ZeRO-1 and 2, of a group: of every parameter that reaches into this rank's share."""
    optimizer, found, start = engine.optimizer, [], 0
    here = optimizer.params_in_partition[number]
    flat = optimizer.single_partition_of_fp32_groups[number]
    state = optimizer.optimizer.state[flat]
    if step is not None:
        state.setdefault(*_MUON, flat.new_zeros(sum(parameter.numel() for parameter in here)))
    for parameter in here:
        end = start + parameter.numel()
        found.append((names[id(parameter)], Piece(0, {key: value[start:end] for key, value in _own(state).items()})))
        start = end
    return found


def _live_partitioned(engine: Engine, names: dict[int, str], step: float | None) -> list[tuple[str, Piece]]:
    optimizer, found = engine.optimizer, []
    inner = optimizer.optimizer
    for number, (group, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        settings = inner.param_groups[optimizer.sub_group_to_group_id[number]]
        whole, offset = _moments(inner, settings, flat, step), 0
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
