"""Where a running DeepSpeed engine keeps each parameter, as pieces (zero_layout.py), and how a checkpoint gets there.

Knows the insides of DeepSpeed 0.19, held by tests/pipeline/checkpoints/test_elastic.py. Must not know model, shards or
any stage.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from beitforge.pipeline.checkpoints.zero_layout import MUON, CheckpointFiles, Piece, own
from beitforge.pipeline.distributed.collectives import all_max
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.nvme_offload import in_memory
from beitforge.pipeline.distributed.startup import run_on_all_ranks
from beitforge.pipeline.distributed.weight_average import begin_moments
from beitforge.pipeline.errors import ConfigError


def load_into(engine: Engine, source: CheckpointFiles) -> None:
    """Give the engine the weights, moments, step counter and loss scale of a checkpoint of any shape.

    Every rank calls it. Settings of the parameter groups stay the engine's. Raises ConfigError when the parameters are
    not the engine's.
    """
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    if shapes != source.shapes:
        apart = sorted(shapes.keys() ^ source.shapes.keys()) or [n for n in shapes if shapes[n] != source.shapes[n]]
        raise ConfigError(f"{source.folder} holds another model: it differs in {', '.join(apart[:3])}")
    with in_memory(engine.optimizer):
        pieces = engine_pieces(engine, source.step)
        run_on_all_ranks(lambda: [source.fill(name, piece) for name, piece in pieces], engine.world)
        pieces.clear()  # of views
        _refresh(engine)
    _restore_scale(engine, source.scale)
    for name, count in source.counters.items():
        setattr(engine.deepspeed, name, count)


def _restore_scale(engine: Engine, saved: dict[str, float]) -> None:
    """fp16's loss scale goes on where it stood, if one is searched for; else only the count of steps does."""
    keeps = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    searched = engine.scales_loss and getattr(keeps, "last_overflow_iter", None) is not None
    for name, value in saved.items():
        if hasattr(keeps, name) and (searched or name == "cur_iter"):
            setattr(keeps, name, type(getattr(keeps, name))(value))


def engine_pieces(engine: Engine, step: float | None = None) -> list[tuple[str, Piece]]:
    """This rank's pieces, as views into the running optimizer; inside of `in_memory` where that is on NVMe. step: set
    its counters to this, making the moments of an optimizer that has not stepped yet."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.setup.zero_stage
    if stage == 0:
        return _live_whole(engine, names, step)
    return _live_flat(engine, names, step) if stage < 3 else _live_partitioned(engine, names, step)


@contextlib.contextmanager
def averaged(engine: Engine) -> Iterator[None]:
    """The model with the moving average for weights; every rank calls it. Behind the block all is as it was, to the
    bit."""
    assert engine.average is not None, "an average is kept"
    engine.average.swap()
    _refresh(engine)
    yield
    engine.average.swap()
    _refresh(engine)


def finite(engine: Engine) -> bool:
    """Whether every master weight of every rank is a finite number."""
    masters = [piece.values["fp32"] for _, piece in engine_pieces(engine) if "fp32" in piece.values]
    broken = any(not bool(torch.isfinite(master).all()) for master in masters)
    return not all_max([float(broken)], engine.world)[0]


def _moments(optimizer: Any, group: dict, master: Tensor, step: float | None) -> dict[str, Tensor]:
    """Master and moments of one of the inner optimizer's tensors, each flat. Before its first step, which in fp16 the
    search for a loss scale puts off, they are what it would begin with. group: its settings."""
    state, muon = optimizer.state[master], group.get("use_muon", False)
    if step is None and not own(state):
        step = 0.0
    if step is not None and muon:
        state.setdefault(*MUON, torch.zeros_like(master, memory_format=torch.preserve_format))
    elif step is not None:
        begin_moments(state, group, master, step)
    return {"fp32": master.detach().view(-1), **{key: value.view(-1) for key, value in own(state).items()}}


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
        state.setdefault(*MUON, flat.new_zeros(sum(parameter.numel() for parameter in here)))
    for parameter in here:
        end = start + parameter.numel()
        found.append((names[id(parameter)], Piece(0, {key: value[start:end] for key, value in own(state).items()})))
        start = end
    return found


def _live_partitioned(engine: Engine, names: dict[int, str], step: float | None) -> list[tuple[str, Piece]]:
    found = []
    for parameter, start, length, share in _shares(engine, step):
        if length > 0:
            found.append((names[id(parameter)], Piece(start, {key: value[:length] for key, value in share.items()})))
    return found


@torch.no_grad()
def clear_padding(engine: Engine) -> None:
    """Zero what is behind the numbers of this rank's shares, which ZeRO-3 never sets: what is saved is then the same
    whenever the state is."""
    if engine.setup.zero_stage == 3:
        for _, _, length, share in _shares(engine, None):
            for value in share.values():
                value[max(0, length) :].zero_()


def _shares(engine: Engine, step: float | None) -> Iterator[tuple[Any, int, int, dict[str, Tensor]]]:
    """Under ZeRO-3, of each parameter: where this rank's share begins, how many numbers of it there are, and the share
    with its padding."""
    optimizer = engine.optimizer
    inner = optimizer.optimizer
    for number, (group, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        settings = inner.param_groups[optimizer.sub_group_to_group_id[number]]
        whole, offset = _moments(inner, settings, flat, step), 0
        for parameter in group:
            share = parameter.partition_numel()
            start = engine.world.rank * share
            here = {key: value[offset : offset + share] for key, value in whole.items()}
            yield parameter, start, min(share, parameter.ds_numel - start), here
            offset += share


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
        # nor gathered here, but in the forward pass, as at a run's beginning: selective checkpointing in torch refuses
        # a backward pass that gathers what its forward pass found there
        optimizer.invalidate_secondary_tensor()
        if engine.world.device.type == "cuda":  # the stream that gathers then does not wait for these copies
            torch.cuda.synchronize(engine.world.device)
