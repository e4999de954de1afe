"""`tokenize CONFIG`: image shards and a tokenizer become token shards.

Any number of processes, however started: each takes whole shards that nobody holds and nobody finished. A shard's file
appears by rename, so a killed job is just started again; the first who sees all of them finished writes the manifest
(pipeline.data.token_folder).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from beitforge.pipeline.cluster.environment import rank_info, rank_of
from beitforge.pipeline.cluster.error_reporting import as_host_error
from beitforge.pipeline.config.derived import allowed_bad
from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.pipeline.console import say
from beitforge.pipeline.data.known_bad import known_line, number_of_bad
from beitforge.pipeline.data.pretraining import fitting_tokenizer, image_set, policy_record, view_policy
from beitforge.pipeline.data.token_folder import Claim, TokenFolder, Written
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.pixels import jitter
from beitforge.pipeline.tokenizers.precision import autocast_as, changed_tokens
from beitforge.pipeline.tokenizers.storage import VisualTokenizer
from beitforge.shards.decode import jpeg
from beitforge.shards.format.manifest import UNREADABLE, TokenManifest
from beitforge.shards.format.tokens import write_token_shard
from beitforge.shards.format.views import Views
from beitforge.shards.progress import Progress, Silent
from beitforge.shards.storage.remote import is_url
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.view_batches import Piece, ViewBatch, ViewCutter, ViewLoader

_IMAGES_PER_PIECE = 16
_COMPARED, _COMPARED_SLOWLY = 16, 4  # images tokenized once more at every precision, on a GPU and on a CPU
_SHOWN = 3


@dataclass(frozen=True)
class Task:
    """One image set to be tokenized into one folder. identity: the tokenizer's, with the precision it computes in."""

    images: ImageSet
    folder: TokenFolder
    tokenizer: VisualTokenizer
    identity: dict
    cutter: ViewCutter
    device: torch.device

    @torch.no_grad()
    def tokens(self, batch: ViewBatch) -> np.ndarray:
        """u16 [K, n, patches] of a batch of n images."""
        with autocast_as(self.identity["precision"], self.device):
            found = self.tokenizer.tokenize(self.pixels(batch)).cpu().numpy()
        return found.reshape(len(batch.bad), self.cutter.num_views, -1).swapaxes(0, 1).astype(np.uint16)

    def pixels(self, batch: ViewBatch) -> torch.Tensor:
        """f32 [n · K, 3, H, W] in [0, 1] on the device, jittered; the K views of an image one after the other."""
        views = batch.views
        jitters = torch.from_numpy(views.jitters).transpose(0, 1).flatten(0, 1)
        orders = torch.from_numpy(views.orders.astype(np.int64)).t().flatten()
        pivots = torch.from_numpy(views.levels[..., 2]).t().flatten()
        return jitter(*(part.to(self.device) for part in (batch.pixels.flatten(0, 1), jitters, orders, pivots)))


def run(config: Config) -> int:
    """Tokenize data.images, and data.heldout_images when given; returns the exit code."""
    with as_host_error():  # the processes don't meet: what a host lacks, it says itself
        tasks = _tasks(config)
        for task in tasks:
            task.folder.begin()
    for task in tasks:
        _tokenize_set(config, task)
    return 0


def _tasks(config: Config) -> list[Task]:
    """Open the image sets and the tokenizer. Raises ShardError or ConfigError."""
    data = config.data
    pairs = [(data.images, data.tokens), (data.heldout_images, data.heldout_tokens)]
    pairs = [(images, tokens) for images, tokens in pairs if images and tokens != ONLINE]
    for tokens in (tokens for _, tokens in pairs if is_url(tokens)):
        raise ConfigError(f"{tokens} is a URL: `tokenize` writes into a folder; upload it when it is complete")
    if not pairs:
        raise ConfigError(
            "data.tokens is online: `pretrain` makes the tokens itself; name a folder to make them before"
        )
    _refuse_shared(pairs)
    tokenizer, identity = fitting_tokenizer(config)
    device = _device()
    identity = {**identity, "precision": config.tokenizer.precision}
    return [_task(config, images, Path(tokens), tokenizer.to(device), identity, device) for images, tokens in pairs]


def _refuse_shared(pairs: list[tuple[str, str]]) -> None:
    """Each set of tokens has a folder of its own; nothing else is written there."""
    taken: list[Path] = []
    for _, tokens in pairs:
        folder = Path(tokens).resolve()
        for other in taken:
            if folder.is_relative_to(other) or other.is_relative_to(folder):
                raise ConfigError(
                    f"data.tokens is {pairs[0][1]} and data.heldout_tokens {tokens}, the same folder or one within the "
                    f"other: each set of tokens needs a folder of its own"
                )
        taken.append(folder)


def _task(
    config: Config, where: str, tokens: Path, tokenizer: VisualTokenizer, identity: dict, device: torch.device
) -> Task:
    images, policy, (height, width) = image_set(config, where), view_policy(config.view), identity["input_size"]
    cutter = ViewCutter(
        images=images,
        policy=policy,
        num_views=config.view.num_views,
        size=(height, width),
        resample=identity["filter"],
        decoder=config.loader.exact_decoder,
    )
    folder = TokenFolder(tokens, images, identity, policy_record(policy), cutter.num_views)
    return Task(images, folder, tokenizer, identity, cutter, device)


