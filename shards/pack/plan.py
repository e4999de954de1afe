"""Which image goes into which shard: decided before any is read, so that a killed packing goes on as it began."""

import argparse
import dataclasses
import json
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from beitforge.shards import counter_rng
from beitforge.shards.decode.jpegtran import check_tool
from beitforge.shards.errors import ShardError
from beitforge.shards.pack.encode import EncodeOptions
from beitforge.shards.pack.listing.equal_files import first_equals
from beitforge.shards.pack.listing.image_files import FIRST_EXTENSIONS, ImageFiles, list_images
from beitforge.shards.pack.listing.labels import Labels, labels_of, labels_of_format_1

REST = "train"

# Part of every plan: raise it when the same options no longer give the same bytes. Format 1 listed images by eight
# extensions, took any first sub-folders for classes, split by key alone, and made 8-bit RGB of any image; a packing
# begun by it ends by it.
FORMAT, FIRST_FORMAT = 2, 1
_SINCE_FORMAT_1 = ("to_rgb8",)  # options that it did not know
# Options that format 2 did not know at first: a plan names them where they are not at these values, and is otherwise
# the plan it was without them.
_LATER = {"subsampling": "444", "fast_regions": False}
_ENCODING = tuple(one.name for one in dataclasses.fields(EncodeOptions))


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Everything that decides what a packed set holds. `splits` are (name, fraction); the rest goes to `train`."""

    name: str = "shard"
    samples_per_shard: int = 1000
    labels: str = "auto"
    splits: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    encoding: EncodeOptions = field(default_factory=EncodeOptions)

    def recorded(self) -> dict:
        """The options as manifests name them."""
        values = dataclasses.asdict(self)
        values["picture"] = {name: value for name, value in values.pop("encoding").items() if value != _LATER.get(name)}
        return values


@dataclass(frozen=True)
class PlannedImage:
    """One image on its way into a tar. label -1: the set has no classes."""

    path: str
    key: str
    label: int


@dataclass(frozen=True, kw_only=True)
class ShardPlace:
    """Where a shard of a plan goes, by which it is known when it is finished."""

    folder: Path
    name: str
    plan: str


@dataclass(frozen=True, kw_only=True)
class ShardJob(ShardPlace):
    """All a worker needs to pack one shard. At most `max_rejected` of its images may be unreadable."""

    images: Path
    planned: list[PlannedImage]
    options: EncodeOptions
    max_rejected: int


@dataclass(frozen=True)
class Plan:
    """A packing decided.

    `orders` has the numbers of the images, in shard order, for each folder below the target ("": the target itself).
    `why_labels` says how the classes were decided; `format` is FORMAT, or FIRST_FORMAT for a packing begun by it.
    """

    images: Path
    target: Path
    options: PackOptions
    files: ImageFiles
    classes: list[str]
    labels: np.ndarray
    orders: dict[str, np.ndarray]
    fingerprint: str
    why_labels: str
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        return sum(-(-len(order) // self.options.samples_per_shard) for order in self.orders.values())

    def folder(self, split: str) -> Path:
        return self.target / split if split else self.target

    def describe(self) -> dict:
        """What manifests and the marker of an unfinished packing keep of the plan."""
        options = _recorded(self.options, self.format)
        told = {"verb": "pack", "plan": self.fingerprint, "options": options, "pictures": len(self.files)}
        return told if self.format == FIRST_FORMAT else {**told, "format": self.format}

    def places(self) -> Iterator[tuple[ShardPlace, np.ndarray]]:
        """Every shard of every split, in order, with the numbers of its images."""
        step = self.options.samples_per_shard
        for split, order in self.orders.items():
            for number, start in enumerate(range(0, len(order), step)):
                name = f"{self.options.name}-{number:06d}"
                yield (
                    ShardPlace(folder=self.folder(split), name=name, plan=self.fingerprint),
                    order[start : start + step],
                )

    def jobs(self, max_rejected: int, finished: Container[tuple[Path, str]] = ()) -> Iterator[ShardJob]:
        """The shards that are not finished, by folder and name, in order."""
        encoding = self.options.encoding
        if self.format == FIRST_FORMAT:
            encoding = dataclasses.replace(encoding, to_rgb8=True)
        for place, numbers in self.places():
            if (place.folder, place.name) not in finished:
                yield ShardJob(
                    folder=place.folder,
                    name=place.name,
                    plan=place.plan,
                    images=self.images,
                    planned=[self._planned(i) for i in numbers.tolist()],
                    options=encoding,
                    max_rejected=max_rejected,
                )

    def _planned(self, i: int) -> PlannedImage:
        label = int(self.labels[i]) if len(self.labels) else -1
        return PlannedImage(self.files.paths[i], self.files.key(i), label)


def make_plan(images: Path, target: Path, options: PackOptions, format: int = FORMAT) -> Plan:
    """List the images and decide where each goes. Raises ShardError for what images or options forbid."""
    check_options(options)
    check_folders(images, target)
    first = format == FIRST_FORMAT
    files = list_images(images, target, FIRST_EXTENSIONS if first else ())
    labels: Labels = (labels_of_format_1 if first else labels_of)(files.paths, files.folders, options.labels)
    alone = first or not options.splits
    like = np.arange(len(files)) if alone else first_equals(images, files.paths, files.sizes)
    order = np.argsort(counter_rng.bits(counter_rng.PACK_ORDER, options.seed, files.hashes), kind="stable")
    return Plan(
        images=images,
        target=target,
        options=options,
        files=files,
        classes=labels.classes,
        labels=labels.of,
        orders=_split(order, files.hashes[like], options),
        fingerprint=_fingerprint(files, options, like, format),
        why_labels=labels.why,
        format=format,
    )


def _split(order: np.ndarray, hashes: np.ndarray, options: PackOptions) -> dict[str, np.ndarray]:
    """hashes u64 [n]: what each image is drawn by, the same for images of the same bytes."""
    if not options.splits:
        return {"": order}
    draw = counter_rng.uniform(counter_rng.SPLIT, options.seed, hashes)[order]
    orders: dict[str, np.ndarray] = {}
    low = 0.0
    for name, fraction in options.splits:
        orders[name] = order[(draw >= low) & (draw < low + fraction)]
        low += fraction
    orders[REST] = order[draw >= low]
    for name, members in orders.items():
        if not len(members):
            raise ShardError(f"split {name} would get none of the {len(order)} images: give it a larger fraction")
    return orders


def flat(recorded: dict) -> dict:
    """Every option by its name, of what `PackOptions.recorded` gave."""
    return {**_LATER, **recorded, **recorded.get("picture", {})}


def _recorded(options: PackOptions, format: int) -> dict:
    recorded = options.recorded()
    if format == FIRST_FORMAT:
        recorded["picture"] = {k: v for k, v in recorded["picture"].items() if k not in _SINCE_FORMAT_1}
    return recorded


def _fingerprint(files: ImageFiles, options: PackOptions, like: np.ndarray, format: int) -> str:
    state = xxhash.xxh3_128(json.dumps([format, _recorded(options, format)], sort_keys=True).encode())
    state.update(files.paths.blob)  # a NUL behind each
    state.update(files.sizes.data)
    state.update(files.times.data)
    if format != FIRST_FORMAT:
        state.update(like.data)
    return state.hexdigest()


def check_folders(images: Path, target: Path) -> None:
    """Raises ShardError where there are no images, or they would lie among the shards."""
    if not images.is_dir():
        raise ShardError(f"{images} is not a folder; give the folder that holds the images")
    if target.exists() and not target.is_dir():
        raise ShardError(f"{target} is a file; give a folder for the shard set")
    inner, outer = images.resolve(), target.resolve()
    if inner == outer or outer in inner.parents:
        raise ShardError(f"the images in {images} lie inside the shard folder {target}: choose another shard folder")


def options_of(arguments: argparse.Namespace) -> PackOptions:
    """What the command line of `pack` says. Raises ShardError for a --split that is no NAME=FRACTION."""
    chosen = {name: getattr(arguments, name) for name in _ENCODING}
    return PackOptions(
        name=arguments.name,
        samples_per_shard=arguments.samples_per_shard,
        labels=arguments.labels,
        splits=_splits(arguments.split),
        seed=arguments.seed,
        encoding=EncodeOptions(**chosen),
    )


def _splits(texts: list[str]) -> tuple[tuple[str, float], ...]:
    splits = []
    for text in texts:
        name, _, fraction = text.partition("=")
        try:
            splits.append((name, float(fraction)))
        except ValueError as error:
            raise ShardError(f"--split is {text!r}, it must be NAME=FRACTION such as val=0.02") from error
    return tuple(splits)


def check_options(options: PackOptions) -> None:
    """Raises ShardError naming the option, its value and the rule."""
    encoding = options.encoding
    for name, value, least in (
        ("--samples-per-shard", options.samples_per_shard, 1),
        ("--max-side", encoding.max_side, 0),
        ("--short-side", encoding.short_side, 0),
    ):
        if value < least:
            raise ShardError(f"{name} is {value}, it must be at least {least}")
    if not 1 <= encoding.quality <= 100:
        raise ShardError(f"--quality is {encoding.quality}, it must be from 1 to 100")
    if encoding.fast_regions:
        check_tool()
    names = [name for name, _ in options.splits]
    for flag, name in [("--name", options.name), *(("--split", name) for name in names)]:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
            raise ShardError(f"{flag} has the name {name!r}: letters, digits, - and _ only, so that every reader copes")
    if len({REST, *names}) != len(names) + 1:
        raise ShardError(f"--split names must differ from each other and from {REST}, which gets the rest: {names}")
    if any(not 0 < fraction < 1 for _, fraction in options.splits) or sum(f for _, f in options.splits) >= 1:
        raise ShardError(f"--split fractions must each be above 0 and together below 1: {dict(options.splits)}")
