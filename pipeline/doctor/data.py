"""What `doctor` asks of the data as a host sees it: sets whole and paired, digests, room, how fast it reads.

Must not know deepspeed, the model or any stage.
"""

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from beitforge.pipeline.cluster.environment import RankInfo
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.batches import lanes_advice, training_batches
from beitforge.pipeline.data.known_bad import known_lines
from beitforge.pipeline.data.labelled import labelled
from beitforge.pipeline.data.pretraining import DataSource, heldout, image_set, pretraining, refuse_other_tokenizers
from beitforge.pipeline.doctor.equal import equal_images
from beitforge.pipeline.doctor.findings import OK, STOP, WARNING, Local
from beitforge.pipeline.errors import ConfigError
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import count_regions, index_path
from beitforge.shards.lanes import window_samples
from beitforge.shards.storage.remote import Remote, cache_for, is_url
from beitforge.shards.stream.image_set import DamagedSample, ImageSet, KnownBad
from beitforge.shards.stream.view_sources import RecordedViews

_REPACK = "restore it from where the set was copied from, or pack again; `verify` lists every difference"
_RETOKENIZE = "run `tokenize` with this config and image set, or point data.tokens at the folder made from it"
_READ_BYTES = 256 << 20
_PART = 4 << 20


def sets(config: Config, seconds: float, local: Local) -> DataSource | None:
    """Both sets of training and, where there are, of held-out images, and the labelled ones; the training stream when
    it can be read.

    seconds: half for opening shards, a third for reading some of their rows, the rest for finding equal images.
    """
    source = _pair(config, config.data.images, ("images", "tokens"), lambda: pretraining(config), local)
    if source is not None:
        _whole("images", source, seconds / 3, local)
        _digests(source, seconds / 3, local)
    try:
        refuse_other_tokenizers(config)
    except (ShardError, ConfigError) as error:
        local.add(STOP, "tokens", str(error), _RETOKENIZE, whole_host=True)
    if config.data.heldout_images:
        both = ("held-out", "held-out")
        apart = _pair(config, config.data.heldout_images, both, lambda: heldout(config), local)
        if apart is not None:
            _whole("held-out", apart, seconds / 12, local)
    _labelled(config, seconds / 12, local)
    equal_images(config, seconds / 6, local)
    return source


def _labelled(config: Config, seconds: float, local: Local) -> None:
    """The sets that k-NN inside the run reads: there, labelled, whole."""
    for where in filter(None, (config.data.labelled_images, config.data.labelled_test)):
        try:
            source = labelled(config, where, 1)
        except (ShardError, ConfigError) as error:
            local.add(STOP, "labelled", str(error), _REPACK, whole_host=True)
            continue
        _whole("labelled", source, seconds / 2, local)


def _pair(
    config: Config, images: str, checks: tuple[str, str], opened: Callable[[], DataSource], local: Local
) -> DataSource | None:
    """A set, then the set with its tokens, by their manifests."""
    try:
        image_set(config, images)
    except ShardError as error:
        local.add(STOP, checks[0], str(error), _REPACK, whole_host=True)
        return None
    try:
        source = opened()
    except (ShardError, ConfigError) as error:
        local.add(STOP, checks[1], str(error), _RETOKENIZE, whole_host=True)
        return None
    local.add(OK, checks[1], f"fit their images: {source.tokens[:32]}", whole_host=True)
    return source


def _whole(check: str, source: DataSource, seconds: float, local: Local) -> None:
    """Every tar is there with its size; indexes and token rows are opened as far as time allows, in random order."""
    images, until = source.stream.images, time.monotonic() + seconds
    missing = [] if isinstance(images.folder, Remote) else _missing(images.folder, images)
    for problem in missing[:5]:
        local.add(STOP, check, problem, _REPACK, whole_host=True)
    if len(missing) > 5:
        local.add(STOP, check, f"and {len(missing) - 5} more of its files", _REPACK, whole_host=True)
    numbers = list(range(len(images.manifest.shards)))
    random.Random(local.host).shuffle(numbers)
    opened = problems = regions = 0
    bad = {problem.partition(": ")[0] for problem in missing}
    for number in (n for n in numbers if images.manifest.shards[n].name not in bad):
        if time.monotonic() > until or problems >= 3:
            break
        opened += 1
        if _opens(check, source, number, local):
            regions += count_regions(images.index(number).flags)
        else:
            problems += 1
    if not missing and not problems:
        size = int(images.manifest.column("bytes").sum())
        what = f"{len(numbers)} shards, {len(images)} images, {size / 2**30:.2f} GiB; {opened} opened"
        what += f", {regions} of their images with fast regions" if regions else ""
        local.add(OK, check, what, whole_host=True)
        for line in known_lines(source):
            local.add(OK, check, line, whole_host=True)


