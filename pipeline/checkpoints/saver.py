"""Checkpoints of a run: DeepSpeed's sharded files in `checkpoints/step-N/`, closed by state.json.

A checkpoint exists when its state.json does: rank 0 writes it, by rename, after every rank has flushed its files, with
the size and the digest of each, as the rank says that wrote it. A torn one is passed over with a line that says so, so
is one of which a bit is not as it was written. Any number of processes under any ZeRO stage resumes from it. Must not
know model, shards or any stage.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from beitforge.pipeline.checkpoints import live_layout, zero_layout
from beitforge.pipeline.checkpoints.choice import newest_whole
from beitforge.pipeline.distributed.collectives import all_gather_lines, all_gather_text, barrier, broadcast_object
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.startup import run_on_all_ranks
from beitforge.pipeline.errors import SharedError
from beitforge.pipeline.runs.checkpoints import STATE, SavedFile, State, candidates, sealed, step_of

_SLACK = 1.02  # of a checkpoint's estimated size: names, shapes, archives


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


class Saver:
    """Saves the checkpoints of a run. Every rank calls each method at the same step."""

    def __init__(self, engine: Engine, run: Path, *, keep: int, keep_every: int, asynchronous: bool):
        """keep: how many of the newest stay, and those whose step is a multiple of keep_every (0: none). asynchronous:
        files are written while training goes on, and closed at a later step."""
        self.engine, self.run, self.keep, self.keep_every = engine, run, keep, keep_every
        self.engine.writer.asynchronous = asynchronous
        self._open: State | None = None

    def save(self, state: State) -> bool:
        """Write a checkpoint, or begin to; False, and nothing is written, when the weights are not finite.

        Raises SharedError when there is no room for it, before anything is written, and when it cannot be written;
        those before stay.
        """
        self.finish()
        if not live_layout.finite(self.engine):
            return False
        live_layout.clear_padding(self.engine)
        folder, first = _folder(self.run, state.step), self.engine.world.first
        refusal = broadcast_object(self._make_room() if first else "", self.engine.world)
        if refusal:
            raise SharedError(refusal)
        if first:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed save left
            folder.mkdir(parents=True)
        barrier()
        self.engine.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        self._open = state
        if not self.engine.writer.asynchronous:
            self.finish()
        return True

    @property
    def busy(self) -> bool:
        """Whether files of this rank are still being written."""
        return self._open is not None and self.engine.writer.busy

    @property
    def open(self) -> bool:
        """Whether a checkpoint waits to be closed: the same on every rank."""
        return self._open is not None

    def finish(self) -> None:
        """Wait for the files of the last save and close it. Raises SharedError when they could not be written."""
        if self._open is None:
            return
        state, self._open = self._open, None
        folder = _folder(self.run, state.step)
        if errors := all_gather_lines(self.engine.writer.wait(), self.engine.world):
            self.engine.writer.take_written(folder)
            free = shutil.disk_usage(folder).free
            raise SharedError(
                f"cannot write {folder} ({free >> 20} MiB free there; {errors[0]}): make room, then start again; it "
                f"resumes from the checkpoint before"
            )
        mine = "".join(
            json.dumps([name, saved.bytes, saved.xxh3]) + "\n"
            for name, saved in self.engine.writer.take_written(folder).items()
        )
        told = all_gather_text(mine, self.engine.world)
        if self.engine.world.first:
            files = {
                name: SavedFile(bytes=size, xxh3=digest) for name, size, digest in map(json.loads, told.splitlines())
            }
            _close(folder, replace(state, files=dict(sorted(files.items()))))
            self._prune(self.keep)
        barrier()

    def _make_room(self) -> str:
        """Why there is no room for another checkpoint, or ''. May remove the oldest, which would go next anyway."""
        needed = self.engine.checkpoint_bytes() * _SLACK
        self.run.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.run).free < needed and self.keep > 1:
            self._prune(self.keep - 1)
        free = shutil.disk_usage(self.run).free
        if free >= needed:
            return ""
        return (
            f"{self.run / 'checkpoints'}: {free / 2**20:.1f} MiB free, a checkpoint takes {needed / 2**20:.1f} MiB: "
            f"make room, or keep fewer (checkpoint.keep), then start again; it resumes from the newest one"
        )

    def _prune(self, keep: int) -> None:
        """Remove complete checkpoints beyond the newest `keep`, marker first: half a removal is no checkpoint."""
        complete = [folder for folder in candidates(self.run) if (folder / STATE).exists()]
        for folder in complete[keep:]:
            if not self.keep_every or step_of(folder) % self.keep_every:
                _remove(folder)


def _close(folder: Path, state: State) -> None:
    """Write state.json by rename, once the folder itself is flushed."""
    flush_folder(folder)
    partial = folder / f"{STATE}.partial"
    with open(partial, "wb") as file:
        file.write(sealed(state))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / STATE)
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """So that the names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (folder / STATE).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def remove_between(run: Path, after: int, until: int) -> None:
    """Remove the checkpoints of steps after < step ≤ until: a run that has gone back leaves them behind."""
    for folder in candidates(run):
        if after < step_of(folder) <= until:
            _remove(folder)


def resume(
    engine: Engine,
    run: Path,
    expected: State,
    say: Callable[[str], None],
    usable: Callable[[int], bool] = lambda _: True,
) -> State | None:
    """Load the newest complete checkpoint into the engine; None when the run folder has none. Every rank calls it.

    `expected`: what this run would write now. One saved by another number of processes or ZeRO stage is laid out anew,
    exactly. usable: as `newest` takes it. Raises ConfigError when the checkpoint belongs to other data, or cannot be
    read, or when all are damaged.
    """
    found = newest_whole(run, engine.world, say, usable)
    if found is None:
        return None
    folder, state = found
    for name, cure in (
        ("images", "data.images (finetune: data.labelled_images) is another shard set than the run was started with"),
        ("tokens", "data.tokens is another token set than the run was started with"),
    ):
        if getattr(state, name) != getattr(expected, name):
            raise SharedError(f"{folder}: {cure}; give the one it was started with, or a new train.run folder")
    if state.order != expected.order:
        raise SharedError(
            f"{folder} was saved by a version that puts samples in another order ({state.order}, here "
            f"{expected.order}): finish the run with that version, or begin a new one with train.init=EXPORT"
        )
    if (state.world, state.zero_stage) != (expected.world, expected.zero_stage):
        say(
            f"checkpoint {folder.name} was saved by {state.world} processes under ZeRO-{state.zero_stage}; laying it "
            f"out for {expected.world} under ZeRO-{expected.zero_stage}"
        )
    groups = state.groups or engine.groups
    source = run_on_all_ranks(
        lambda: zero_layout.open_checkpoint(folder, state.zero_stage, groups, state.files), engine.world
    )
    live_layout.load_into(engine, source)
    barrier()
    return state
