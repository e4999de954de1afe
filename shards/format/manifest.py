"""manifest.json: what closes a shard set. Written last, by rename; a folder without one is unfinished.

Schema 1. An image set lists its tars and their indexes; a token set lists its safetensors files and, for each, the
digest of the image shard it was made from.
"""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.files import write_text
from beitforge.shards.storage.remote import FETCHES, Missing, Remote, is_url
from beitforge.shards.storage.staging import refuse_other_file
from beitforge.shards.wording import with_article

SCHEMA = 1
NAME = "manifest.json"

_LEAST_BYTES = 512  # of a sample in a tar: the header of its image


@dataclass(frozen=True, kw_only=True)
class ImageShard:
    """One tar. `samples` counts rows of its index, `bytes` is the tar's size, digests are xxh3-128 of whole files."""

    name: str
    samples: int
    bytes: int
    digest: str
    index_digest: str


@dataclass(frozen=True, kw_only=True)
class ImageManifest:
    """An image shard set: tars `NAME.tar` with `NAME.index.safetensors` beside them."""

    shards: list[ImageShard]
    classes: list[str]
    made_by: dict

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Names, order, counts and contents of the set in 32 hex digits."""
        text = "\n".join(f"{shard.name} {shard.samples} {shard.digest}" for shard in self.shards)
        return xxhash.xxh3_128_hexdigest(text.encode())


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One token file and the image shard (same name) whose rows it follows. checks_digest: xxh3-128 of its rows'
    checksums, empty in sets of earlier versions, which have none."""

    name: str
    samples: int
    digest: str
    image_digest: str
    checks_digest: str = ""


Entry = TypeVar("Entry", ImageShard, TokenShard)


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """A token shard set: `NAME.safetensors` per image shard.

    `tokenizer` holds fingerprint, vocabulary, grid and input_size; `policy` is the view policy as drawn; `provenance`
    is for people (versions, decoder, precision).
    """

    shards: list[TokenShard]
    tokenizer: dict
    policy: dict
    num_views: int
    provenance: dict

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Tokenizer, view policy and contents of the set in 32 hex digits."""
        head = json.dumps([self.tokenizer, self.policy, self.num_views], sort_keys=True)
        text = "\n".join([head, *(f"{shard.name} {shard.samples} {shard.digest}" for shard in self.shards)])
        return xxhash.xxh3_128_hexdigest(text.encode())


def write_manifest(folder: Path, manifest: ImageManifest | TokenManifest) -> None:
    """Close a folder: write its manifest by rename."""
    kind = "images" if isinstance(manifest, ImageManifest) else "tokens"
    content = {"schema": SCHEMA, "kind": kind, **dataclasses.asdict(manifest)}
    content["digest"] = _digest(content)
    write_text(folder / NAME, json.dumps(content, indent=1) + "\n")


def refuse_other_manifest(folder: Path) -> None:
    """Raise ShardError when the folder has a manifest.json of another program, which would be replaced."""
    refuse_other_file(folder / NAME, b'"schema": ', b'"made_by": ', b'"tokenizer": ')


def _entries(kind: type[Entry], content: object) -> list[Entry]:
    """The shards of a manifest. Raises TypeError where they are not what their fields ask for: a wrong count would
    change the order of the whole set, or leave a shard out of it without a word."""
    _demand(isinstance(content, list) and bool(content), "shards", content)
    entries = [kind(**shard) for shard in content]  # type: ignore[attr-defined]
    for entry in entries:
        for field in dataclasses.fields(entry):
            value = getattr(entry, field.name)
            _demand(_is_count(value) if field.type is int else isinstance(value, str), field.name, value)
    return entries


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**53


def _demand(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise TypeError(f"{name} is {str(value)[:40]!r}")


def _read_object(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


def _read(folder: Path | str, kind: str, cure: str) -> dict:
    path = f"{folder}/{NAME}"
    if not is_url(folder) and not Path(folder).is_dir():
        raise ShardError(f"{folder} does not exist; {with_article(kind[:-1])} shard set is expected there: {cure}")
    try:
        content = _fetched(Remote(str(folder))) if is_url(folder) else json.loads(Path(path).read_bytes())
    except (FileNotFoundError, Missing) as error:
        raise ShardError(f"{folder} has no {NAME}, so it is unfinished: {cure}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} is damaged ({error}): {cure}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ShardError(f"{path} is not of schema {SCHEMA}, the one this version reads: {cure}")
    if content.get("digest", "") not in ("", _digest(content)):
        raise ShardError(f"{path} is damaged (its digest differs): {cure}")
    if content.get("kind") != kind:
        raise ShardError(f"{folder} holds {content.get('kind')}, not {kind}: give the folder of the {kind}")
    return content


def _digest(content: dict) -> str:
    """xxh3-128 of everything else in a manifest; those of earlier versions have none."""
    others = {name: value for name, value in content.items() if name != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(others, sort_keys=True).encode())


def _fetched(remote: Remote) -> object:
    """A remote manifest; one that comes damaged is fetched again."""
    for _ in range(FETCHES - 1):
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            content = json.loads(remote.whole(NAME))
            if not isinstance(content, dict) or content.get("digest", "") in ("", _digest(content)):
                return content
    return json.loads(remote.whole(NAME))


def kind_of(folder: Path) -> str:
    """What a folder's manifest says it holds, images or tokens. Raises ShardError when there is no manifest."""
    path = folder / NAME
    if folder.is_dir() and not path.exists():
        below = sorted(inner.parent.name for inner in folder.glob(f"*/{NAME}"))
        if below:
            raise ShardError(f"{folder} is no shard set itself, but {', '.join(below)} in it are: give one of them")
        raise ShardError(f"{folder} has no {NAME}, so it is unfinished: run the command that makes it again")
    content = _read_object(path) if folder.is_dir() else None
    if content is None or content.get("kind") not in ("images", "tokens"):
        raise ShardError(f"{path} is missing, damaged, or of another program: give the folder of a shard set")
    return content["kind"]


