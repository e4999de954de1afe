"""The same image in another size or compression: by a perceptual hash of the pixels, near in few of its 64 bits.

The hash is pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010); near ones are
found by tables of bits that must agree (G. S. Manku et al., Detecting Near-Duplicates for Web Crawling, 2007).
"""

import contextlib
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.shards.decode import codec
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import index_path, open_index
from beitforge.shards.format.manifest import ImageManifest, ImageShard
from beitforge.shards.pack.tar_scan import TarMember, read_member
from beitforge.shards.progress import Progress
from beitforge.shards.workers import Beat, each_shard

MOST_BITS = 4  # that may differ
_AGREEING = 3  # blocks of bits that then agree, of MOST_BITS + 3
_MOST_GREY, _MOST_ASPECT = 8.0, 0.06  # difference of mean grey, and of the logarithms of width / height
_NEIGHBOURS = 64  # with which an image is compared in each table
_SIDE, _LOW = 32, 8  # the image's, and that of the square of low frequencies
_LUMA = np.array([0.299, 0.587, 0.114])
_DCT = np.cos(np.pi / (2 * _SIDE) * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1))


@dataclass(frozen=True)
class HashJob:
    """One shard of the set of that name, whose images are to be hashed."""

    set: str
    folder: Path
    entry: ImageShard


@dataclass(frozen=True)
class Hashes:
    """Of the n images of a shard that decode: keys, hashes u64, width / height f64, mean grey f32."""

    set: str
    shard: str
    keys: list[str]
    hashes: np.ndarray
    aspects: np.ndarray
    greys: np.ndarray


def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits of uint8 [H, W, 3]: which of the lowest 8 x 8 frequencies are above their median."""
    grey = codec.resize(pixels, (_SIDE, _SIDE), "lanczos") @ _LUMA
    low = np.round(_DCT @ grey @ _DCT.T, 6)  # what is no more than rounding, in a flat image, is nothing
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def hash_shard(job: HashJob, beat: Beat) -> Hashes:
    """Decode and hash every image of a shard; those that do not decode are left out."""
    name = job.entry.name
    index, tar = open_index(index_path(job.folder, name)), job.folder / f"{name}.tar"
    rows, hashes = [], []
    with open(tar, "rb") as file:
        for row in range(len(index)):
            known = index.row(row)
            with contextlib.suppress(ShardError):
                data = read_member(file.fileno(), TarMember(known.image_offset, known.image_size), tar)
                hashes.append(perceptual_hash(codec.decode_whole(data, known.flags)))
                rows.append(row)
            beat(1)
    return Hashes(
        job.set,
        name,
        keys=[index.key(row) for row in rows],
        hashes=np.array(hashes, np.uint64),
        aspects=np.maximum(index.width[rows], 1) / np.maximum(index.height[rows], 1),
        greys=index.mean_grey[rows],
    )


def near_duplicates(sets: dict[str, tuple[Path, ImageManifest]], num_workers: int) -> list[list[tuple[str, str]]]:
    """Groups of images near one another, each image as the name of its set and its key. Decodes every image."""
    jobs = [HashJob(name, folder, entry) for name, (folder, manifest) in sets.items() for entry in manifest.shards]
    total = sum(manifest.samples for _, manifest in sets.values())
    with (
        Progress("duplicates", total, "images") as progress,
        contextlib.closing(each_shard(hash_shard, jobs, min(num_workers, len(jobs)), progress)) as results,
    ):
        found = sorted(results, key=lambda hashes: (hashes.set, hashes.shard))
    images = [(hashes.set, key) for hashes in found for key in hashes.keys]
    hashes, aspects, greys = (
        np.concatenate([getattr(one, name) for one in found]) for name in ("hashes", "aspects", "greys")
    )
    return [[images[i] for i in group] for group in near_groups(hashes, aspects, greys)]


def near_groups(hashes: np.ndarray, aspects: np.ndarray, greys: np.ndarray) -> list[list[int]]:
    """The numbers of n images near one another, by hashes u64 [n], width / height and mean grey f64 [n]."""
    shapes = np.log(aspects)
    # images that agree in all three are one: a set of a million black frames is one image here
    alike = np.stack([np.floor(shapes / _MOST_ASPECT), np.floor(greys / _MOST_GREY)]).astype(np.int64)
    order = np.lexsort((*alike, hashes))
    begins = np.append(True, (np.diff(hashes[order]) != 0) | np.diff(alike[:, order]).any(axis=0))[: len(order)]
    heads = order[begins]
    links = np.stack([heads[np.cumsum(begins) - 1], order], axis=1)
    first, second = heads[near_pairs(hashes[heads])].T
    near = np.abs(shapes[first] - shapes[second]) <= _MOST_ASPECT
    near &= np.abs(greys[first] - greys[second]) <= _MOST_GREY
    return _groups(np.concatenate([links[~begins], np.stack([first[near], second[near]], axis=1)]))


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """i64 [m, 2]: pairs of u64 [n] that differ in at most MOST_BITS bits; of more than 64 that agree in a table's bits,
    each is compared with the 64 after it.

    MOST_BITS differing bits lie in as many of MOST_BITS + 3 blocks at most, so three blocks agree: for every choice of
    three the hashes are sorted by these, and those that agree in them compared.
    """
    edges = np.linspace(0, 64, MOST_BITS + _AGREEING + 1).astype(int).tolist()
    blocks = [((1 << (high - low)) - 1) << low for low, high in itertools.pairwise(edges)]
    found, num = [np.empty(0, np.int64)], len(hashes)
    for agreeing in itertools.combinations(blocks, _AGREEING):
        masked = hashes & np.uint64(sum(agreeing))
        order = np.lexsort((hashes, masked))
        masked, at = masked[order], np.arange(len(order))
        for step in range(1, _NEIGHBOURS + 1):
            at = at[at + step < len(order)]
            at = at[masked[at] == masked[at + step]]
            if not len(at):
                break
            one, other = order[at], order[at + step]
            near = _differing(hashes[one], hashes[other]) <= MOST_BITS
            found.append(np.minimum(one, other)[near] * num + np.maximum(one, other)[near])
        found = [np.unique(np.concatenate(found))]
    return np.stack(np.divmod(found[0], max(1, num)), axis=1)


def _differing(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """i64 [n]: the number of bits in which u64 [n] differ."""
    bits = np.unpackbits((one ^ other).view(np.uint8).reshape(-1, 8), axis=1)
    return bits.sum(axis=1, dtype=np.int64)


def _groups(pairs: np.ndarray) -> list[list[int]]:
    """What pairs connect, in order."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent.setdefault(i, i) != i:
            parent[i] = i = parent[parent[i]]
        return i

    for one, other in pairs.tolist():
        parent[root(other)] = root(one)
    groups = defaultdict(list)
    for i in sorted(parent):
        groups[root(i)].append(i)
    return list(groups.values())