def _device() -> torch.device:
    place = rank_info(os.environ)
    if torch.cuda.is_available():
        return torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.set_num_threads(place.threads or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    return torch.device("cpu")


def _tokenize_set(config: Config, task: Task) -> None:
    """Every shard that nobody else takes, until all are there; then the manifest."""
    shards, views = task.images.manifest.shards, task.cutter.num_views
    rank, total = rank_of(os.environ), task.images.manifest.samples * views
    if rank == 0:
        say(f"tokenize {task.images.folder}: JPEGs by {jpeg.decoder(task.cutter.decoder).name}")
        if known := number_of_bad(task.images):
            say(known_line(task.images, known))
    label = f"tokenize {Path(str(task.images.folder)).name}"
    done = task.folder.samples * views
    with (
        Progress(label, total, "view", done=done) if rank == 0 else Silent() as progress,
        ViewLoader(task.cutter, workers=config.loader.workers, prefetch=config.loader.prefetch) as loader,
    ):
        for claims in task.folder.passes(_turn(len(shards))):
            _tokenize_claimed(task, loader, claims, progress)
            progress.advance(max(0, task.folder.samples * views - progress.done))
    limit = allowed_bad(len(task.images), config.data.bad_sample_budget)
    if task.folder.close(lambda written: _manifest(task, written, limit)):
        say(f"tokenized: {total} views of {task.images.manifest.samples} images, in {task.folder.folder}")


class _Shard:
    """A claimed shard, the views of which are on their way."""

    def __init__(self, claim: Claim, samples: int):
        self.claim, self.samples = claim, samples
        self.batches: list[tuple[ViewBatch, np.ndarray]] = []
        self.unread: list[str] = []

    @property
    def whole(self) -> bool:
        return self.batches[-1][0].piece.stop == self.samples


def _tokenize_claimed(task: Task, loader: ViewLoader, claims: Iterator[Claim], progress: Progress | Silent) -> None:
    """Tokenize and write every shard of a pass."""
    shards, held = task.images.manifest.shards, {}

    def pieces() -> Iterator[Piece]:
        for claim in claims:
            samples = shards[claim.number].samples
            held[claim.number] = _Shard(claim, samples)
            for first in range(0, samples, _IMAGES_PER_PIECE):
                yield Piece(claim.number, first, min(first + _IMAGES_PER_PIECE, samples))

    for batch in loader.load(pieces()):
        shard, name = held[batch.piece.shard], shards[batch.piece.shard].name
        for key, reason in batch.reasons.values():
            say(f"{name} {key}: cannot be read ({reason}); it gets no tokens, another stands in for it")
            shard.unread.append(key)
        shard.batches.append((batch._replace(pixels=torch.empty(0)), task.tokens(batch)))
        progress.advance(len(batch.bad) * task.cutter.num_views)
        if shard.whole:
            _write(task, held.pop(batch.piece.shard))
            if isinstance(progress, Progress):
                task.folder.look_again()
                progress.advance(max(0, task.folder.samples * task.cutter.num_views - progress.done))


def _write(task: Task, shard: _Shard) -> None:
    """The token file of a shard all of whose batches are there."""
    batches = [batch for batch, _ in shard.batches]
    bad = np.concatenate([batch.bad for batch in batches])
    tokens = np.concatenate([found for _, found in shard.batches], axis=1)
    tokens[:, bad == 1] = 0
    names = [field.name for field in fields(Views)]
    views = Views(*(np.concatenate([getattr(batch.views, name) for batch in batches], axis=1) for name in names))
    keys = np.concatenate([batch.keys for batch in batches])
    number = shard.claim.number
    digests = write_token_shard(
        task.folder.path(number), tokens, views, keys, bad, {"stamp": task.folder.stamp(number)}
    )
    task.folder.finish(shard.claim, digests, shard.unread)


def _manifest(task: Task, written: list[Written], limit: int) -> TokenManifest:
    """Raises ConfigError where more images could not be read than the limit allows."""
    unread = sum(file.unread for file in written)
    if unread > limit:
        _refuse_unread(task, [file for file in written if file.unread], unread, limit)
    return TokenManifest(
        shards=[file.entry for file in written],
        tokenizer=task.identity,
        policy=task.folder.policy,
        num_views=task.cutter.num_views,
        provenance={**_provenance(task), UNREADABLE: unread},
    )


def _refuse_unread(task: Task, files: list[Written], unread: int, limit: int) -> None:
    names = sorted(f"{file.entry.name}.safetensors" for file in files)
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    raise ConfigError(
        f"{unread} images of {task.images.folder} could not be read that were not known to be bad (the first: "
        f"{files[0].entry.name} {files[0].first}), more than the {limit} of data.bad_sample_budget: repair the shards "
        f"(`verify --decode` finds them), remove {shown} in {task.folder.folder} and run `tokenize` again, or "
        f"raise the budget"
    )


def _turn(num_shards: int) -> int:
    """Processes begin at different shards: by their rank, and by their element of a job array."""
    place = rank_info(os.environ)
    first, last = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", "0")) for name in ("MIN", "MAX"))
    element = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - first
    return (element * place.size + place.rank) * num_shards // ((last - first + 1) * place.size)


def _provenance(task: Task) -> dict:
    """For people: what made the tokens, and how many of them another precision would have changed."""
    versions = {name: metadata.version(name) for name in ("torch", "pillow", "numpy")}
    made = {"device": task.device.type, "decoder": jpeg.decoder(task.cutter.decoder).name, **versions}
    compared = _COMPARED if task.device.type == "cuda" else _COMPARED_SLOWLY
    batch = task.cutter.cut(Piece(0, 0, min(compared, task.images.manifest.shards[0].samples)))
    pixels = task.pixels(batch)[:: task.cutter.num_views]
    return {**made, "tokens_changed_against_fp32": changed_tokens(task.tokenizer, pixels)}