def _missing(folder: Path, images: ImageSet) -> list[str]:
    found = []
    for shard in images.manifest.shards:
        for path, size in ((folder / f"{shard.name}.tar", shard.bytes), (index_path(folder, shard.name), 0)):
            try:
                there = path.stat().st_size
            except OSError as error:
                found.append(f"{shard.name}: {path} is missing ({error.strerror})")
                continue
            if size and there != size:
                found.append(f"{shard.name}: {path} has {there} bytes, the manifest says {size}")
    return found


def _opens(check: str, source: DataSource, number: int, local: Local) -> bool:
    """Index and tokens of a shard against the manifests and each other."""
    images, views = source.stream.images, source.stream.source
    try:
        index = images.index(number)
    except ShardError as error:
        local.add(STOP, check, str(error), _REPACK, whole_host=True)
        return False
    try:
        if isinstance(views, RecordedViews):
            views.tokens.shard(number, index.key_hash)
    except ShardError as error:
        local.add(STOP, "tokens" if check == "images" else check, str(error), _RETOKENIZE, whole_host=True)
        return False
    return True


def _digests(source: DataSource, seconds: float, local: Local) -> None:
    """Images and token rows at random against their checksums, for as long as there is time, 256 at most."""
    images, views = source.stream.images, source.stream.source
    draw, looked = random.Random(f"{local.host} {time.time_ns()}"), 0
    damaged: list[str] = []
    until = time.monotonic() + seconds
    while looked < 256 and time.monotonic() < until and len(damaged) < 3:
        shard = draw.randrange(len(images.manifest.shards))
        row = draw.randrange(images.manifest.shards[shard].samples)
        looked += 1
        try:
            key_hash = images.index(shard).key_hash
            images.read(shard, row)
            if isinstance(views, RecordedViews):
                opened = views.tokens.shard(shard, key_hash)
                opened.row(draw.randrange(views.tokens.manifest.num_views), row)
        except KnownBad:
            continue
        except DamagedSample as error:
            damaged.append(str(error))
        except ShardError as error:
            if not any(finding.level == STOP for finding in local.found):
                local.add(STOP, "digests", str(error), _RETOKENIZE, whole_host=True)
            return
    for problem in damaged:
        cure = "run `verify --decode` on the set; repair what it lists, or raise data.bad_sample_budget"
        local.add(WARNING, "digests", problem, cure, whole_host=True)
    if not damaged:
        local.add(OK, "digests", f"{looked} random images are what was packed", whole_host=True)


def check_disk_space(config: Config, checkpoint_bytes: int, local: Local) -> None:
    """Room for checkpoints in the run folder, as this host sees it, and for the cache where a set is remote."""
    run, keep = Path(config.train.run), config.checkpoint.keep
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run) as file:
            file.write(b"\0" * 65536)
        kept = sum(path.stat().st_size for path in run.glob("checkpoints/step-*/**/*") if path.is_file())
        free = shutil.disk_usage(run).free
    except OSError as error:
        local.add(
            STOP, "disk", f"{run} cannot be written: {error.strerror}", "free some space, or correct its permissions"
        )
        return
    one, all_of_them = checkpoint_bytes * 1.02, checkpoint_bytes * 1.02 * (keep + 1)
    what = f"{_size(free)} free in {run}; a checkpoint takes {_size(one)}, {keep} are kept"
    cure = "make room, keep fewer (checkpoint.keep), or choose another train.run"
    level = STOP if free + kept < 2 * one else WARNING if free + kept < all_of_them else OK
    local.add(level, "disk", what, cure if level != OK else "", value=_size(free), whole_host=True)
    data = config.data
    judged = (data.heldout_images, data.heldout_tokens, data.labelled_images, data.labelled_test)
    for where in filter(is_url, (data.images, data.tokens, *judged)):
        _cache_room(config, where, local)
        return


