"""manifest.json: what closes a shard set. Written last, by rename; a folder without one is unfinished.

Schema 1. An image set lists its tars and their indexes; a token set lists its safetensors files and, for each, the
digest of the image shard it was made from.
"""

import dataclasses
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar

import xxhash

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.storage.files import write_text
from beitforge.shards.storage.reading import forget, parse_json, read_whole
from beitforge.shards.storage.remote import Missing, Remote, is_url
from beitforge.shards.storage.retry import reread, retry
from beitforge.shards.storage.staging import refuse_other_file
from beitforge.shards.wording import with_article

SCHEMA = 1
NAME = "manifest.json"
BAD = "bad"  # in made_by of adopted sets: how many of their images do not decode
UNREADABLE = "unreadable"  # in provenance: how many images `tokenize` could not read that were not known to be bad
PACKING = "packing.json"  # marks a folder that `pack` has not finished

_MOST_BYTES = 1 << 26  # of a manifest: over 300,000 shards
_MOST_NAME = 200  # bytes of a shard's name
_MOST_VOCABULARY = 1 << 16  # tokens are u16
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl", ".jfif")
_MOST_LOOKED = 10_000  # files of a folder that is no shard set
_SHOWN = 5
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


_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

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


def known_bad(manifest: ImageManifest) -> int | None:
    """How many images of a set do not decode, as was known when it was made: none of a packed one; None for a set that
    an earlier version adopted, whose indexes alone say it."""
    found = manifest.made_by.get(BAD, None if manifest.made_by.get("verb") == "index" else 0)
    return found if _is_natural(found) else None


def unreadable(manifest: TokenManifest) -> int | None:
    """How many images `tokenize` could not read though nothing was known against them, which it held against the budget
    of bad samples; None for a set of an earlier version."""
    found = manifest.provenance.get(UNREADABLE)
    return found if _is_natural(found) else None


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
            _demand(_is_count(value) if field.type is int else is_plain(value), field.name, value)
        _demand(is_file_name(entry.name), "name", entry.name)
    _demand(len({entry.name for entry in entries}) == len(entries), "shards", "a list that has a name twice")
    _demand(_is_count(sum(entry.samples for entry in entries)), "samples", "more than can be counted")
    return entries


def is_file_name(name: str) -> bool:
    """Whether a shard may have this name: that of a file in the set's own folder, which can be printed."""
    return is_plain(name) and "/" not in name and name not in ("", ".", "..") and len(name.encode()) <= _MOST_NAME


def is_plain(value: object) -> bool:
    """Whether a value is a text on one line that every terminal and file system takes."""
    return isinstance(value, str) and _ODD.search(value) is None


def _is_count(value: object) -> bool:
    return _is_natural(value) and value > 0


def _is_natural(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def _demand(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise TypeError(f"{name} is {str(value)[:40]!r}")


def _read(folder: Path | str, kind: str, cure: str) -> dict:
    path = f"{folder}/{NAME}"
    if not is_url(folder) and not Path(folder).is_dir():
        raise ShardError(f"{folder} does not exist; {with_article(kind[:-1])} shard set is expected there: {cure}")

    def once() -> dict:
        """Its content; Damaged where it is not as it was written, which may be the reading's doing."""
        remote = Remote(str(folder)) if is_url(folder) else None
        data = remote.whole(NAME, _MOST_BYTES) if remote else read_whole(Path(path), _MOST_BYTES)
        try:
            content = parse_json(data)
            if not isinstance(content, dict) or content.get("schema") != SCHEMA:
                raise Damaged(f"it is not of schema {SCHEMA}, the one this version reads")
            if content.get("digest", "") not in ("", _digest(content)):
                raise Damaged("its digest differs")
        except (Damaged, RecursionError) as error:
            raise Damaged(f"{path} is damaged, or of another version ({error}): {cure}") from error
        return content

    def read() -> dict:
        try:
            return reread(once, None if is_url(folder) else lambda: forget(Path(path)))
        except Missing as error:
            raise ShardError(f"{folder} has no {NAME}, so it is unfinished: {cure}") from error
        except FileNotFoundError as error:
            raise ShardError(_instead(Path(folder), cure)) from error

    content = retry(read, path)
    if content.get("kind") != kind:
        held = str(content.get("kind"))[:40]
        raise ShardError(f"{folder} holds {held}, not {kind}: give the folder of the {kind}")
    return content


def _digest(content: dict) -> str:
    """xxh3-128 of everything else in a manifest; those of earlier versions have none."""
    others = {name: value for name, value in content.items() if name != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(others, sort_keys=True).encode())


def kind_of(folder: Path) -> str:
    """What a folder's manifest says it holds, images or tokens. Raises ShardError when there is no manifest."""
    path = folder / NAME
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ShardError(f"{folder} {found}: give the folder of a shard set")
    if not path.exists():
        raise ShardError(_instead(folder, "run the command that makes it again"))
    try:
        content = parse_json(read_whole(path, _MOST_BYTES))
    except (OSError, Damaged):
        content = None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind not in ("images", "tokens"):
        raise ShardError(f"{path} is missing, damaged, or of another program: give the folder of a shard set")
    return str(kind)


def _instead(folder: Path, cure: str) -> str:
    """What a folder without a manifest is, and what to do about it; `cure` is for an unfinished set."""
    if below := sorted(inner.parent.name for inner in folder.glob(f"*/{NAME}")):
        return f"{folder} is no shard set itself, but {_some(below)} in it are: give one of them"
    names = sorted(path.name for path in itertools.islice(folder.iterdir(), _MOST_LOOKED))
    if PACKING in names:
        return f"{folder} holds an unfinished packing: finish it with `pack` (the same command again)"
    if any(name.endswith(".tar") for name in names):
        return f"{folder} holds tars and no {NAME}: `index` adopts them or says what they lack"
    files = (inner for _, _, found in os.walk(folder) for inner in found)
    if image := next((one for one in itertools.islice(files, _MOST_LOOKED) if one.lower().endswith(_IMAGES)), ""):
        return f"{folder} holds images ({image}) and is no shard set: make one of them with `pack {folder} SHARDS`"
    held = f"it holds {_some(names)}" if names else "it is empty"
    return f"{folder} has no {NAME}, so it is unfinished, or no shard set ({held}): {cure}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


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
    except (KeyError, TypeError, RecursionError) as error:
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
        _demand(_is_count(vocabulary) and vocabulary <= _MOST_VOCABULARY, "tokenizer.vocabulary", vocabulary)
        _demand(_is_count(fields["num_views"]), "num_views", fields["num_views"])
        return TokenManifest(shards=_entries(TokenShard, content["shards"]), **fields)
    except (KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{folder}/{NAME} is not what schema {SCHEMA} asks for ({error}): {cure}") from error
