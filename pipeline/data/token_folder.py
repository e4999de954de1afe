"""A token folder while any number of processes fill it: which shard is whose, what is finished, who closes it.

Until the manifest is there, four kinds of files lie beside the token files. `tokenizing.json` says for which task
they are; whoever begins or closes holds a lock on it, and whoever works holds a shared one on `tokenizing.json.claim`,
so that another task takes over what is left of this one only where nobody works. `NAME.claim` is locked by the process
that works on shard NAME, and the lock ends with the process, however it ends. `HEX.finished` is one process's: a line
for each token file it wrote, with the digests of what it wrote and what the file then was on its disk. A file that is
no longer that (a copy, or damaged), or has no line because its process was killed before it wrote one, is read through
when the folder is closed.

The folder is listed; no process asks for the files of others one by one, but the first that begins: one look at their
sizes finds those that were cut.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from beitforge.pipeline.errors import ConfigError
from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.format.index import FLAG_BAD
from beitforge.shards.format.manifest import (
    NAME,
    TokenManifest,
    TokenShard,
    kind_of,
    read_token_manifest,
    write_manifest,
)
from beitforge.shards.format.tokens import (
    Digests,
    OpenTokenShard,
    least_bytes,
    open_token_shard,
    token_path,
    token_shard_entry,
)
from beitforge.shards.storage.files import PARTIAL, sweep_partials
from beitforge.shards.storage.staging import leftovers
from beitforge.shards.stream.image_set import ImageSet

TASK = "tokenizing.json"
_TOKENS, _CLAIM = ".safetensors", ".claim"
_FINISHED = re.compile(r"[0-9a-f]{32}\.finished")
_AGAIN = "remove it and run `tokenize` again"
_LOOK_SECONDS = 15.0  # between two listings within a pass
_LEAST_WAIT, _MOST_WAIT = 1.0, 10.0  # seconds before another pass, where one found all that is left taken


@dataclass(frozen=True, kw_only=True)
class Written:
    """A token file as its process wrote it. unread: how many of its images could not be read though nothing was known
    against them; first: the key of the first of these. file: what it was on its disk."""

    entry: TokenShard
    unread: int
    first: str
    file: tuple[int, ...] = ()


class Claim:
    """A shard that this process alone works on, or the task that it works for, until the claim is released or
    forgotten, or the process ends."""

    def __init__(self, number: int, descriptor: int):
        """descriptor: of a file that is locked; it is ours from now on."""
        self.number, self._descriptor = number, descriptor

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    __del__ = release


class TokenFolder:
    """The folder of one task: the tokens of `images` by the tokenizer `identity` (its precision included), of
    `num_views` views of the policy whose record is `policy`."""

    def __init__(self, folder: Path, images: ImageSet, identity: dict, policy: dict, num_views: int):
        self.folder, self.images, self.shards = folder, images, images.manifest.shards
        self.identity, self.policy, self.num_views = identity, policy, num_views
        self.finished: set[int] = set()
        self.samples = 0  # of the finished shards
        self._closed, self._clean = False, True
        self._numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        self._looked = 0.0
        self._own = folder / f"{uuid.uuid4().hex}.finished"
        self._working: Claim | None = None

    def stamp(self, number: int) -> str:
        """What the token file of a shard carries; a file with another stamp belongs to another task."""
        return self._stamp(image_digest=self.shards[number].digest)

    def _stamp(self, **images: str) -> str:
        made = {"tokenizer": self.identity["fingerprint"], "policy": self.policy, "num_views": self.num_views}
        return json.dumps({**made, **images, "precision": self.identity["precision"]}, sort_keys=True)

    def path(self, number: int) -> Path:
        """The token file of a shard."""
        return token_path(self.folder, self.shards[number].name)

    def begin(self) -> None:
        """See what is finished. Raises ConfigError where the folder holds the files of another task, or is another's
        that is at work, or holds a token file that was cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._look()
        if not self._closed:
            with self._locked() as file:
                self._look()
                if not self._closed:
                    self._enter(file)
        if self._closed:
            self._refuse_other_manifest()

    def _enter(self, file: IO) -> None:
        """Join those who work for the task that `file` says, or take the folder over from one that nobody works for."""
        task, told = self._stamp(images=self.images.manifest.fingerprint).encode(), file.read()
        path = self.folder / f"{TASK}{_CLAIM}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        working = Claim(-1, descriptor)
        alone = _lock_alone(descriptor)
        try:
            self._check_taken(told, task, alone)
        except ValueError:
            if alone:
                path.unlink(missing_ok=True)
            raise
        if told != task:
            file.seek(0)
            file.truncate()
            file.write(task)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self._working = working

    def _check_taken(self, told: bytes, task: bytes, alone: bool) -> None:
        """Raise where this task can't go on with what is there. told: the task that the folder is of, if it says so."""
        if not alone and told not in (b"", task):
            raise ConfigError(
                f"{self.folder} is being filled by another `tokenize`, with another tokenizer, precision, other view "
                f"settings or images: choose another folder for these tokens, or end that one first"
            )
        if told != task:
            for number in sorted(self.finished):
                self._refuse_other(number, self._opened(number).metadata.get("stamp"))
        if alone:
            self._refuse_cut()

    def _refuse_cut(self) -> None:
        """Token files appear whole; what is smaller was copied in part, or its disk lost it."""
        rows, columns = self.identity["grid"]
        with os.scandir(self.folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                number = self._numbers.get(entry.name.removesuffix(_TOKENS)) if entry.name.endswith(_TOKENS) else None
                if number is None:
                    continue
                least = least_bytes(self.num_views, self.shards[number].samples, rows * columns)
                if (size := entry.stat().st_size) < least:
                    raise ConfigError(f"{entry.path} was cut to {size} of more than {least} bytes: {_AGAIN}")

    def _opened(self, number: int) -> OpenTokenShard:
        try:
            return open_token_shard(self.path(number))
        except Damaged as error:
            raise ConfigError(f"{self.path(number)} is damaged, or no token file: {_AGAIN}") from error

    def _refuse_other(self, number: int, stamp: str | None) -> None:
        if stamp != self.stamp(number):
            raise ConfigError(
                f"{self.path(number)} was made by another tokenizer, at another precision, with other view settings, "
                f"or from other images; choose another folder for these tokens, or remove {self.folder}"
            )

    def _refuse_other_manifest(self) -> None:
        with contextlib.suppress(ShardError):
            if kind_of(self.folder) == "images":
                raise ConfigError(f"{self.folder} is a set of images, not of tokens: choose another folder for these")
        try:
            manifest = read_token_manifest(self.folder)
        except ShardError as error:
            raise ConfigError(
                f"{error}; or remove {self.folder / NAME}, and `tokenize` makes it anew from the token files"
            ) from error
        made = [(shard.name, shard.image_digest) for shard in manifest.shards]
        same = made == [(shard.name, shard.digest) for shard in self.shards] and manifest.policy == self.policy
        of = [manifest.tokenizer.get(name) for name in ("fingerprint", "precision")]
        if not same or of != [self.identity["fingerprint"], self.identity["precision"]]:
            self._refuse_other(0, None)
        if manifest.num_views != self.num_views:
            self._refuse_other(0, None)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO]:
        """The task's file, and nobody else has it."""
        path = self.folder / TASK
        while True:
            with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.fstat(file.fileno()).st_nlink:
                    continue  # who closed the folder has removed it
                try:
                    yield file
                finally:
                    file.flush()
                    if not os.fstat(file.fileno()).st_size:  # nothing is begun here
                        path.unlink(missing_ok=True)
                return

    def _look(self, older: float = 0.0) -> None:
        """List the folder, unless that was done in the last `older` seconds."""
        if older and time.monotonic() - self._looked < older:
            return
        with os.scandir(self.folder) as entries:
            names = {entry.name for entry in entries}
        self._closed = NAME in names
        self._clean = not any(name == TASK or PARTIAL in name or _is_ours(name) for name in names)
        for name in names:
            if name.endswith(_TOKENS) and (number := self._numbers.get(name.removesuffix(_TOKENS))) is not None:
                self._add(number)
        self._looked = time.monotonic()

    def _add(self, number: int) -> None:
        if number not in self.finished:
            self.finished.add(number)
            self.samples += self.shards[number].samples

    def look_again(self) -> None:
        """Count what other processes have finished, now and then."""
        self._look(older=_LOOK_SECONDS)

    def passes(self, turn: int) -> Iterator[Iterator[Claim]]:
        """Until every shard is finished: those that this process can claim, one after the other from number `turn` on.
        Others hold the rest; what a dead one held comes free."""
        order = [*range(turn, len(self.shards)), *range(turn)]
        seconds = _LEAST_WAIT
        while left := [number for number in order if number not in self.finished]:
            yield self._claims(left)
            if self.finished.isdisjoint(left):
                time.sleep(seconds)
                seconds = min(2 * seconds, _MOST_WAIT)
            else:
                seconds = _LEAST_WAIT
            self._look()

    def _claims(self, left: list[int]) -> Iterator[Claim]:
        for number in left:
            if number in self.finished:
                continue
            claim = self._claim(number)
            if claim is not None and self.path(number).exists():  # since the folder was listed
                self._end(claim)
                self.look_again()
            elif claim is not None:
                yield claim

    def _claim(self, number: int) -> Claim | None:
        path = self.folder / f"{self.shards[number].name}{_CLAIM}"
        claim = Claim(number, descriptor := os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        return claim if _lock_alone(descriptor) else None

    def _end(self, claim: Claim) -> None:
        """Of a shard that is finished. Another process may make the claim anew, and finds that it is."""
        self._add(claim.number)
        (self.folder / f"{self.shards[claim.number].name}{_CLAIM}").unlink(missing_ok=True)
        claim.release()

    def finish(self, claim: Claim, digests: Digests, unread: list[str]) -> None:
        """After the token file of a claimed shard was written. unread: keys of the images that could not be read though
        nothing was known against them."""
        shard = self.shards[claim.number]
        entry = TokenShard(
            name=shard.name,
            samples=shard.samples,
            digest=digests.file,
            image_digest=shard.digest,
            checks_digest=digests.checks,
        )
        file = _facts(os.stat(self.path(claim.number)))
        written = Written(entry=entry, unread=len(unread), first=unread[0] if unread else "", file=file)
        text = json.dumps({"stamp": self.stamp(claim.number), **dataclasses.asdict(written)})
        with open(self._own, "a", encoding="ascii") as lines:  # closed, so that other hosts see the line
            lines.write(_line(text))
        self._end(claim)

    def close(self, manifest: Callable[[list[Written]], TokenManifest]) -> bool:
        """When every shard is finished: write the manifest, unless another process has done so; whether it was this
        one. Raises ConfigError for a file of another task."""
        self._look()
        if self._closed and self._clean:  # nothing to write, maybe where nothing can be written
            return False
        with self._locked() as file:
            self._look()
            closed = self._closed
            if not closed:
                write_manifest(self.folder, manifest(self._written()))
            for path in [path for path in self.folder.iterdir() if _is_ours(path.name)]:
                path.unlink(missing_ok=True)
            sweep_partials(leftovers(self.folder))
            file.truncate(0)  # and so it goes, too
            self._working = None
        return not closed

    def _written(self) -> list[Written]:
        """Every token file, in the order of the shards; nothing is read but what has no line that fits it."""
        with os.scandir(self.folder) as entries:
            listed = {entry.name: entry for entry in entries}
        lines: dict[str, list[tuple[str, Written]]] = {}
        for name in filter(_FINISHED.fullmatch, listed):
            for stamp, written in _lines(self.folder / name):
                lines.setdefault(written.entry.name, []).append((stamp, written))
        found = []
        for number, shard in enumerate(self.shards):
            entry = listed.get(self.path(number).name)
            file = _facts(entry.stat()) if entry else ()
            fitting = [line for line in lines.get(shard.name, []) if line[1].file == file]
            stamp, written = fitting[-1] if fitting else self._read(number)
            self._refuse_other(number, stamp)
            known = {line.entry.digest for _, line in lines.get(shard.name, [])} or {written.entry.digest}
            if written.entry.digest not in known:
                raise ConfigError(
                    f"{self.path(number)} was changed since it was written (its digest differs): damaged; {_AGAIN}"
                )
            found.append(written)
        return found

    def _read(self, number: int) -> tuple[str, Written]:
        """A token file's stamp, and what its line would say."""
        shard, opened, keys = self.shards[number], self._opened(number), []
        bad = opened.bad
        if bad.any():
            index = self.images.index(number)
            keys = [index.key(row) for row in np.flatnonzero((bad == 1) & ((index.flags & FLAG_BAD) == 0)).tolist()]
        entry = token_shard_entry(self.folder, shard.name, shard.digest)
        written = Written(entry=entry, unread=len(keys), first=keys[0] if keys else "")
        return opened.metadata.get("stamp", ""), written


def _lock_alone(descriptor: int) -> bool:
    """Lock a file where nobody else has it, and say whether it is ours."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _facts(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to, or another takes its name: size, times, and inode."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _is_ours(name: str) -> bool:
    """Whether a file of a token folder is of no use once there is a manifest; the task's own goes last."""
    return name.endswith(_CLAIM) or _FINISHED.fullmatch(name) is not None


def _line(text: str) -> str:
    """A line that shows whether it is whole."""
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _lines(path: Path) -> Iterator[tuple[str, Written]]:
    """Stamp and file of every whole line: a killed process leaves a part of one, a power failure zeros."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii", errors="replace") as lines:
        for line in lines:
            text = line[line.find(" ") + 1 : -1]
            if line != _line(text):
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):
                content = json.loads(text)
                entry, file = TokenShard(**content["entry"]), tuple(content["file"])
                unread, first = content["unread"], content["first"]
                yield content["stamp"], Written(entry=entry, unread=unread, first=first, file=file)