def _cache_room(config: Config, where: str, local: Local) -> None:
    """What the cache takes: less than data.cache_gb where its disk has no more."""
    try:
        cache = cache_for(where, config.data.cache, config.data.cache_gb)
    except ShardError as error:
        local.add(STOP, "cache", str(error), "", whole_host=True)
        return
    assert cache is not None, "a URL is read through a cache"
    enough = cache.limit >= int(config.data.cache_gb * 1e9)
    cure = "" if enough else "give it another disk (data.cache), or less (data.cache_gb)"
    what = f"{_size(cache.limit)} for the cache in {cache.folder}, of data.cache_gb {config.data.cache_gb:g}"
    local.add(OK if enough else WARNING, "cache", what, cure, whole_host=True)


def check_lanes(config: Config, source: DataSource, place: RankInfo, local: Local) -> None:
    """How often all nodes together read a remote set, and whether the cache holds what a node reads at a time."""
    images, loader = source.stream.images, config.loader
    if not isinstance(images.folder, Remote):
        return
    if all(advice := lanes_advice(config, source, place.size)):
        local.add(WARNING, "lanes", *advice, whole_host=True)
    kept = window_samples(len(images), loader.chunk, loader.window, loader.lanes, place.size, place.local_size)
    needed = 2 * kept * int(images.manifest.column("bytes").sum()) // len(images)
    if needed > (room := int(config.data.cache_gb * 1e9)):
        what = f"two windows of this node's lanes are {_size(needed)}, and data.cache_gb is {_size(room)}"
        cure = f"set data.cache_gb={-(-needed // 10**9)}, or a smaller loader.window in a run that has not begun"
        local.add(WARNING, "cache", f"{what}: less is fetched ahead", cure, whole_host=True)


def measure_read(config: Config, source: DataSource, seconds: float, local: Local) -> float:
    """Bytes a second out of the tars, in parts of 4 MiB from random places, past the page cache where it lets us."""
    images = source.stream.images
    draw, done, started = random.Random(f"read {local.host}"), 0, time.monotonic()
    try:
        while done < _READ_BYTES and time.monotonic() - started < seconds:
            shard = images.manifest.shards[draw.randrange(len(images.manifest.shards))]
            start = draw.randrange(max(1, shard.bytes - _PART))
            done += _read(images.folder, f"{shard.name}.tar", start, min(start + _PART, shard.bytes))
    except (OSError, ShardError) as error:
        local.add(STOP, "storage", f"{config.data.images} cannot be read: {error}", _REPACK, whole_host=True)
        return 0.0
    rate = done / max(time.monotonic() - started, 1e-6)
    mean = int(images.manifest.column("bytes").sum()) / len(images)
    what = f"{_size(rate)}/s from {config.data.images}, {rate / mean:.0f} images a second for all of this host"
    local.add(OK, "storage", what, value=f"{_size(rate)}/s", whole_host=True)
    return rate / mean


def _read(folder: Path | Remote, name: str, start: int, stop: int) -> int:
    if isinstance(folder, Remote):
        return len(folder.part(name, start, stop))
    descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
        return len(os.pread(descriptor, stop - start, start))
    finally:
        os.close(descriptor)


def measure_loader(config: Config, source: DataSource, micro: int, place: RankInfo, seconds: float) -> float:
    """Images a second that the loader of one rank gives, while those of the others run; the first batch apart."""
    batches = training_batches(
        config,
        source,
        first_sample=0,
        global_batch=micro * place.size,
        micro=micro,
        rank=place.rank,
        world=place.size,
        steps=1 << 20,
    )
    with contextlib.closing(batches):  # type: ignore[type-var]
        next(batches)
        images, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            images += len(next(batches).samples)
        return images / (time.perf_counter() - started)


def _size(number: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 1024:.0f} KiB"
