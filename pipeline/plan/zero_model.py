"""What each ZeRO stage of this engine keeps on a GPU and sends, part by part.

The partitions are those of arXiv 1910.02054 (ZeRO: section 5 memory, section 7 communication), with what DeepSpeed 0.19
really does under pipeline.distributed.engine's configuration where it differs: read in deepspeed/runtime/zero, and held
by tests/pipeline/plan/test_plan_ranks.py, which counts tensors and collectives of real runs. Must not know torch.
"""

from dataclasses import dataclass

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plan.costs import Parameter

_BUCKET_WITHOUT = 500_000_000  # of gradients without ZeRO (deepspeed/runtime/engine.py)


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """DeepSpeed's own settings that change memory or bytes; its defaults, or the config's deepspeed section."""

    bucket: int  # numbers reduced at once
    overlap: bool
    all_reduce: bool  # gradients of stages 1 and 2: all-reduced in one piece, or reduced to their owners
    persistent: int  # parameters of so few numbers stay whole under stage 3
    reuse: int  # numbers until its next use for which a parameter stays whole
    prefetch: int  # numbers gathered ahead
    live: int  # numbers that are whole at once at most, for what is gathered ahead


def zero_settings(config: Config, stage: int) -> ZeroSettings:
    """Defaults of deepspeed/runtime/zero/config.py under `deepspeed.zero_optimization`. Raises ConfigError."""
    given = config.deepspeed.get("zero_optimization") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"deepspeed.zero_optimization is {given!r}; it must be a section")
    overlap = given.get("overlap_comm")
    return ZeroSettings(
        bucket=_count(given, "reduce_bucket_size", 5e8) if stage else _BUCKET_WITHOUT,
        overlap=bool(stage == 3 if overlap is None else overlap and stage > 0),
        all_reduce=bool(given.get("use_multi_rank_bucket_allreduce", True)),
        persistent=_count(given, "stage3_param_persistence_threshold", 1e5),
        reuse=_count(given, "stage3_max_reuse_distance", 1e9),
        prefetch=_count(given, "stage3_prefetch_bucket_size", 5e7),
        live=_count(given, "stage3_max_live_parameters", 1e9),
    )


def _count(given: dict, name: str, default: float) -> int:
    try:
        number = int(float(given.get(name, default)))  # PyYAML reads 5e8 as a text
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < (1 if name == "reduce_bucket_size" else 0):
        raise ConfigError(f"deepspeed.zero_optimization.{name} is {given[name]!r}; it must be a number of parameters")
    return number


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """One way to lay a model over processes. number: bytes of a weight and of its gradient."""

    parameters: list[Parameter]
    stage: int
    world: int
    number: int
    accumulation: int
    offload: bool
    settings: ZeroSettings
    muon: bool = False

    @property
    def groups(self) -> list[list[Parameter]]:
        """The optimizer's: Muon's matrices by columns, in DeepSpeed's order, then AdamW's with and without decay."""
        rest = [each for each in self.parameters if each.matrix is None or not self.muon]
        return [*self.matrices, *([each for each in rest if each.decays is decays] for decays in (True, False))]

    @property
    def matrices(self) -> list[list[Parameter]]:
        """Muon's groups (pipeline.training.optim.muon_groups)."""
        shapes = [each for each in self.parameters if self.muon and each.matrix]
        columns = sorted({each.matrix[1] for each in shapes if each.matrix})
        ordered = sorted(shapes, key=lambda each: each.matrix or (), reverse=True)
        return [[each for each in ordered if each.matrix and each.matrix[1] == inputs] for inputs in columns]

    @property
    def muon_numbers(self) -> int:
        return sum(each.numbers for group in self.matrices for each in group)

    @property
    def total(self) -> int:
        return sum(each.numbers for each in self.parameters)


