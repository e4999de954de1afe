"""What a manifest says: the shards of a set, and what is known of all of them together."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeGuard, TypeVar

import numpy as np
import xxhash

from beitforge.shards.format.columns import Shards, column_of

BAD = "bad"  # in made_by of adopted sets: how many of their images do not decode
UNREADABLE = "unreadable"  # in provenance: how many images `tokenize` could not read that were not known to be bad


@dataclass(frozen=True, kw_only=True)
class ImageShard:
    """One tar. `samples` counts rows of its index, `bytes` is the tar's size, digests are xxh3-128 of whole files;
    checks_digest: of the checksums at its index's end, empty in sets of earlier versions, which have none."""

    name: str
    samples: int
    bytes: int
    digest: str
    index_digest: str
    checks_digest: str = ""


Entry = TypeVar("Entry", ImageShard, "TokenShard")


@dataclass(frozen=True, kw_only=True)
class _Listed(Generic[Entry]):
    """What manifests have in common: their shards, a list or shards.format.columns.Shards."""

    shards: Sequence[Entry]

    def column(self, name: str) -> np.ndarray:
        """A field of every shard: i64 [shards], or a text in bytes each."""
        return column_of(self.shards, name)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Samples of each shard, i64 [shards]."""
        return self.column("samples")

    @functools.cached_property
    def samples(self) -> int:
        return int(self.counts.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names, order, counts and contents of the set in 32 hex digits."""
        if isinstance(self.shards, Shards) and (known := self.shards.fingerprint(self.beside)):
            return known
        lines = [self.beside] if self.beside else []
        lines += [f"{shard.name} {shard.samples} {shard.digest}" for shard in self.shards]
        return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())

    @property
    def beside(self) -> str:
        """What the fingerprint is of beside the shards."""
        return ""


@dataclass(frozen=True, kw_only=True)
class ImageManifest(_Listed[ImageShard]):
    """An image shard set: tars `NAME.tar` with `NAME.index.safetensors` beside them."""

    classes: list[str]
    made_by: dict


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One token file and the image shard (same name) whose rows it follows. checks_digest: xxh3-128 of its rows'
    checksums, empty in sets of earlier versions, which have none."""

    name: str
    samples: int
    digest: str
    image_digest: str
    checks_digest: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenManifest(_Listed[TokenShard]):
    """A token shard set: `NAME.safetensors` per image shard.

    `tokenizer` holds fingerprint, vocabulary, grid and input_size; `policy` is the view policy as drawn; `provenance`
    is for people (versions, decoder, precision).
    """

    tokenizer: dict
    policy: dict
    num_views: int
    provenance: dict

    @property
    def beside(self) -> str:
        return json.dumps([self.tokenizer, self.policy, self.num_views], sort_keys=True)


def known_bad(manifest: ImageManifest) -> int | None:
    """How many images of a set do not decode, as was known when it was made: none of a packed one; None for a set that
    an earlier version adopted, whose indexes alone say it."""
    found = manifest.made_by.get(BAD, None if manifest.made_by.get("verb") == "index" else 0)
    return found if is_natural(found) else None


def unreadable(manifest: TokenManifest) -> int | None:
    """How many images `tokenize` could not read though nothing was known against them, which it held against the budget
    of bad samples; None for a set of an earlier version."""
    found = manifest.provenance.get(UNREADABLE)
    return found if is_natural(found) else None


def is_natural(value: object) -> TypeGuard[int]:
    """Whether a value is a count, or none, that every program can write down."""
    return type(value) is int and 0 <= value < 2**53
