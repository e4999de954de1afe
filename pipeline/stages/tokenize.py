"""`tokenize CONFIG`: image shards and a tokenizer become token shards.

Any number of processes, however started: each takes whole shards that nobody holds and nobody finished. A shard's file
appears by rename, so a killed job is just started again; whoever sees the last one finished writes the manifest.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.pixels import jitter
from beitforge.pipeline.tokenizers.precision import autocast_as, changed_tokens
from beitforge.pipeline.tokenizers.storage import VisualTokenizer
from beitforge.shards.decode import jpeg
from beitforge.shards.format.index import FLAG_BAD, Index
from beitforge.shards.format.manifest import NAME, UNREADABLE, ImageShard, TokenManifest, write_manifest
from beitforge.shards.format.tokens import open_token_shard, token_path, token_shard_entry, write_token_shard
from beitforge.shards.format.views import FIELDS, ViewPolicy, Views, draw_views
from beitforge.shards.progress import Progress, Silent
from beitforge.shards.storage.files import sweep_partials
from beitforge.shards.storage.remote import is_url
from beitforge.shards.storage.staging import leftovers
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.view_batches import ShardViews, ViewBatch, load_view_batches

_IMAGES_PER_ITEM = 16
_COMPARED, _COMPARED_SLOWLY = 16, 4  # images tokenized once more at every precision, on a GPU and on a CPU
_POLL_SECONDS = 1.0
_SHOWN = 3


@dataclass(frozen=True)
class Task:
    """One image set to be tokenized into one folder."""

    images: ImageSet
    folder: Path
    tokenizer: VisualTokenizer
    identity: dict
    policy: ViewPolicy
    num_views: int
    precision: str
    device: torch.device
    decoder: str

    def stamp(self, shard: ImageShard) -> dict[str, str]:
        """What a token file of this task carries; a file with another stamp belongs to another task."""
        made = {"tokenizer": self.identity["fingerprint"], "policy": policy_record(self.policy)}
        made |= {"num_views": self.num_views, "image_digest": shard.digest, "precision": self.precision}
        return {"stamp": json.dumps(made, sort_keys=True)}


def run(config: Config) -> int:
    """Tokenize data.images, and data.heldout_images when given; returns the exit code."""
    with as_host_error():  # the processes don't meet: what a host lacks, it says itself
        watched = [_Finished(task) for task in _tasks(config)]
        for watch in watched:
            watch.views()
    for watch in watched:
        _tokenize_set(config, watch)
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
    tokenizer, identity = fitting_tokenizer(config)
    device = _device()
    return [
        Task(
            image_set(config, images),
            Path(tokens),
            tokenizer.to(device),
            identity,
            view_policy(config.view),
            config.view.num_views,
            config.tokenizer.precision,
            device,
            config.loader.exact_decoder,
        )
        for images, tokens in pairs
    ]


def _device() -> torch.device:
    place = rank_info(os.environ)
    if torch.cuda.is_available():
        return torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.set_num_threads(place.threads or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    return torch.device("cpu")


def _tokenize_set(config: Config, watch: "_Finished") -> None:
    """Every shard that nobody else takes, until all are there; then the manifest."""
    task = watch.task
    shards = task.images.manifest.shards
    task.folder.mkdir(parents=True, exist_ok=True)
    rank, turn = rank_of(os.environ), _turn(len(shards))
    total = task.images.manifest.samples * task.num_views
    if rank == 0:
        say(f"tokenize {task.images.folder}: JPEGs by {jpeg.decoder(task.decoder).name}")
        if known := number_of_bad(task.images):
            say(known_line(task.images, known))
    label = f"tokenize {Path(str(task.images.folder)).name}"
    with Progress(label, total, "view", done=watch.views()) if rank == 0 else Silent() as progress:
        left = [number for number in [*range(turn, len(shards)), *range(turn)] if not watch.finished(number)]
        while left:
            for number in left:
                _try_shard(config, task, number, watch, progress)
                progress.advance(max(0, watch.views() - progress.done))
            before, left = len(left), [number for number in left if not watch.finished(number)]
            if len(left) == before:
                time.sleep(_POLL_SECONDS)  # others hold what is left; what a dead one held comes free
    if not (task.folder / NAME).exists():
        unread = _unread(task)
        _refuse_unread(task, unread, allowed_bad(len(task.images), config.data.bad_sample_budget))
        entries = [token_shard_entry(task.folder, shard.name, shard.digest) for shard in shards]
        manifest = TokenManifest(
            shards=entries,
            tokenizer={**task.identity, "precision": task.precision},
            policy=policy_record(task.policy),
            num_views=task.num_views,
            provenance={**_provenance(task), UNREADABLE: len(unread)},
        )
        write_manifest(task.folder, manifest)
        _sweep(task.folder)
        say(f"tokenized: {total} views of {task.images.manifest.samples} images, in {task.folder}")


def _unread(task: Task) -> list[tuple[str, str]]:
    """Shard and key of the images that could not be read though nothing was known against them."""
    found = []
    for number, shard in enumerate(task.images.manifest.shards):
        bad = open_token_shard(token_path(task.folder, shard.name)).bad
        if bad.any():
            index = task.images.index(number)
            rows = np.flatnonzero((bad == 1) & ((index.flags & FLAG_BAD) == 0))
            found += [(shard.name, index.key(row)) for row in rows.tolist()]
    return found


def _refuse_unread(task: Task, unread: list[tuple[str, str]], limit: int) -> None:
    """Raise ConfigError where more images could not be read than the budget allows."""
    if len(unread) <= limit:
        return
    shards = sorted({shard for shard, _ in unread})
    files = ", ".join(token_path(task.folder, shard).name for shard in shards[:_SHOWN])
    more = f" and {len(shards) - _SHOWN} more" if len(shards) > _SHOWN else ""
    raise ConfigError(
        f"{len(unread)} images of {task.images.folder} could not be read that were not known to be bad (the first: "
        f"{' '.join(unread[0])}), more than the {limit} of data.bad_sample_budget: repair the shards (`verify "
        f"--decode` finds them), remove {files}{more} in {task.folder} and run `tokenize` again, or raise the budget"
    )


def _turn(num_shards: int) -> int:
    """Processes begin at different shards: by their rank, and by their element of a job array."""
    place = rank_info(os.environ)
    first, last = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", "0")) for name in ("MIN", "MAX"))
    element = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - first
    return (element * place.size + place.rank) * num_shards // ((last - first + 1) * place.size)


def _try_shard(config: Config, task: Task, number: int, watch: "_Finished", progress: Progress | Silent) -> None:
    """Tokenize a shard unless it is finished or another process holds it."""
    if watch.finished(number):
        return
    with _claimed(task, task.images.manifest.shards[number].name) as mine:
        if mine and not watch.finished(number):
            _tokenize_shard(config, task, number, progress)
            watch.add(number)


def _sweep(folder: Path) -> None:
    """Remove claims, and what killed processes left half written."""
    for claim in folder.glob("*.claim"):
        claim.unlink(missing_ok=True)
    sweep_partials(leftovers(folder))


def _provenance(task: Task) -> dict:
    """For people: what made the tokens, and how many of them another precision would have changed."""
    versions = {name: metadata.version(name) for name in ("torch", "pillow", "numpy")}
    made = {"device": task.device.type, "decoder": jpeg.decoder(task.decoder).name, **versions}
    index = task.images.index(0)
    views = _draw(task, index)
    first = replace(_cuts(task, 0, views), per_item=_COMPARED if task.device.type == "cuda" else _COMPARED_SLOWLY)[0]
    pixels = _jittered(task, index, views, first)[:: task.num_views]
    return {**made, "tokens_changed_against_fp32": changed_tokens(task.tokenizer, pixels)}


class _Finished:
    """Which shards of the task have their token file, by whichever process."""

    def __init__(self, task: Task):
        self.task = task
        self.known: set[int] = set()

    def finished(self, number: int) -> bool:
        """Raises ConfigError when the file there belongs to another tokenizer, view policy or image set."""
        shard = self.task.images.manifest.shards[number]
        path = token_path(self.task.folder, shard.name)
        if number not in self.known and path.exists():
            if open_token_shard(path).metadata.get("stamp") != self.task.stamp(shard)["stamp"]:
                raise ConfigError(
                    f"{path} was made by another tokenizer, at another precision, with other view settings, or from "
                    f"other images; "
                    f"choose another folder for these tokens, or remove {self.task.folder}"
                )
            self.add(number)
        return number in self.known

    def add(self, number: int) -> None:
        self.known.add(number)

    def views(self) -> int:
        """Views finished by all processes together."""
        shards = self.task.images.manifest.shards
        return sum(shards[n].samples for n in range(len(shards)) if self.finished(n)) * self.task.num_views


@contextlib.contextmanager
def _claimed(task: Task, name: str) -> Iterator[bool]:
    """Whether this process may work on a shard; the claim ends with the process, however it ends."""
    with open(task.folder / f"{name}.claim", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@torch.no_grad()
def _tokenize_shard(config: Config, task: Task, number: int, progress: Progress | Silent) -> None:
    """Draw K views of every image, cut, jitter, tokenize, write."""
    index, shard = task.images.index(number), task.images.manifest.shards[number]
    views = _draw(task, index)
    rows, columns = task.identity["grid"]
    tokens = np.zeros((task.num_views, len(index), rows * columns), dtype=np.uint16)
    bad = np.zeros(len(index), dtype=np.uint8)
    cuts = _cuts(task, number, views)
    for item in load_view_batches(cuts, workers=config.loader.workers, prefetch=config.loader.prefetch):
        at = item.rows.numpy()
        with autocast_as(task.precision, task.device):
            found = task.tokenizer.tokenize(_jittered(task, index, views, item)).cpu().numpy()
        tokens[:, at] = found.reshape(len(at), task.num_views, -1).swapaxes(0, 1)
        bad[at] = item.bad.numpy()
        for row, reason in item.reasons.items():
            say(
                f"{shard.name} {index.key(row)}: cannot be read ({reason}); it gets no tokens, another stands in for it"
            )
        progress.advance(len(at) * task.num_views)
    tokens[:, bad == 1] = 0
    write_token_shard(token_path(task.folder, shard.name), tokens, views, index.key_hash, bad, task.stamp(shard))


def _cuts(task: Task, number: int, views: Views) -> ShardViews:
    height, width = task.identity["input_size"]
    return ShardViews(
        images=task.images,
        shard=number,
        views=views,
        size=(height, width),
        resample=task.identity["filter"],
        per_item=_IMAGES_PER_ITEM,
        decoder=task.decoder,
    )


def _jittered(task: Task, index: Index, views: Views, item: ViewBatch) -> torch.Tensor:
    """Pixels f32 [n · K, 3, H, W] in [0, 1] on the task's device, the K views of an image one after the other."""
    at = item.rows.numpy()
    jitters = torch.from_numpy(views.jitters[:, at]).transpose(0, 1).flatten(0, 1)
    orders = torch.from_numpy(views.orders[:, at].astype(np.int64)).t().flatten()
    pivots = torch.from_numpy(views.levels[:, at, 2]).t().flatten()
    return jitter(*(tensor.to(task.device) for tensor in (item.pixels.flatten(0, 1), jitters, orders, pivots)))


def _draw(task: Task, index: Index) -> Views:
    """Views with leading [K, samples]; an unreadable image (0 × 0) gets the box of a single pixel."""
    images = index.width.clip(1), index.height.clip(1), index.greys
    drawn = [draw_views(task.policy, index.key_hash, k, *images) for k in range(task.num_views)]
    return Views(*(np.stack([getattr(view, name) for view in drawn]) for name in FIELDS))
