"""manifest.json: what closes a shard set. Written last, by rename; a folder without one is unfinished.

Schema 1. An image set lists its tars and their indexes; a token set lists its safetensors files and, for each, the
digest of the image shard it was made from. Beside it lies the same as columns (shards.format.columns), which are read
instead wherever the two prove that they belong together.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.format import columns as columnar
from beitforge.shards.format.columns import Shards, is_file_name, is_plain
from beitforge.shards.format.listed import BAD as BAD
from beitforge.shards.format.listed import UNREADABLE as UNREADABLE
from beitforge.shards.format.listed import Entry, ImageManifest, ImageShard, TokenManifest, TokenShard, is_natural
from beitforge.shards.format.listed import known_bad as known_bad
from beitforge.shards.format.listed import unreadable as unreadable
from beitforge.shards.format.unfinished import NAME as NAME
from beitforge.shards.format.unfinished import PACKING as PACKING
from beitforge.shards.format.unfinished import instead
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.files import atomic_path, write_text
from beitforge.shards.storage.reading import OpenFile, forget, parse_json, read_whole
from beitforge.shards.storage.remote import Kept, Missing, Remote, is_url
from beitforge.shards.storage.retry import reread, retry
from beitforge.shards.storage.staging import refuse_other_file
from beitforge.shards.storage.tensors import TensorFile
from beitforge.shards.wording import with_article

SCHEMA = 1

_MOST_BYTES = 1 << 26  # of a manifest: over 300,000 shards
_MOST_VOCABULARY = 1 << 16  # tokens are u16
_LEAST_BYTES = 512  # of a sample in a tar: the header of its image
_FIRST_LINE = re.compile(rb'\{\n "columns": "([0-9a-f]{32})",\n')
_FIRST_LINES = re.compile(_FIRST_LINE.pattern + rb' "schema": 1,\n "kind": "(images|tokens)",\n')
_HEAD_BYTES = 256  # of a manifest: more than those lines have
_READS = 2  # of columns that come damaged from a store: they are not needed
_CHANGED = "start again"
_log = logging.getLogger(__name__)

_ENTRIES: dict[str, type] = {"images": ImageShard, "tokens": TokenShard}
Made = TypeVar("Made", ImageManifest, TokenManifest)


def write_manifest(folder: Path, manifest: ImageManifest | TokenManifest) -> None:
    """Close a folder: write the columns of its manifest, then the manifest, each by rename."""
    kind = "images" if isinstance(manifest, ImageManifest) else "tokens"
    rest = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    shards = list(rest.pop("shards"))
    content = {"schema": SCHEMA, "kind": kind, "shards": [vars(shard) for shard in shards], **rest}
    told, columns = columnar.rest_text(rest), columnar.columns_of(_ENTRIES[kind], shards)
    if told is None or columns is None or not shards:
        write_text(folder / NAME, _text(content))
        (folder / columnar.NAME).unlink(missing_ok=True)
        return
    told_of = {"kind": kind, "rest": told, "fingerprint": manifest.fingerprint, "beside": manifest.beside}
    parts = columnar.file_parts(columns, told_of)[:-1]
    text = _text({"columns": columnar.digest_of(parts), **content})
    seal = xxhash.xxh3_128_digest(text.encode())
    with atomic_path(folder / columnar.NAME) as partial, open(partial, "wb") as file:
        for part in (*parts, seal):
            file.write(part)
    write_text(folder / NAME, text)


def _text(content: dict) -> str:
    return json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"


def refuse_other_manifest(folder: Path) -> None:
    """Raise ShardError when the folder has a manifest.json of another program, which would be replaced. Of its columns
    those are ours that have our words, and whatever file lies under their name where a manifest.json names some."""
    refuse_other_file(folder / NAME, b'"schema": ', b'"made_by": ', b'"tokenizer": ')
    path = folder / columnar.NAME
    if not (path.is_file() and (folder / NAME).is_file() and _named(folder, []).digest):
        refuse_other_file(path, b'"fingerprint":')


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


def _is_count(value: object) -> bool:
    return is_natural(value) and value > 0


def _demand(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise TypeError(f"{name} is {str(value)[:40]!r}")


def _manifest(
    folder: Path | str,
    kind: str,
    cure: str,
    cache: Cache | None,
    make: Callable[[dict, Sequence[Any]], Made],
    warn: bool,
) -> Made:
    """What `make` gives of the other fields of a manifest and its shards, these out of their columns if it has some."""
    fetched: list[bytes] = []
    found = _columns(folder, kind, cache, fetched, warn)
    if found is not None:
        with contextlib.suppress(KeyError, TypeError, RecursionError):  # which manifest.json is asked about
            return make(*found)
    content = _read(folder, kind, cure, fetched)
    try:
        return make(content, _entries(_ENTRIES[kind], content["shards"]))
    except (KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{folder}/{NAME} is not what schema {SCHEMA} asks for ({error}): {cure}") from error


def _columns(
    folder: Path | str, kind: str, cache: Cache | None, fetched: list[bytes], warn: bool, sealed: bool = True
) -> tuple[dict, Shards[Any]] | None:
    """The other fields of a set's manifest, and its shards out of their columns; None where there are none, or none
    that prove to be the manifest's. What else is wrong is for `_read` to say. fetched: gets a remote manifest.json.
    warn: of columns that are named and cannot be used. sealed: whether manifest.json must be as it was written."""
    if is_url(folder) and cache is None:
        return None
    try:
        named = _named(folder, fetched)
    except (ShardError, OSError):
        return None
    digest, written = named.digest, named.written
    if not digest or named.kind not in ("", kind):
        return None

    def opened(source: Path | OpenFile) -> TensorFile:
        return columnar.sealed_file(source, digest, written if sealed else None)

    try:
        if isinstance(folder, Path) or not is_url(folder):
            file = opened(Path(folder) / columnar.NAME)
        else:
            assert cache is not None, "nothing is named without"
            kept = Kept(Remote(folder, optional=True), cache, digest[:16], reads=_READS)
            seal = columnar.SEAL_BYTES
            file = kept.open(columnar.NAME, digest, columnar.MOST_BYTES, opened, but_last=seal)
        if file.metadata.get("kind") != kind:
            raise Damaged(f"it is of {file.metadata.get('kind', '')[:40]}")
        rest, columns = columnar.rest_of(file), columnar.checked_columns(_ENTRIES[kind], file)
    except (ShardError, OSError, EOFError) as error:
        if warn:
            _log.warning("%s", columnar.unusable(folder, error, _cure(folder, kind)))
        return None
    shards: Shards[Any] = Shards(_ENTRIES[kind], columns, file.metadata, f"{folder}/{columnar.NAME}")
    shards.again = functools.partial(_same_columns, folder, kind, cache, written)
    return rest, shards


def _cure(folder: Path | str, kind: str) -> str:
    """Of columns that cannot be used."""
    if is_url(folder):
        return "upload it anew"
    if kind == "images":
        return f"fetch it anew, or have `index {folder}` write it again"
    return f"fetch it anew, or remove {NAME} and run `tokenize` again, which makes both"


def check_columns(folder: Path, kind: str) -> list[str]:
    """What is wrong with the columns of a set whose manifest.json is right, if there are any: whether they say the
    same, and the fingerprint is the one that follows."""
    path, cure = folder / columnar.NAME, _cure(folder, kind)
    if not path.exists() or not _named(folder, []).digest:
        return []
    content, found = _read(folder, kind, _CHANGED, []), _columns(folder, kind, None, [], warn=False)
    if found is None:
        return [f"{path} does not belong to its manifest.json, which is read in its place: {cure}"]
    listed = _entries(_ENTRIES[kind], content["shards"])
    same = list(found[1]) == listed and found[0] == {name: content[name] for name in found[0]}
    made: Any = ImageManifest if kind == "images" else TokenManifest
    stated, true = (made(**found[0], shards=shards).fingerprint for shards in (found[1], listed))
    return [] if same and stated == true else [f"{path} says what its manifest.json does not say: {cure}"]


class _Named(NamedTuple):
    """What a manifest.json names: the digest of its columns, and its kind where the lines behind say it; `written` is
    its own digest. All empty where it names no columns."""

    digest: str = ""
    written: str = ""
    kind: str = ""


def _named(folder: Path | str, fetched: list[bytes]) -> _Named:
    if is_url(folder):
        fetched.append(Remote(str(folder)).whole(NAME, _MOST_BYTES))
        head, digest = fetched[0][:_HEAD_BYTES], lambda: xxhash.xxh3_128_hexdigest(fetched[0])
    else:
        file = OpenFile(Path(folder) / NAME)
        head, digest = file.up_to(_HEAD_BYTES, 0) if file.size <= _MOST_BYTES else b"", file.digest
    if (named := _FIRST_LINE.match(head)) is None:
        return _Named()
    kind = _FIRST_LINES.match(head)
    return _Named(named[1].decode(), digest(), kind[2].decode() if kind else "")


def _same_columns(folder: Path | str, kind: str, cache: Cache | None, written: str) -> columnar.Columns:
    """The columns of a manifest.json that was `written` when it was opened. Raises ShardError where it is no more."""
    found = _columns(folder, kind, cache, [], warn=True)
    if found is not None:
        columns = found[1].columns
    else:
        shards = _entries(_ENTRIES[kind], _read(folder, kind, _CHANGED, [])["shards"])
        held = columnar.columns_of(_ENTRIES[kind], shards) or {}
        columns = {name: columnar.Held(column) for name, column in held.items()}
    if _named(folder, []).written != written:
        raise ShardError(f"{folder}/{NAME} was changed while it was read: {_CHANGED}")
    return columns


def _read(folder: Path | str, kind: str, cure: str, fetched: list[bytes]) -> dict:
    """What a manifest.json says. fetched: it, where it was fetched before."""
    path = f"{folder}/{NAME}"
    if not is_url(folder) and not Path(folder).is_dir():
        raise ShardError(f"{folder} does not exist; {with_article(kind[:-1])} shard set is expected there: {cure}")

    def once() -> dict:
        """Its content; Damaged where it is not as it was written, which may be the reading's doing."""
        remote = Remote(str(folder)) if is_url(folder) else None
        if remote:
            data = fetched.pop() if fetched else remote.whole(NAME, _MOST_BYTES)
        else:
            data = read_whole(Path(path), _MOST_BYTES)
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
            raise ShardError(instead(Path(folder), cure)) from error

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
        raise ShardError(instead(folder, "run the command that makes it again"))
    try:
        if named := _FIRST_LINES.match(OpenFile(path).up_to(_HEAD_BYTES, 0)):
            return named[2].decode()
        content = parse_json(read_whole(path, _MOST_BYTES))
    except (OSError, Damaged):
        content = None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind not in ("images", "tokens"):
        raise ShardError(f"{path} is missing, damaged, or of another program: give the folder of a shard set")
    return str(kind)


