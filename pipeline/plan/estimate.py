"""A training on machines that need not exist: memory, bytes, time, loader and energy for one number of GPUs.

Puts together pipeline.plan.costs, sharding, timeline and failures. Must not know torch.
"""

import math
from dataclasses import dataclass

from beitforge.pipeline.config.derived import micro_batch
from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.pipeline.plan.assumptions import Assumptions
from beitforge.pipeline.plan.costs import (
    Activations,
    activations,
    cast_bytes,
    computed_flops,
    launches,
    linear_flops,
    moved_bytes,
    muon_bytes,
    muon_flops,
    num_parameters,
    parameters,
    tokenizer_macs,
    training_flops,
    update_bytes,
)
from beitforge.pipeline.plan.hardware import Chip, Network, Storage
from beitforge.pipeline.plan.loading import Loading, loader_seconds, loading_of
from beitforge.pipeline.plan.simulation import (
    Cluster,
    RunEstimate,
    Step,
    StepWork,
    all_reduce_seconds,
    half_seconds,
    simulate,
    simulate_step,
)
from beitforge.pipeline.plan.zero_model import (
    Sharding,
    States,
    copied_bytes,
    exchanges,
    kept_whole,
    muon_work,
    states,
    zero_settings,
)
from beitforge.pipeline.runs.checkpoints import checkpoint_bytes

LARGEST_MICRO = 4096
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Machine:
    """What a training runs on, and what is assumed of it."""

    chip: Chip
    network: Network
    storage: Storage
    assumed: Assumptions

    @property
    def matrix_flops(self) -> float:
        return self.assumed.matrix_flops or self.chip.flops16 * self.assumed.matrix_share

    @property
    def memory_bandwidth(self) -> float:
        return self.assumed.memory_bandwidth or self.chip.memory_bandwidth * self.assumed.memory_share

    @property
    def intra(self) -> float:
        return self.assumed.intra_bandwidth or self.chip.link * self.assumed.link_share

    @property
    def inter(self) -> float:
        return self.assumed.inter_bandwidth or self.network.node_bandwidth * self.assumed.link_share

    @property
    def usable(self) -> float:
        return self.chip.memory * self.assumed.memory_usable

    def product_flops(self, precision: str) -> float:
        """Of products in a precision. TF32 runs at half the 16-bit rate (NVIDIA data sheets)."""
        if precision == "fp32":
            return self.chip.flops32 * self.assumed.matrix_share
        if precision == "fp8":
            return self.matrix_flops * self.chip.flops8 / self.chip.flops16
        return self.matrix_flops / (2 if precision == "tf32" else 1)

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.chip.per_node)

    def read(self, gpus: int) -> float:
        """Bytes a second that one node may read while all do."""
        rate = self.assumed.node_read or self.storage.node_read
        return min(rate, self.storage.total / self.nodes(gpus)) if self.storage.total else rate

    def write(self, gpus: int) -> float:
        """Bytes a second that one node may write while all do."""
        rate = self.assumed.node_write or self.storage.node_write
        return min(rate, self.storage.total / self.nodes(gpus)) if self.storage.total else rate


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. activations: of the micro batch; largest: micro batch that fits; both by kind of
    checkpointing."""

    states: States
    micro: int
    activations: dict[str, float]
    largest: dict[str, int]
    usable: float

    def total(self, checkpointing: str) -> float:
        return self.states.device + self.activations[checkpointing]

    def fits(self, checkpointing: str) -> bool:
        return self.total(checkpointing) <= self.usable


@dataclass(frozen=True)
class Estimate:
    """One way to run a config on a number of GPUs."""

    gpus: int
    stage: int
    checkpointing: str
    micro: int
    accumulation: int
    memory: Memory
    sent: float  # bytes by one process in a step
    step: Step
    life: RunEstimate
    images_per_second: float
    mfu: float
    loading: Loading
    days: float
    gpu_hours: float
    kwh: float
    checkpoint_bytes: float
    stall: float  # seconds of a checkpoint
    mtbf: float  # seconds between failures


def number_bytes(config: Config) -> int:
    return 4 if config.train.precision == "fp32" else 2


def kernels_of(config: Config) -> str:
    """Of attention on a GPU: pipeline.config.settings, model.kernels; fused takes heads of up to 128."""
    asked = config.model.kernels
    if asked == "auto":
        return "fused" if config.model.width // config.model.heads <= 128 else "sdpa"
    return asked


def sharding_of(config: Config, gpus: int, stage: int, accumulation: int) -> Sharding:
    return Sharding(
        parameters=parameters(config.model, config.tokenizer.vocabulary),
        stage=stage,
        world=gpus,
        number=number_bytes(config),
        accumulation=accumulation,
        offload=config.train.offload_optimizer and stage > 0,
        settings=zero_settings(config, stage),
        muon=config.optimizer.kind == "muon",
    )


def activations_of(config: Config, checkpointing: str) -> Activations:
    """What autograd keeps on a GPU."""
    vocabulary, masked = config.tokenizer.vocabulary, config.mask.num_patches
    return activations(config.model, vocabulary, masked, number_bytes(config), checkpointing, kernels_of(config))


def memory_of(config: Config, sharding: Sharding, micro: int, usable: float) -> Memory:
    """States, and activations at `micro` and at most."""
    kept, used, largest = states(sharding), {}, {}
    for checkpointing in CHECKPOINTING:
        each = activations_of(config, checkpointing)
        per_image = each.per_image + each.working
        used[checkpointing] = each.fixed + micro * per_image
        largest[checkpointing] = min(LARGEST_MICRO, max(0, int((usable - kept.device - each.fixed) // per_image)))
    return Memory(kept, micro, used, largest, usable)


def _modelled(config: Config, machine: Machine, checkpointing: str) -> float:
    """Seconds of an image: products at the matrix rate, then everything else at the memory's (the two sides of Williams
    et al.'s roofline, Comm. ACM 52(4), 2009, one after the other, since they are different kernels)."""
    model, vocabulary, masked = config.model, config.tokenizer.vocabulary, config.mask.num_patches
    computed = computed_flops(model, vocabulary, masked, checkpointing)
    moved = moved_bytes(model, number_bytes(config), config.train.compile, kernels_of(config), checkpointing)
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    seconds = computed / machine.product_flops(precision) + moved / machine.memory_bandwidth
    if config.train.precision == "fp8":
        inside = linear_flops(model, masked, checkpointing)
        seconds += inside / machine.product_flops("fp8") - inside / machine.product_flops("bf16")
        seconds += cast_bytes(model, masked, config.train.compile, checkpointing) / machine.memory_bandwidth
    return seconds


