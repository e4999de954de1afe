"""Where DeepSpeed keeps each parameter in the files of its checkpoints; live_layout.py: in a running engine.

Of every parameter a file, or a process, holds pieces: part of its float32 master, and of Adam's two moments or of
Muon's momentum, and of the moving average where one is kept. With pieces of both sides a checkpoint of any ZeRO stage
and number of processes goes into an engine of any, also of the same, and weights come out one tensor at a time.
DeepSpeed's own loader does not serve: it runs what a pickle says. Nor does its universal checkpoint: under ZeRO-3 it
gives every parameter group the first one's settings and one step counter, and it takes 1, 2 and 3 for different things.

Knows the insides of DeepSpeed 0.19, held by tests/pipeline/checkpoints/test_elastic.py. Must not know model, shards or
any stage.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beitforge.pipeline.distributed.file_reader import DAMAGE, read_file, refusal
from beitforge.pipeline.distributed.weight_average import AVERAGE
from beitforge.pipeline.errors import ConfigError

ADAM, MUON = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
_ALIKE = (*ADAM, AVERAGE)  # kept of each number as the master is
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Piece:
    """Numbers start … start + length of a flattened parameter. values: `fp32` and what the optimizer keeps, views that
    are 1-D of that length; those of a file are read when they are asked for."""

    start: int
    values: Mapping[str, Tensor]
    length: int | None = None  # of what is in a file

    @property
    def end(self) -> int:
        return self.start + (next(iter(self.values.values())).numel() if self.length is None else self.length)


_Within = Callable[[int, int], list[Piece]]


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's parameters: their shapes, their pieces in its (memory-mapped) files, Adam's step counter, what the
    search for fp16's loss scale has come to, and DeepSpeed's own counters of steps.

    within: by parameter, the pieces that reach into numbers first … last of it. A file that holds none is not opened.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    within: dict[str, _Within]
    step: float
    scale: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def pieces(self) -> dict[str, list[Piece]]:
        """All of each parameter's."""
        return {name: within(0, math.prod(self.shapes[name])) for name, within in self.within.items()}

    @torch.no_grad()
    def fill(self, name: str, target: Piece) -> None:
        """Copy what the target wants of a parameter. Raises ConfigError when the files do not hold all of it."""
        try:
            there = self.within[name](target.start, target.end) if name in self.within else []
            for value, into in target.values.items():
                filled, holding = 0, [piece for piece in there if value in piece.values]
                if there and not holding:
                    raise ConfigError(f"{self.folder} holds weights but not what the optimizer knows of {name}")
                for piece in holding:
                    first, last = max(piece.start, target.start), min(piece.end, target.end)
                    if first < last:
                        found = _of_length(piece.values[value], piece.end - piece.start)
                        found = found[first - piece.start : last - piece.start]
                        into[first - target.start : last - target.start].copy_(found)
                        filled += last - first
                wanted = target.end - target.start
                if filled != wanted:
                    raise ConfigError(
                        f"{self.folder} is damaged: it holds {filled} of {wanted} numbers of {name}; remove it"
                    )
        except ConfigError:
            raise
        except DAMAGE as error:
            raise refusal(self.folder, self.folder, error) from error

    def keeps(self, value: str) -> bool:
        """Whether the files hold this value of the parameters, as `fill` copies it."""
        name, within = next(iter(self.within.items()))
        return any(value in piece.values for piece in within(0, math.prod(self.shapes[name])))

    def weights(self, value: str = "fp32") -> Iterator[tuple[str, Tensor]]:
        """float32 weights, or what else is kept of them, one after the other; only one of them is in memory."""
        for name, shape in self.shapes.items():
            try:
                whole = torch.empty(math.prod(shape))
            except DAMAGE as error:
                raise refusal(self.folder, self.folder, error) from error
            self.fill(name, Piece(0, {value: whole}))
            yield name, whole.view(shape)


def _of_length(found: Tensor, numbers: int) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != (numbers,) or not found.is_floating_point():
        raise ValueError(f"it does not hold the {numbers} numbers that it says")
    return found


def open_checkpoint(folder: Path, stage: int, groups: list[list[str]], files: Collection[str] = ()) -> CheckpointFiles:
    """The parameters of a checkpoint folder. groups: names in the order of the optimizer's groups; files: those it is
    made of (both of state.json), without them all there are.

    Raises ConfigError when a file of it cannot be read.
    """
    names = files or [path.name for path in folder.iterdir()]
    try:
        if stage == 0:
            return _saved_whole(folder, names, groups)
        return _saved_flat(folder, names) if stage < 3 else _saved_partitioned(folder, names)
    except ConfigError:
        raise
    except DAMAGE as error:
        raise refusal(folder, folder, error) from error


