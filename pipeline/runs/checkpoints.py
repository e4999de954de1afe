"""What checkpoints of a run are there, and which of them are whole: told from their folders alone, without torch.

A complete checkpoint has a state.json, which says how many bytes each of its files has and their digest, and ends with
a digest of itself. Whoever reads a checkpoint checks what it reads (`newest` with whole=True for one process;
pipeline.checkpoints.choice for many). A file that is no regular file of the folder is never opened. Digests guard
against damage, not against somebody who writes new ones; what is in the files is not trusted either
(pipeline.distributed.file_reader).

pipeline.checkpoints.saver writes and loads them. Must not know torch, engine, model, shards or any stage.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reading import OddFile, open_regular, read_regular
from beitforge.shards.storage.reading import OpenFile

STATE = "state.json"
NO_DIGESTS = "{} was saved by a version that took no digests: only the sizes of its files are checked"

_LARGEST_STATE = 64 << 20  # bytes: the files of 100,000 processes
_LONGEST = 4096  # letters of a text in it
_LARGEST = 2**63 - 1
_THREADS = 8
_SEAL = b',\n "digest": "'  # begins the last field
_FOLDER = re.compile(r"step-[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """A file of a checkpoint. xxh3: 128 bits of it in hex; empty where the version that saved it took no digests."""

    bytes: int
    xxh3: str = ""


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands. `samples_seen` is the whole state of the data stream; the fingerprints name its two sets.

    `groups`: the parameters' names in the order of the optimizer's groups, which ZeRO-0's files leave out. `files`: by
    their path in the checkpoint's folder.
    """

    step: int
    samples_seen: int
    world: int
    zero_stage: int
    precision: str
    images: str
    tokens: str
    config: str
    order: int = 1  # shards.stream.order.ARITHMETIC of the version that saved it; the first did not say
    groups: list[list[str]] = field(default_factory=list)
    files: dict[str, SavedFile] = field(default_factory=dict)

    @property
    def has_digests(self) -> bool:
        return all(saved.xxh3 for saved in self.files.values())


class NotWhole(ConfigError):
    """Why a checkpoint is not used, without its name."""


class NotFinished(NotWhole):
    """Its save never ended: there is no state.json."""


def step_of(folder: Path) -> int:
    """Of a checkpoint's folder, step-N."""
    return int(folder.name[5:])