def seconds_per_image(config: Config, machine: Machine, checkpointing: str) -> tuple[float, float]:
    """Forward and backward on one GPU; what is recomputed belongs to backward."""
    plain = _modelled(config, machine, "none")
    again = _modelled(config, machine, checkpointing) / plain
    if machine.assumed.achieved_flops:
        flops = training_flops(config.model, config.tokenizer.vocabulary, config.mask.num_patches)
        plain = flops / machine.assumed.achieved_flops
    forward, seconds = plain / 3, plain * again
    tokens = 0.0
    if config.data.tokens == ONLINE:
        macs = machine.assumed.tokenizer_macs or tokenizer_macs(config.tokenizer, False)
        tokens = 2 * macs / machine.product_flops(config.tokenizer.precision)
    return forward + tokens, seconds - forward


def work_of(config: Config, machine: Machine, sharding: Sharding, micro: int, checkpointing: str) -> StepWork:
    """The step of one process as pipeline.plan.simulation takes it."""
    forward, backward = seconds_per_image(config, machine, checkpointing)
    short = 0.0 if machine.assumed.achieved_flops else machine.assumed.launch_seconds
    least = short * launches(config.model, config.train.compile, checkpointing) / (micro * (forward + backward))
    forward, backward = (part * max(1.0, least) for part in (forward, backward))  # the launching is the slower side
    world, settings = sharding.world, sharding.settings
    seconds = {"gather": 0.0, "regather": 0.0, "backward": 0.0, "end": 0.0}
    ahead = max(1, min(config.model.layers, int(settings.prefetch / (sharding.total / config.model.layers))))
    calls = dict.fromkeys(("gather", "regather"), math.ceil(config.model.layers / ahead))
    calls["end"] = 2 if sharding.stage < 3 else kept_whole(sharding)
    calls["backward"] = buckets = max(1, math.ceil(sharding.total / settings.bucket))
    for each in exchanges(sharding):
        timed = all_reduce_seconds if each.kind == "all_reduce" else half_seconds
        link = (machine.chip.per_node, machine.intra, machine.inter)
        once = timed(each.message, world, *link, 0.0) + calls[each.when] * timed(
            0.0, world, *link, machine.network.latency
        )
        seconds[each.when] += once
    share = sharding.total / (world if sharding.stage else 1)
    own = sharding.muon_numbers / (world if sharding.stage else 1)
    moved = update_bytes(share - own) + muon_bytes(own)
    update = moved / (machine.assumed.update_bandwidth or machine.memory_bandwidth)
    matrices = [each.matrix for each in muon_work(sharding) if each.matrix]
    update += sum(muon_flops(*matrix) for matrix in matrices) / machine.product_flops("fp16")
    if sharding.offload:
        update = 2 * sharding.number * share / machine.assumed.host_copy
    update += copied_bytes(sharding) / machine.memory_bandwidth
    return StepWork(
        blocks=config.model.layers,
        turns=sharding.accumulation,
        forward=micro * forward,
        backward=micro * backward,
        update=update,
        gather=seconds["gather"],
        regather=seconds["regather"],
        reduce=seconds["backward"],
        buckets=min(buckets, config.model.layers),
        every_turn=sharding.stage > 1,
        end=seconds["end"],
        overlap=settings.overlap,
        ahead=ahead,
    )


