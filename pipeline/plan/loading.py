"""What the loader must bring, and how fast it can."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.shards.lanes import suiting_lanes, times_read

if TYPE_CHECKING:
    from beitforge.pipeline.plan.estimate import Machine

TOKEN_ROW = 16 + 1 + 12 + 1 + 8  # bytes of a stored view beside its tokens: box, flip, jitter, order, check


@dataclass(frozen=True)
class Loading:
    """What must come in. Rates over all GPUs, cores of one node; times_read: the set in an epoch by all nodes together,
    which on suiting_lanes of loader.lanes is about once."""

    images: float
    bytes_read: float
    bytes_to_gpus: float
    cores_per_node: float
    node_read: float
    times_read: float
    suiting_lanes: int


def loading_of(config: Config, machine: "Machine", gpus: int, images_per_second: float) -> Loading:
    """Rates at which images and tokens must come in, and what decodes them."""
    assumed, nodes = machine.assumed, machine.nodes(gpus)
    row = config.model.num_patches * 2 + TOKEN_ROW
    shared = config.loader.lanes, gpus, machine.chip.per_node
    times = times_read(*shared)
    read = times * images_per_second * (assumed.image_bytes + (0 if config.data.tokens == ONLINE else row))
    height, width = config.model.input_size
    pixels: float = 3 * height * width
    if config.loader.decoder == "gpu":
        pixels = assumed.image_bytes
    elif config.data.tokens == ONLINE:
        pixels += 3 * config.tokenizer.input_size.height * config.tokenizer.input_size.width
    return Loading(
        images=images_per_second,
        bytes_read=read,
        bytes_to_gpus=images_per_second * pixels,
        cores_per_node=images_per_second / nodes / _rate_of_a_core(config, machine),
        node_read=read / nodes,
        times_read=times,
        suiting_lanes=suiting_lanes(*shared),
    )


def _rate_of_a_core(config: Config, machine: "Machine") -> float:
    """Images a second that a worker makes ready."""
    assumed = machine.assumed
    on_gpu = config.loader.decoder == "gpu"
    return assumed.undecoded_images_per_second_per_core if on_gpu else assumed.loader_images_per_second_per_core


def loader_seconds(config: Config, machine: "Machine", gpus: int) -> float:
    """Of one image in the loader of one process: its cores or its GPU decode, its share of the node's storage brings
    bytes."""
    here = min(gpus, machine.chip.per_node)
    cores = min(max(1, config.loader.workers), machine.chip.cores_per_node / machine.chip.per_node)
    decoding = 1 / (cores * _rate_of_a_core(config, machine))
    if config.loader.decoder == "gpu":
        decoding = max(decoding, 1 / machine.assumed.gpu_images_per_second)
    times = times_read(config.loader.lanes, gpus, machine.chip.per_node)
    return max(decoding, times * machine.assumed.image_bytes * here / machine.read(gpus))