def candidates(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def newest(
    run: Path,
    say: Callable[[str], None],
    usable: Callable[[int], bool] = lambda _: True,
    *,
    whole: bool = False,
) -> tuple[Path, State] | None:
    """The newest complete checkpoint of a run folder, or None. `say` is told of each one passed over, and why.

    usable: whether one of a step may be taken at all. whole: every byte of it is read and held against its digest,
    which whoever takes weights out of it wants; else the sizes of its files are looked at.
    """
    for folder, state in readable(run, lambda folder, problem: say(passed_over(folder, problem)), usable):
        problem = next(damage(folder, state, state.files, whole=whole), "")
        if not problem:
            if whole and not state.has_digests:
                say(NO_DIGESTS.format(f"checkpoint {folder.name}"))
            return folder, state
        say(passed_over(folder, problem))
    return None


def readable(
    run: Path, pass_over: Callable[[Path, NotWhole], None], usable: Callable[[int], bool]
) -> Iterator[tuple[Path, State]]:
    """The checkpoints whose state.json is as it was written, newest first; what is in their files is not looked at."""
    for folder in candidates(run):
        if usable(step_of(folder)):
            try:
                yield folder, read_state(folder)
            except NotWhole as problem:
                pass_over(folder, problem)


def passed_over(folder: Path, problem: object) -> str:
    """The line about a checkpoint that is not used."""
    return f"checkpoint {folder.name} is not used: {problem}; taking the one before"


def damage(folder: Path, state: State, names: Collection[str], *, whole: bool) -> Iterator[str]:
    """What is wrong with files of a checkpoint, in words. names: which. whole: their bytes too; else their sizes."""
    return (problem for _, problem in checked(folder, state, names, whole=whole) if problem)


def checked(folder: Path, state: State, names: Collection[str], *, whole: bool) -> Iterator[tuple[str, str]]:
    """Each of these files of a checkpoint and what is wrong with it, or ''. Several threads read them."""

    def problem(name: str) -> str:
        return _problem(folder, name, state.files[name], whole)

    if not whole or len(names) < 2:
        yield from zip(names, map(problem, names), strict=True)
        return
    with ThreadPoolExecutor(min(_THREADS, len(names), len(os.sched_getaffinity(0)))) as pool:
        yield from zip(names, pool.map(problem, names), strict=True)


def _problem(folder: Path, name: str, saved: SavedFile, whole: bool) -> str:
    try:
        with open_regular(folder / name, within=folder) as opened:
            file = OpenFile(folder / name, os.dup(opened.fileno()))
        if file.size != saved.bytes:
            return f"{name} has {file.size} bytes instead of {saved.bytes}"
        if whole and saved.xxh3 and file.digest() != saved.xxh3:
            file.forget()  # it is read once more, from the disk: the read may have been at fault
            if file.digest() != saved.xxh3:
                return f"{name} is damaged (it holds other bytes than were saved)"
        return ""
    except FileNotFoundError:
        return f"{name} is missing"
    except OddFile as error:
        return str(error)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def sealed(state: State) -> bytes:
    """What state.json holds: the state, and last a digest of all that stands before it."""
    return _with_seal(json.dumps(asdict(state), indent=1).removesuffix("\n}").encode())


def _with_seal(body: bytes) -> bytes:
    return body + _SEAL + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n'


def read_state(folder: Path) -> State:
    """The state of a checkpoint. Raises NotFinished without a state.json, and NotWhole where that is not as it was
    written; those of versions that took no digests are held against what they have to look like."""
    try:
        raw = read_regular(folder / STATE, _LARGEST_STATE, within=folder)
    except FileNotFoundError as error:
        raise NotFinished("its save was never finished") from error
    except OddFile as error:
        raise NotWhole(str(error)) from error
    except OSError as error:
        raise NotWhole(f"its {STATE} cannot be read ({error.strerror})") from error
    try:
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("no object")
        is_sealed = content.pop("digest", None) is not None
        if is_sealed and raw != _with_seal(raw.rpartition(_SEAL)[0]):
            raise ValueError("its digest differs")
        state = _state(content)
        if not is_sealed and any(saved.xxh3 for saved in state.files.values()):
            raise ValueError("its own digest is missing")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotWhole(f"its {STATE} is damaged ({reason})") from error
    if state.step != step_of(folder):
        raise NotWhole(f"its {STATE} is of step {state.step}")
    return state


def _state(content: dict[str, Any]) -> State:
    """Raises ValueError for what no version has written."""
    known = {one.name: one for one in fields(State)}
    if unknown := sorted(content.keys() - known.keys()):
        raise ValueError(f"it has {unknown[0][:40]!r}, which this version does not know")
    for name, value in content.items():
        if name in ("groups", "files"):
            continue
        if known[name].type is int:
            fine = type(value) is int and 0 <= value <= _LARGEST
        else:
            fine = isinstance(value, str) and len(value) <= _LONGEST
        if not fine:
            raise ValueError(f"{name} is {value!r:.40}")
    groups, files = content.get("groups", []), content.get("files", {})
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError("groups is no list of lists")
    if not all(isinstance(name, str) for group in groups for name in group):
        raise ValueError("groups holds more than names")
    if not isinstance(files, dict):
        raise ValueError("files is no object")
    try:
        state = State(**{**content, "files": {name: _saved_file(name, about) for name, about in files.items()}})
    except TypeError as error:
        raise ValueError("a field is missing") from error
    if state.world < 1 or state.zero_stage > 3:
        raise ValueError(f"it says {state.world} processes under ZeRO-{state.zero_stage}")
    return state


def _saved_file(name: str, about: object) -> SavedFile:
    """about: size and digest, or before there were digests the size alone."""
    path = PurePosixPath(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts and str(path) == name and name != STATE
    if not inside or len(name) > _LONGEST or not name.isprintable():
        raise ValueError(f"files names {name!r:.40}, which is no file of a checkpoint")
    size, digest = about, ""
    if isinstance(about, dict) and about.keys() == {"bytes", "xxh3"}:
        size, digest = about["bytes"], about["xxh3"]
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{32}", digest):
            raise ValueError(f"the digest of {name:.80} is {digest!r:.40}")
    if type(size) is not int or not 0 <= size <= _LARGEST:
        raise ValueError(f"the size of {name:.80} is {size!r:.40}")
    return SavedFile(bytes=size, xxh3=digest)


def checkpoint_bytes(
    numbers: int, stage: int, number: int, matrices: Sequence[Sequence[int]] = (), world: int = 1
) -> int:
    """About what a checkpoint takes on disk: float32 masters, two moments, and the weights where they lie beside them.
    number: bytes of a weight.

    matrices: numbers of those that Muon updates, by its groups; they have one momentum, which under ZeRO-1 and 2 each
    of the `world` processes keeps whole of every matrix that reaches into its share, in the gradients' precision.
    """
    apart = stage in (1, 2) or (stage == 0 and number != 4)
    everywhere = numbers * (4 + (number if apart else 0))
    muon = sum(sum(group) for group in matrices)
    if stage not in (1, 2):
        return everywhere + 8 * (numbers - muon) + 4 * muon
    cut = sum((world - 1) * max(group) for group in matrices)  # at most: a matrix at each border between two shares
    return everywhere + 8 * (numbers - muon) + number * (muon + cut)
