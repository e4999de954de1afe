"""Folders made whole or not at all, and the proof that a file or folder is ours: nothing else is replaced or removed.

A folder made here holds `beitforge.json`: which command wrote it and the xxh3-128 of every file in it. A later call
replaces the folder only when it is as that list says.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from beitforge.shards.errors import ShardError, about_file
from beitforge.shards.storage.files import PARTIAL, atomic_path
from beitforge.shards.storage.reading import file_digest

MARKER = "beitforge.json"
_MADE_BY = "made_by"
_OURS = "beitforge "  # what a marker's made_by begins with; the verb follows
_MOST_BYTES = 1 << 20  # of a marker
_CURE = "give a new folder, or move that away"
_HEAD_BYTES = 1 << 16
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_WRITTEN = (
    ".tar",
    ".json",
    ".columns",
    ".jsonl",
    ".safetensors",
)  # suffixes of the files that commands write into shard folders


@contextlib.contextmanager
def staged_folder(out: Path, verb: str, *, replace: bool) -> Iterator[Path]:
    """Yield a new folder beside `out`; when the block ends well it takes the place of `out`.

    replace: whether `out` may be a folder that an earlier call wrote and nobody changed since; otherwise it must be
    absent or an empty folder. Folders that a killed call for the same `out` left are removed. Raises ShardError when
    `out` holds anything else, before the block and again after it.
    """
    out = out.resolve()
    refuse_strangers(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    staged = _beside(out)
    staged.mkdir()
    lock = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the folder is ours by its marker all the same
            fcntl.flock(lock, fcntl.LOCK_EX)
        with about_file(out):
            _mark(staged, verb, {})
            yield staged
        _mark(staged, verb, {name: file_digest(staged / name) for name in _names(staged)})
        refuse_strangers(out, replace=replace)
        _swap(staged, out)
    finally:
        os.close(lock)
        shutil.rmtree(staged, ignore_errors=True)


def refuse_strangers(out: Path, *, replace: bool) -> None:
    """Raise ShardError when `out` is a file, or a folder that holds what no earlier call wrote (replace), or anything
    at all (not replace)."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise ShardError(f"{out} is a file; a folder is written there: {_CURE}")
    names = _names(out)
    if not replace or not names:
        if names or (out / MARKER).exists():
            raise ShardError(f"{out} is not empty (it holds {(names or [MARKER])[0]}): {_CURE}")
        return
    written = _written(out)
    if written is None:
        raise ShardError(f"{out} holds {names[0]} and no {MARKER} that says who wrote it, so it stays: {_CURE}")
    for name in names:
        if name not in written:
            raise ShardError(f"{out} holds {name}, which beitforge did not write, so it stays: {_CURE}")
        if (out / name).is_symlink() or not (out / name).is_file() or file_digest(out / name) != written[name]:
            raise ShardError(f"{out / name} was changed since beitforge wrote it, so it stays: {_CURE}")


def check_made(folder: Path, report: Callable[[str], None]) -> int | None:
    """How many files a folder's marker lists, telling `report` those that are not as it says, one line each; None
    where there is no marker of ours."""
    written = _written(folder)
    for name, digest in (written or {}).items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            report(f"{folder / MARKER} lists {name!r:.80}, which leads out of the folder")
            continue
        try:
            if file_digest(folder / name) != digest:
                report(f"{folder / name} is damaged or was changed: it holds other bytes than were written")
        except FileNotFoundError:
            report(f"{folder / name} is missing")
        except (OSError, ShardError) as error:
            report(f"{folder / name} cannot be read ({error})")
    return None if written is None else len(written)


def refuse_other_file(path: Path, *words: bytes) -> None:
    """Raise ShardError when `path` is there and is no file of ours: ours is empty, or has one of `words` near its
    beginning."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir():
        raise ShardError(f"{path} is a folder; a file is written there: give the path of a file")
    if path.exists() and not path.is_file():
        raise ShardError(f"{path} is no regular file, so it stays: move it away, or give another folder")
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
        if not head or any(word in head for word in words):
            return
    raise ShardError(f"{path} was not written by beitforge, so it stays: move it away, or give another folder")


def leftovers(folder: Path) -> list[Path]:
    """Partial files of atomic_path in a folder, by their exact names: what killed commands left, or live ones hold."""
    pattern = re.compile(rf".+({'|'.join(map(re.escape, _WRITTEN))}){re.escape(PARTIAL)}[0-9a-f]{{8}}")
    return [path for path in sorted(folder.glob(f"*{PARTIAL}*")) if pattern.fullmatch(path.name) and path.is_file()]


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.beitforge-{uuid.uuid4().hex}")


def _sweep(out: Path) -> None:
    """Remove the folders beside `out` that bear our name and marker and that no process holds."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.beitforge-[0-9a-f]{{32}}")
    for folder in (path for path in out.parent.iterdir() if pattern.fullmatch(path.name)):
        if folder.is_symlink() or _written(folder) is None:
            continue
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except OSError:
            continue  # held by a live process, or not to be removed now: a later call tries again
        finally:
            os.close(lock)


def _swap(staged: Path, out: Path) -> None:
    """Put `staged` in the place of `out`, which is absent, empty or proven ours; `staged` is then what was there.

    At no moment is there nothing at `out`, but on file systems that cannot exchange two names.
    """
    if not out.exists():
        staged.rename(out)
        return
    if _exchange(staged, out):
        return
    before = _beside(out)
    out.rename(before)
    staged.rename(out)
    before.rename(staged)


def _exchange(one: Path, other: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE; False where the C library or the file system has no such thing."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0


def _names(folder: Path) -> list[str]:
    """Every file below a folder but the marker, and every folder or link that no file lies in, by relative path."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path != folder / MARKER and (path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    )


def _mark(folder: Path, verb: str, files: dict[str, str]) -> None:
    with atomic_path(folder / MARKER) as partial:
        partial.write_text(json.dumps({_MADE_BY: _OURS + verb, "files": files}, indent=1) + "\n", encoding="utf-8")


def _written(folder: Path) -> dict[str, str] | None:
    """The files that the folder's marker lists, with their digests; None where there is no marker of ours."""
    if (folder / MARKER).is_symlink() or not (folder / MARKER).is_file():
        return None
    try:
        with open(folder / MARKER, "rb") as file:
            content = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    made_by, files = (content.get(_MADE_BY), content.get("files")) if isinstance(content, dict) else (None, None)
    return files if isinstance(made_by, str) and made_by.startswith(_OURS) and isinstance(files, dict) else None