def read_image_manifest(folder: Path | str) -> ImageManifest:
    """The manifest of the image shard set in a folder or behind a URL. Raises ShardError where there is none, or one
    of something else."""
    cure = "finish it with `pack` (the same command again), or adopt its tars with `index`"
    content = _read(folder, "images", cure)
    try:
        shards, classes, made_by = _entries(ImageShard, content["shards"]), content["classes"], content["made_by"]
        for shard in shards:
            _demand(shard.samples * _LEAST_BYTES <= shard.bytes, f"{shard.name}: samples", shard.samples)
        _demand(isinstance(classes, list) and all(isinstance(name, str) for name in classes), "classes", classes)
        _demand(isinstance(made_by, dict), "made_by", made_by)
        return ImageManifest(shards=shards, classes=classes, made_by=made_by)
    except (KeyError, TypeError) as error:
        raise ShardError(f"{folder}/{NAME} is not what schema {SCHEMA} asks for ({error}): {cure}") from error


def read_token_manifest(folder: Path | str) -> TokenManifest:
    """The manifest of the token shard set in a folder or behind a URL. Raises ShardError where there is none, or one
    of something else."""
    cure = "finish it with `tokenize` (the same command again)"
    content = _read(folder, "tokens", cure)
    try:
        fields = {key: content[key] for key in ("tokenizer", "policy", "num_views", "provenance")}
        for key in ("tokenizer", "policy", "provenance"):
            _demand(isinstance(fields[key], dict), key, fields[key])
        grid, vocabulary = fields["tokenizer"]["grid"], fields["tokenizer"]["vocabulary"]
        _demand(isinstance(grid, list) and len(grid) == 2 and all(map(_is_count, grid)), "tokenizer.grid", grid)
        _demand(_is_count(vocabulary), "tokenizer.vocabulary", vocabulary)
        _demand(_is_count(fields["num_views"]), "num_views", fields["num_views"])
        return TokenManifest(shards=_entries(TokenShard, content["shards"]), **fields)
    except (KeyError, TypeError) as error:
        raise ShardError(f"{folder}/{NAME} is not what schema {SCHEMA} asks for ({error}): {cure}") from error
