"""A rank's batches of a stream: of training from any sample on, and of evaluation, each sample once."""

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from beitforge.pipeline.cluster.environment import rank_info
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.errors import ConfigError
from beitforge.shards.decode import jpeg
from beitforge.shards.lanes import advice
from beitforge.shards.storage.remote import Remote
from beitforge.shards.stream.image_set import Reading
from beitforge.shards.stream.loader import Batch, BatchSampler, Stream, load
from beitforge.shards.stream.order import Order, RankBatches, rank_batches
from beitforge.shards.stream.prefetch import fetched_ahead

if TYPE_CHECKING:
    from torch import Tensor

    from beitforge.shards.stream.on_device import OnDevice


def training_batches(
    config: Config,
    source: DataSource,
    *,
    first_sample: int,
    global_batch: int,
    micro: int,
    rank: int,
    world: int,
    steps: int,
) -> Iterator[Batch]:
    """A rank's micro batches of `steps` steps from sample `first_sample` on; restart it anywhere."""
    numbers = rank_batches(
        first_sample=first_sample,
        global_batch=global_batch,
        micro_batch=micro,
        rank=rank,
        world=world,
        steps=steps,
        paired=source.paired,
    )
    if not isinstance(source.stream.images.folder, Remote) or not isinstance(source.stream.places, Order):
        return _load(config, source.stream, numbers)
    return _load_ahead(config, source.stream, numbers)


def _load_ahead(config: Config, stream: Stream, numbers: RankBatches) -> Iterator[Batch]:
    """The batches of a remote set, their chunks fetched before they are asked for."""
    place, rank, world = rank_info(os.environ), numbers.rank, numbers.world
    first = rank - place.local_rank
    assert isinstance(stream.places, Order), "training reads in an order"
    reading = Reading(stream.places, range(first, first + place.local_size), world, numbers.first_sample)
    end = numbers.first_sample + numbers.steps * numbers.global_batch
    with fetched_ahead(stream.images, reading, rank, end) as tell:
        for batch in _load(config, stream, numbers):
            tell(int(batch.samples[0]))
            yield batch


def lanes_advice(config: Config, source: DataSource, world: int) -> tuple[str, str]:
    """What to say of a training whose nodes fetch a remote set several times together, and the cure; else empty."""
    if not isinstance(source.stream.images.folder, Remote) or not isinstance(source.stream.places, Order):
        return "", ""
    return advice(config.loader.lanes, world, rank_info(os.environ).local_size)


def evaluation_batches(
    config: Config, source: DataSource, *, samples: int, micro: int, rank: int, world: int
) -> Iterator[Batch]:
    """A rank's share of samples 0 … samples - 1, each once over all ranks; the last batch may be short."""
    mine = np.arange(rank, samples, world, dtype=np.int64)
    return _load(config, source.stream, [mine[i : i + micro] for i in range(0, len(mine), micro)])


def block_batches(
    config: Config, source: DataSource, *, samples: int, block: int, rank: int, world: int
) -> Iterator[Batch]:
    """A rank's share of samples 0 … samples - 1 in blocks of as many consecutive ones, each block on one rank: whatever
    is computed of a batch is the same bits on any number of ranks. The last block may be short."""
    starts = range(rank * block, samples, world * block)
    numbers = [np.arange(start, min(start + block, samples), dtype=np.int64) for start in starts]
    return _load(config, source.stream, numbers)


def even_batches(
    config: Config, source: DataSource, *, samples: int, micro: int, rank: int, world: int
) -> Iterator[tuple[Batch, "Tensor"]]:
    """A rank's share of samples 0 … samples - 1 in as many batches of the same sizes as every other rank's, which
    ZeRO-3 needs: each forward gathers weights from all. With each comes weight f32 [B]: 1 for a sample of this rank,
    each once over all ranks, 0 for one that fills up."""
    import torch

    places = np.arange(rank, -(-samples // world) * world, world, dtype=np.int64)
    mine = np.minimum(places, samples - 1)
    batches = _load(config, source.stream, [mine[i : i + micro] for i in range(0, len(mine), micro)])
    for number, batch in enumerate(batches):
        counts = places[number * micro : (number + 1) * micro] < samples
        yield batch, torch.from_numpy(counts).to(batch.samples.device, torch.float32)


def own_images(batch: Batch) -> "Tensor":
    """Which samples of a batch are themselves, bool [B], and not others that stand in for images that could not be
    read: what is counted of a substitute would count for another image."""
    import torch

    return ~torch.isin(batch.samples, batch.samples.new_tensor([bad.sample for bad in batch.bad]))


def decoder_name(stream: Stream) -> str:
    """What decodes a stream's JPEGs in this process. Raises ShardError where the one asked for does not work here."""
    return _on_device(stream).describe() if stream.decoder == jpeg.GPU else jpeg.decoder(stream.decoder).name


def require_decoder(stream: Stream) -> None:
    """Raise ConfigError where a stream asks for a GPU's decoder and this process has no GPU."""
    import torch

    if stream.decoder == jpeg.GPU and not torch.cuda.is_available():
        raise ConfigError("loader.decoder is gpu, and this process has no GPU: set loader.decoder=auto")


def _on_device(stream: Stream) -> "OnDevice":
    import torch

    from beitforge.shards.stream.on_device import OnDevice

    require_decoder(stream)
    return OnDevice(stream, torch.device("cuda", torch.cuda.current_device()))


def _load(config: Config, stream: Stream, numbers: BatchSampler) -> Iterator[Batch]:
    import torch

    finish = None
    if stream.decoder == jpeg.GPU:
        finish, stream = _on_device(stream).finish, dataclasses.replace(stream, defer=True)
    pin = torch.cuda.is_available()
    loaded = load(stream, numbers, workers=config.loader.workers, prefetch=config.loader.prefetch, pin=pin)
    return map(finish, loaded) if finish else loaded
