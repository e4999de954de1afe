"""How DeepSpeed's checkpoint files reach the disk: each flushed by the process that wrote it, at once or behind the
run, and its digest taken of the bytes on their way there.

Imports deepspeed; the engine imports it once that is set up. Must not know model, shards or any stage.
"""

import contextlib
import copy
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from beitforge.pipeline.distributed.file_reader import read_file
from beitforge.pipeline.runs.checkpoints import SavedFile

_WRITER = ("PytorchStreamWriter", "inline_container", "iostream")  # how torch reports a disk that is full


class _Digested(io.BufferedWriter):
    """A new file that is written from its beginning to its end, as torch.save does; digest: of what was written."""

    def __init__(self, path: str):
        super().__init__(io.FileIO(path, "w"))
        self.digest = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """torch's own CRC-32 of every record takes several times what the digest does, and nobody looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class Writer(TorchCheckpointEngine):
    """DeepSpeed hands every file of this process to `save`. What goes wrong with the disk is kept in `error`, what was
    written in `written`, by path."""

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous = False
        self.error = ""
        self.written: dict[Path, SavedFile] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future] = []

    def save(self, state_dict: dict, path: str) -> None:
        """Write a file and flush it; asynchronous: of a copy in host memory, while the caller goes on."""
        if self.asynchronous:
            self._pending.append(self._pool.submit(self._write, _copied(state_dict), path))
        else:
            self._write(state_dict, path)

    def _write(self, state: dict, path: str) -> None:
        try:
            with _Digested(path) as file, without_checksums():
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
                self.written[Path(path)] = SavedFile(bytes=file.tell(), xxh3=file.digest.hexdigest())
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _WRITER):
                raise
            cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides a full disk
            self.error = self.error or " ".join(str(cause).split())[:200]

    def load(self, path: str, map_location: Any = None) -> dict:
        """DeepSpeed's own way to read a file, which would run what a pickle says, is shut: it gets data."""
        return read_file(Path(path))

    @property
    def busy(self) -> bool:
        """Whether a file is still being written."""
        return any(not future.done() for future in self._pending)

    def wait(self) -> str:
        """Until every file is on disk; returns what went wrong with it since the last time, or ''."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        error, self.error = self.error, ""
        return error

    def take_written(self, folder: Path) -> dict[str, SavedFile]:
        """What this process wrote into a folder since the last time, by its name there; call `wait` before."""
        written, self.written = self.written, {}
        return {str(path.relative_to(folder)): saved for path, saved in written.items() if folder in path.parents}


def _copied(item: Any) -> Any:
    """The same in host memory of its own, so that training can go on changing the original."""
    if isinstance(item, torch.Tensor):
        return item.detach().to("cpu", copy=True)
    if isinstance(item, dict):
        made = copy.copy(item)
        for key, value in item.items():
            made[key] = _copied(value)
        return made
    if type(item) in (list, tuple):
        return type(item)(_copied(value) for value in item)
    return copy.deepcopy(item)
