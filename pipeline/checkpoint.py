"""Checkpoints of a run: DeepSpeed's sharded files in `checkpoints/step-N/`, closed by state.json.

A checkpoint exists when its state.json does: rank 0 writes it, by rename, after every rank's files are on disk, with
the size of each file. A torn one is passed over with a line that says so. Must not know model, shards or any stage.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.engine import Engine, barrier, from_first

_STATE = "state.json"
_WRITER = ("PytorchStreamWriter", "inline_container", "iostream")


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands. `samples_seen` is the whole state of the data stream; the fingerprints name its two sets."""

    step: int
    samples_seen: int
    world: int
    zero_stage: int
    precision: str
    images: str
    tokens: str
    config: str
    files: dict[str, int] = field(default_factory=dict)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def save(engine: Engine, run: Path, state: State, keep: int) -> None:
    """Every rank calls it. Saves, closes the checkpoint, then removes the oldest beyond `keep`."""
    folder = _folder(run, state.step)
    if engine.world.first:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed save left
        folder.mkdir(parents=True)
    barrier()
    try:
        engine.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    except (OSError, RuntimeError) as error:
        # a full disk reaches torch.save's archive writer, which reports its own confusion instead
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _WRITER):
            raise
        free = shutil.disk_usage(folder).free
        raise ConfigError(
            f"cannot write {folder} ({free >> 20} MiB free there): make room, then start again; it goes on from the "
            f"checkpoint before"
        ) from error
    barrier()
    if engine.world.first:
        _close(folder, state)
        _prune(run, keep)
    barrier()


def _close(folder: Path, state: State) -> None:
    """Flush every file, then write state.json by rename."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _STATE)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    partial = folder / f"{_STATE}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({**asdict(state), "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _STATE)


def _prune(run: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, marker first so that half a removal is no checkpoint."""
    complete = [folder for folder in _candidates(run) if (folder / _STATE).exists()]
    for folder in complete[keep:]:
        with contextlib.suppress(FileNotFoundError):
            (folder / _STATE).unlink()
        shutil.rmtree(folder, ignore_errors=True)


def _candidates(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def newest(run: Path, say: Callable[[str], None]) -> tuple[Path, State] | None:
    """The newest complete checkpoint of a run folder, or None. `say` is told of each one passed over, and why."""
    for folder in _candidates(run):
        problem, state = _read(folder)
        if state is not None:
            return folder, state
        say(f"checkpoint {folder.name} is not used: {problem}; taking the one before")
    return None


def _read(folder: Path) -> tuple[str, State | None]:
    try:
        state = State(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return "its save was never finished", None
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError):
        return f"its {_STATE} is damaged", None
    for name, size in state.files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            return f"{name} has {found} bytes instead of {size}" if found is not None else f"{name} is missing", None
    return "", state


def resume(engine: Engine, run: Path, expected: State, say: Callable[[str], None]) -> State | None:
    """Load the newest complete checkpoint into the engine; None when the run folder has none.

    `expected`: what this run would write now. Raises ConfigError when the checkpoint belongs to other data, or was
    saved by another number of processes under ZeRO (whose files are per process).
    """
    found = from_first(newest(run, say) if engine.world.first else None, engine.world)
    if found is None:
        return None
    folder, state = found
    for name, cure in (
        ("images", "data.images is another shard set than the run was started with"),
        ("tokens", "data.tokens is another token set than the run was started with"),
    ):
        if getattr(state, name) != getattr(expected, name):
            raise ConfigError(f"{folder}: {cure}; give the one it was started with, or a new train.run folder")
    sharded = max(state.zero_stage, expected.zero_stage) > 0
    if sharded and (state.world, state.zero_stage) != (expected.world, expected.zero_stage):
        raise ConfigError(
            f"{folder} was saved by {state.world} processes with ZeRO stage {state.zero_stage}, this run has "
            f"{expected.world} with stage {expected.zero_stage}; start it as it was saved"
        )
    loaded, _ = engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise ConfigError(f"DeepSpeed could not load {folder}; remove it to fall back to the one before")
    return state