def _model_file(folder: Path, names: Collection[str], name: str) -> dict[str, Any]:
    """The file that says which parameters there are. Raises ValueError where it is none of the checkpoint's."""
    if name not in names:
        raise ValueError(f"it has no {name}")
    return read_file(folder / name)


def _saved_whole(folder: Path, names: Collection[str], groups: list[list[str]]) -> CheckpointFiles:
    """ZeRO-0: one file with everything; masters apart from the weights unless these are float32 themselves."""
    content = _model_file(folder, names, "mp_rank_00_model_states.pt")
    module, optimizer = content["module"], content.get("optimizer")
    shapes = {name: tuple(tensor.shape) for name, tensor in module.items()}
    masters, scale = dict(module), dict[str, float]()
    if optimizer is None or not groups:  # weights alone: a checkpoint of before the groups' names were saved
        alone = {name: _one_piece({"fp32": tensor}) for name, tensor in module.items()}
        return CheckpointFiles(folder, shapes, alone, 0.0)
    if "fp32_groups" in optimizer:
        for group, tensors in zip(groups, optimizer["fp32_groups"], strict=True):
            masters.update(zip(group, tensors, strict=True))
        scale = _scale(optimizer)
        optimizer = optimizer["optimizer_state_dict"]
    order = [name for group in groups for name in group]
    kept = [own(optimizer["state"][number]) for number in range(len(order))]
    within = {name: _one_piece({"fp32": masters[name], **own}) for name, own in zip(order, kept, strict=True)}
    return CheckpointFiles(folder, shapes, within, _step(optimizer["state"]), scale, _counters(content))


def _one_piece(values: dict[str, Tensor]) -> _Within:
    piece = Piece(0, {key: tensor.reshape(-1) for key, tensor in values.items()})
    return lambda first, last: [piece]


def own(state: dict[str, Any]) -> dict[str, Tensor]:
    """Of the state of one of the optimizer's tensors what it keeps of each number. Raises ValueError where that is more
    than AdamW and Muon keep, and would be lost."""
    if foreign := state.keys() - {"step", *_ALIKE, *MUON}:
        raise ValueError(f"its optimizer keeps {min(map(str, foreign))!r:.40}, which neither AdamW nor Muon does")
    return {key: state[key] for key in (*_ALIKE, *MUON) if key in state}


def _step(states: dict[int, dict]) -> float:
    """The step counter, which all of AdamW's tensors share and Muon's have not."""
    return _finite(next(state["step"] for state in states.values() if "step" in state))


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a counter of it is {value!r:.40}")
    return float(value)


def _scale(kept: dict[str, Any]) -> dict[str, float]:
    """The loss scale and how long it has held, of what DeepSpeed keeps of it, also where it is one for good."""
    return {key: _finite(kept[key]) for key in _SCALE if kept.get(key) is not None}


def _counters(content: dict[str, Any]) -> dict[str, int]:
    return {key: int(content[key]) for key in _COUNTERS if key in content}


class _Ranks:
    """The optimizer files of a checkpoint by rank, each opened when it is first asked for."""

    def __init__(self, folder: Path, names: Collection[str]):
        found = {
            int(name.partition("pp_rank_")[2].partition("_")[0]): name
            for name in names
            if name.endswith("_optim_states.pt") and "/" not in name
        }
        if not found or sorted(found) != list(range(len(found))):
            raise ValueError(f"it has optimizer files of ranks {sorted(found)!s:.80}")
        self.folder, self.names, self.size = folder, found, len(found)
        self._opened: dict[int, dict] = {}

    def __getitem__(self, rank: int) -> dict:
        if rank not in self._opened:
            self._opened[rank] = read_file(self.folder / self.names[rank])["optimizer_state_dict"]
        return self._opened[rank]