def read_image_manifest(folder: Path | str, cache: Cache | None = None, warn: bool = True) -> ImageManifest:
    """The manifest of the image shard set in a folder or behind a URL, whose columns are read through a cache. Raises
    ShardError where there is none, or one of something else. warn: of columns that cannot be used."""
    cure = "finish it with `pack` (the same command again), or adopt its tars with `index`"
    return _manifest(folder, "images", cure, cache, _image_manifest, warn)


def _image_manifest(content: dict, shards: Sequence[ImageShard]) -> ImageManifest:
    found = ImageManifest(shards=shards, classes=content["classes"], made_by=content["made_by"])
    crowded = found.counts > found.column("bytes") // _LEAST_BYTES
    if crowded.any():
        shard = shards[int(crowded.argmax())]
        _demand(False, f"{shard.name}: samples", shard.samples)
    classes = found.classes
    _demand(isinstance(classes, list) and all(isinstance(name, str) for name in classes), "classes", classes)
    _demand(isinstance(found.made_by, dict), "made_by", found.made_by)
    return found


def image_manifest_as_written(folder: Path) -> ImageManifest | None:
    """What the manifest.json of an image set said before it was changed: by columns that have the digest which it still
    names. None where there are none."""
    found = _columns(folder, "images", None, [], warn=False, sealed=False)
    with contextlib.suppress(KeyError, TypeError, RecursionError, ShardError):
        return None if found is None else _image_manifest(found[0], list(found[1]))
    return None


def read_token_manifest(folder: Path | str, cache: Cache | None = None) -> TokenManifest:
    """The manifest of the token shard set in a folder or behind a URL, whose columns are read through a cache. Raises
    ShardError where there is none, or one of something else."""

    def make(content: dict, shards: Sequence[TokenShard]) -> TokenManifest:
        fields = {key: content[key] for key in ("tokenizer", "policy", "num_views", "provenance")}
        for key in ("tokenizer", "policy", "provenance"):
            _demand(isinstance(fields[key], dict), key, fields[key])
        grid, vocabulary = fields["tokenizer"]["grid"], fields["tokenizer"]["vocabulary"]
        _demand(isinstance(grid, list) and len(grid) == 2 and all(map(_is_count, grid)), "tokenizer.grid", grid)
        _demand(_is_count(vocabulary) and vocabulary <= _MOST_VOCABULARY, "tokenizer.vocabulary", vocabulary)
        _demand(_is_count(fields["num_views"]), "num_views", fields["num_views"])
        return TokenManifest(shards=shards, **fields)

    return _manifest(folder, "tokens", "finish it with `tokenize` (the same command again)", cache, make, warn=True)