def checkpoint_size(sharding: Sharding) -> int:
    """Bytes of a checkpoint."""
    matrices = [[each.numbers for each in group] for group in sharding.matrices]
    return checkpoint_bytes(sharding.total, sharding.stage, sharding.number, matrices, sharding.world)


def checkpoint_of(config: Config, machine: Machine, sharding: Sharding) -> tuple[float, float]:
    """Bytes of a checkpoint, and how long the training stands still."""
    size = float(checkpoint_size(sharding))
    nodes = machine.nodes(sharding.world) if sharding.stage else 1
    if config.checkpoint.asynchronous:
        return size, size / (sharding.world if sharding.stage else 1) / machine.assumed.host_copy
    return size, machine.assumed.save_seconds + size / nodes / machine.write(sharding.world)


def cluster_of(config: Config, machine: Machine, sharding: Sharding, one: Step, images: int) -> Cluster:
    """All processes, and what befalls them."""
    assumed, gpus = machine.assumed, sharding.world
    every = max(1, config.checkpoint.every.steps(config.train.epoch_samples(images), config.train.global_batch))
    rate = assumed.failures_per_gpu_day * gpus
    return Cluster(
        ranks=gpus,
        load=config.train.global_batch // gpus * loader_seconds(config, machine, gpus),
        ready=max(1, config.loader.workers * config.loader.prefetch // sharding.accumulation),
        straggler_cv=assumed.straggler_cv,
        loader_cv=assumed.loader_cv,
        save=checkpoint_of(config, machine, sharding)[1],
        save_every=every * one.seconds,
        restart=assumed.restart_seconds,
        mtbf=86400 / rate if rate else math.inf,
    )


def estimate(
    config: Config,
    machine: Machine,
    gpus: int,
    stage: int,
    *,
    images: int,
    checkpointing: str = "",
    at_most: int = 0,
    steps: int = 60,
) -> Estimate:
    """One row. checkpointing: as configured. at_most: images of a micro batch, 0 as configured; less where memory asks.

    Raises ConfigError when the global batch does not divide over the GPUs.
    """
    train = config.train
    checkpointing = checkpointing or train.activation_checkpointing
    wanted = at_most or train.micro_batch
    micro = micro_batch(train.global_batch, wanted, gpus, "train.global_batch")
    sharding = sharding_of(config, gpus, stage, train.global_batch // (micro * gpus))
    memory = memory_of(config, sharding, micro, machine.usable)
    largest = memory.largest[checkpointing]
    if 0 < largest < micro:
        micro = micro_batch(train.global_batch, largest, gpus, "train.global_batch")
        sharding = sharding_of(config, gpus, stage, train.global_batch // (micro * gpus))
        memory = memory_of(config, sharding, micro, machine.usable)
    one = simulate_step(work_of(config, machine, sharding, micro, checkpointing))
    cluster = cluster_of(config, machine, sharding, one, images)
    life = simulate(one, cluster, steps=steps, seed=config.data.seed)
    seconds = (
        train.duration.steps(train.epoch_samples(images), train.global_batch) * life.step / max(life.survived, 1e-9)
    )
    speed = train.global_batch / life.step
    flops = training_flops(config.model, config.tokenizer.vocabulary, config.mask.num_patches)
    peak = machine.chip.flops32 if train.precision == "fp32" else machine.chip.flops16
    hours = gpus * seconds / 3600
    return Estimate(
        gpus=gpus,
        stage=stage,
        checkpointing=checkpointing,
        micro=micro,
        accumulation=sharding.accumulation,
        memory=memory,
        sent=sum(each.sent(gpus) for each in exchanges(sharding)),
        step=one,
        life=life,
        images_per_second=speed,
        mfu=speed * flops / (peak * gpus),
        loading=loading_of(config, machine, gpus, speed),
        days=seconds / 86400,
        gpu_hours=hours,
        kwh=hours * machine.chip.watts * machine.assumed.node_power / 1000,
        checkpoint_bytes=checkpoint_of(config, machine, sharding)[0],
        stall=cluster.save,
        mtbf=cluster.mtbf,
    )


def size_of(config: Config) -> int:
    return num_parameters(config.model, config.tokenizer.vocabulary)