@dataclass(frozen=True)
class _Values(Mapping):
    """Part of the tensors of a rank's file. of: what the file calls a value. part: of the file's flat tensors."""

    ranks: _Ranks
    rank: int
    of: Callable[[dict, str], Tensor]
    keys_: tuple[str, ...]
    part: slice

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.keys_:
            raise KeyError(key)
        return self.of(self.ranks[self.rank], key)[self.part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _in_order(shapes: dict[str, tuple[int, ...]], groups: list[dict]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in the module's order, which DeepSpeed's groups do not have."""
    wanted = {name: tuple(shape) for group in groups for name, shape in group.items()}
    return {name: wanted[name] for name in shapes if name in wanted}


@dataclass(frozen=True)
class _FlatGroup:
    """A parameter group under ZeRO-1 and 2: its parameters lie end to end, rank r holds the r-th of equal shares. The
    master's ends with the last parameter, the moments' with the padding. Muon's momentum is kept whole by every rank
    whose share the parameter reaches into."""

    ranks: _Ranks
    number: int
    share: int
    kept: tuple[str, ...]

    def of(self, held: dict, key: str) -> Tensor:
        if key == "fp32":
            return held["single_partition_of_fp32_groups"][self.number]
        return own(held["base_optimizer_state"]["state"][self.number])[key]

    def within(self, offset: int, numbers: int, behind: int, first: int, last: int) -> list[Piece]:
        """Of the parameter that begins at `offset`; whose whole momentum begins at `behind` on the first rank that has
        it."""
        found, share = [], self.share
        alike = ("fp32", *(key for key in self.kept if key in _ALIKE))
        for rank in range((offset + first) // share, min(self.ranks.size, -(-(offset + last) // share))):
            begin, end = max(offset, rank * share), min(offset + numbers, (rank + 1) * share)
            part = slice(begin - rank * share, end - rank * share)
            found.append(Piece(begin - offset, _Values(self.ranks, rank, self.of, alike, part), end - begin))
        if whole := tuple(key for key in self.kept if key in MUON):
            part = slice(behind, behind + numbers)
            found.append(Piece(0, _Values(self.ranks, offset // share, self.of, whole, part), numbers))
        return found


def _saved_flat(folder: Path, names: Collection[str]) -> CheckpointFiles:
    content, ranks = _model_file(folder, names, "mp_rank_00_model_states.pt"), _Ranks(folder, names)
    states = ranks[0]["base_optimizer_state"]["state"]
    within: dict[str, _Within] = {}
    for number, shapes in enumerate(content["param_shapes"]):
        share = ranks[0]["single_partition_of_fp32_groups"][number].numel()
        group = _FlatGroup(ranks, number, share, tuple(own(states.get(number, {}))))
        offset = 0
        before: list[tuple[int, int]] = []  # where the parameters that reach into a rank end, and their numbers
        for (name, shape), padding in zip(shapes.items(), ranks[0]["param_alignment_paddings"][number], strict=True):
            before = [(end, count) for end, count in before if end > offset // share * share]
            numbers = math.prod(shape)
            within[name] = partial(group.within, offset, numbers, sum(count for _, count in before))
            before.append((offset + numbers, numbers))
            offset += numbers + padding
    shapes = _in_order(content["module"], content["param_shapes"])
    scale = _scale(vars(ranks[0]["loss_scaler"]))
    return CheckpointFiles(folder, shapes, within, _step(states), scale, _counters(content))


@dataclass(frozen=True)
class _Flat:
    """A flat tensor under ZeRO-3: every parameter is cut into equal shares, rank r holds the r-th, end to end."""

    ranks: _Ranks
    number: int
    kept: tuple[str, ...]

    def of(self, held: dict, key: str) -> Tensor:
        if key == "fp32":
            return held["fp32_flat_groups"][self.number]
        return own(held["optimizer_state_dict"]["state"][self.number])[key]

    def within(self, offset: int, numbers: int, first: int, last: int) -> list[Piece]:
        """Of the parameter whose shares begin at `offset`."""
        found, share = [], -(-numbers // self.ranks.size)
        for rank in range(first // share, -(-last // share)) if share else ():
            part = slice(offset, offset + min(share, numbers - rank * share))
            values = _Values(self.ranks, rank, self.of, ("fp32", *self.kept), part)
            found.append(Piece(rank * share, values, part.stop - part.start))
        return found


def _saved_partitioned(folder: Path, names: Collection[str]) -> CheckpointFiles:
    """Under ZeRO-3 the flat tensors, one or more, end between two parameters."""
    content = _model_file(folder, names, "zero_pp_rank_0_mp_rank_00_model_states.pt")
    ranks = _Ranks(folder, names)
    states = ranks[0]["optimizer_state_dict"]["state"]
    within: dict[str, _Within] = {}
    number, offset = 0, 0
    for name, shape in (item for group in content["param_shapes"] for item in group.items()):
        if offset == ranks[0]["fp32_flat_groups"][number].numel():
            number, offset = number + 1, 0
        numbers = math.prod(shape)
        within[name] = partial(_Flat(ranks, number, tuple(own(states[number]))).within, offset, numbers)
        offset += -(-numbers // ranks.size)
    shapes = _in_order(content["module"], content["param_shapes"])
    scale = _scale(vars(ranks[0]["loss_scaler"]))
    return CheckpointFiles(folder, shapes, within, _step(states), scale, _counters(content))