@dataclass(frozen=True)
class States:
    """Bytes on the fullest GPU. buffers: what comes and goes within a step, at its most. host: of its node's memory."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    host: float

    @property
    def device(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def copied_bytes(sharding: Sharding) -> float:
    """Bytes that a step moves within a GPU's memory beside the model and AdamW: gradients are copied into buckets,
    scaled, copied to their owner, which makes float32 of them, and new weights are copied back.
    tests/pipeline/plan/test_plan_ranks.py counts them."""
    if sharding.stage == 0:
        return 0.0
    turns = sharding.accumulation if sharding.stage > 1 else 1
    whole, share = 3 * 2.0 * sharding.number * turns, 2 * (sharding.number + 4.0) / sharding.world
    return sharding.total * (whole + share)


def padded(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple


def states(sharding: Sharding) -> States:
    """Model states and buffers of one process."""
    master = 4 if sharding.number == 2 else 0  # without ZeRO and ZeRO-3's shards, float32 weights are their own masters
    total, number = sharding.total, sharding.number
    if sharding.stage == 0:
        flat = number * min(total, sharding.settings.bucket) if sharding.world > 1 else 0
        optimizer = (master + 8) * total - 4 * sharding.muon_numbers
        return States(number * total, number * total, optimizer, max(flat, master * total), 0.0)
    return _flat_states(sharding) if sharding.stage < 3 else _partitioned_states(sharding)


def _flat_states(sharding: Sharding) -> States:
    """ZeRO-1 and 2: each group lies end to end, padded to even shares; a gradient is kept whole by every process that
    owns a part of it, as are Muon's momentum, its next value and its update, in the gradients' precision. The bucket,
    in which others wait, exists during backward, the share's float32 gradients during the update."""
    number, world = sharding.number, sharding.world
    lengths = [padded(sum(each.numbers for each in group), 2 * world) for group in sharding.groups]
    share, of_muon = sum(lengths) // world, len(sharding.matrices)
    momentum = number * max(_owned(sharding.matrices, lengths[:of_muon], world))
    gradients = float(number * max(_owned(sharding.groups, lengths, world)) + momentum)  # and what Muon makes of them
    bucket = number * sharding.settings.bucket * (2 if sharding.settings.overlap else 1)
    optimizer = 4.0 * share + 8.0 * (sum(lengths[of_muon:]) // world) + momentum
    buffers = momentum + max(bucket, 4.0 * share if number == 2 else 0.0)
    on_device, on_host = (0.0, optimizer) if sharding.offload else (optimizer, 0.0)
    return States(float(number * sum(lengths)), gradients, on_device, buffers, on_host)


def _owned(groups: list[list[Parameter]], lengths: list[int], world: int) -> list[int]:
    """Numbers of the parameters that reach into each process's share, whole."""
    owned = [0] * world
    for group, length in zip(groups, lengths, strict=True):
        for each, ranks in zip(group, _owners(group, length, world), strict=True):
            for rank in ranks:
                owned[rank] += each.numbers
    return owned


def _owners(group: list[Parameter], length: int, world: int) -> list[range]:
    """Of each parameter of a group the processes into whose share it reaches."""
    found, share, start = [], length // world, 0
    for each in group:
        found.append(range(start // share, min(world - 1, (start + each.numbers - 1) // share) + 1))
        start += each.numbers
    return found


def _partitioned_states(sharding: Sharding) -> States:
    """ZeRO-3: every parameter is cut by itself. Small ones are kept whole, too; the others are whole between two uses
    that are near (`reuse`). The bucket is never given back."""
    number, world, settings = sharding.number, sharding.world, sharding.settings
    share = sum(-(-each.numbers // world) for each in sharding.parameters)
    whole = sum(padded(each.numbers, world) for each in sharding.parameters if each.numbers <= settings.persistent)
    at_once = _gathered(sharding)
    if world == 1:  # the share is the whole, and nothing is gathered
        whole, at_once = 0, []
    live = sum(numbers for numbers, again in at_once if not again)
    live += min(settings.prefetch, sum(numbers for numbers, again in at_once if again))
    muon = sum(-(-each.numbers // world) for group in sharding.matrices for each in group)
    optimizer = 12.0 * share - (8 - number) * muon  # momentum in the gradients' precision
    together = min(settings.bucket, muon * world) * (3 if world > 1 else 1)  # Muon's: gradients and momentum, whole
    buffers = float(
        number * settings.bucket + max(number * live, 4.0 * share if number == 2 else 0.0, number * together)
    )
    on_device, on_host = (0.0, optimizer) if sharding.offload else (optimizer, 0.0)
    return States(float(number * (share + whole)), float(number * share), on_device, buffers, on_host)


def _gathered(sharding: Sharding) -> list[tuple[int, bool]]:
    """Of each parameter that is not kept whole: its numbers, padded, and whether it is gathered again for backward.

    DeepSpeed lets go of it after forward unless it comes back within `reuse` numbers of other parameters (all that
    follow come twice in between), or its prefetcher has met its next use: it runs ahead as far as `live` reaches.
    """
    settings, found, behind = sharding.settings, [], 0
    all_live = settings.prefetch > 0 and sharding.total <= settings.live
    for each in reversed(sharding.parameters):
        if each.numbers > settings.persistent:
            found.append((padded(each.numbers, sharding.world), not all_live and 2 * behind >= settings.reuse))
        behind += each.numbers
    return found[::-1]


def kept_whole(sharding: Sharding) -> int:
    """Parameters that ZeRO-3 keeps on every process. After the update each is gathered by a call of its own."""
    return sum(each.numbers <= sharding.settings.persistent for each in sharding.parameters)


@dataclass(frozen=True)
class Exchange:
    """A collective: all_reduce, reduce_scatter, all_gather or reduce; bytes of its whole message; how often a step; and
    when: gather (before blocks need it), backward (as gradients come), end (after the last backward)."""

    kind: str
    when: str
    message: float
    times: int

    def sent(self, world: int) -> float:
        """Bytes a process sends: on a ring (n - 1) / n of the message, an all-reduce twice that (Patarasuk and Yuan,
        J. Parallel Distrib. Comput. 69, 2009; no algorithm sends less)."""
        return self.times * self.message * (2 if self.kind == "all_reduce" else 1) * (world - 1) / world


def exchanges(sharding: Sharding) -> list[Exchange]:
    """Every collective of a step whose size grows with the model; the rest is some bytes.

    Where the paper's ZeRO-1 and 2 send 2 Ψ numbers, DeepSpeed's send 3 Ψ: it all-reduces the bucket and each keeps its
    part (`use_multi_rank_bucket_allreduce`). ZeRO-2 does so with every micro batch. ZeRO-3 gathers once a micro batch
    what stays within `reuse`, not twice. With Muon it all-reduces gradients, too, and before the update gathers them
    and the momentum; matrices are then updated one by each process, and both are gathered again.
    """
    number, turns = sharding.number, sharding.accumulation
    if sharding.world == 1:
        return []
    if sharding.stage == 0:
        return [Exchange("all_reduce", "end", float(number * sharding.total), 1)]
    if sharding.stage < 3:
        kind = "all_reduce" if sharding.settings.all_reduce else "reduce"
        lengths = sum(padded(sum(e.numbers for e in group), 2 * sharding.world) for group in sharding.groups)
        times = turns if sharding.stage == 2 else 1
        gradients = Exchange(kind, "backward", float(number * sharding.total), times)
        return [gradients, Exchange("all_gather", "end", float(number * lengths), 1)]
    gathered = _gathered(sharding)
    shares = sum(padded(each.numbers, sharding.world) for each in sharding.parameters)
    whole = shares - sum(numbers for numbers, _ in gathered)
    if sharding.muon:
        reduced = Exchange("all_reduce", "backward", float(number * sharding.total), turns)
    else:
        reduced = Exchange("reduce_scatter", "backward", float(number * shares), turns)
    return [
        Exchange("all_gather", "gather", float(number * sum(numbers for numbers, _ in gathered)), turns),
        Exchange("all_gather", "regather", float(number * sum(numbers for numbers, again in gathered if again)), turns),
        reduced,
        Exchange("all_gather", "end", float(number * (whole + _gathered_by_muon(sharding))), 1),
    ]


def _gathered_by_muon(sharding: Sharding) -> int:
    """Numbers that ZeRO-3 gathers around Muon's update: shares first, then turns of `world` matrices, each as long as
    the longest of its turn."""
    world, found = sharding.world, 0
    for group in sharding.matrices:
        found += 2 * sum(padded(each.numbers, world) for each in group)
        turns = [group[start : start + world] for start in range(0, len(group), world)]
        found += 2 * world * sum(max(each.numbers for each in turn) for turn in turns)
    return found


def muon_work(sharding: Sharding) -> list[Parameter]:
    """The matrices that the busiest process updates: all without ZeRO, those that reach into its share under ZeRO-1 and
    2, one of each turn under ZeRO-3."""
    world, groups = sharding.world, sharding.matrices
    if sharding.stage == 0:
        return [each for group in groups for each in group]
    if sharding.stage == 3:
        return [each for group in groups for each in group[::world]]
    lengths = [padded(sum(each.numbers for each in group), 2 * world) for group in groups]
    work: list[list[Parameter]] = [[] for _ in range(world)]
    for group, length in zip(groups, lengths, strict=True):
        for each, ranks in zip(group, _owners(group, length, world), strict=True):
            for rank in ranks:
                work[rank].append(each)
    return max(work, key=lambda mine: sum(each.numbers for each in mine))
