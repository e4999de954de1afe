"""The optimizer's tensors on NVMe, where the deepspeed section puts them: a folder of this process's own, and those
tensors as if they were in memory, so that a checkpoint has the same form wherever they are.

Knows the insides of DeepSpeed 0.19, held by tests/nvme. Must not know model, shards or any stage.
"""

import contextlib
import copy
import fcntl
import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from beitforge.pipeline.errors import HostError

_PREFIX = f"beitforge-offload-{socket.gethostname()}-"  # hosts may share a disk, and not its locks
_WITHIN = {"probe", "zero_stage_3"}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_OWN = contextlib.ExitStack()  # removes this process's folders, and then unlocks them

remove_own_folders = _OWN.close


def with_own_folder(section: dict) -> dict:
    """The deepspeed section with, where its optimizer goes to NVMe, an `nvme_path` of this process's own below the one
    given: DeepSpeed names files by rank alone, and two runs of a host would write into each other's.

    `remove_own_folders` removes it; here go those that killed processes left. Raises HostError where this host
    cannot build what DeepSpeed writes with, or the folder cannot be used.
    """
    offload = section.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return section
    from deepspeed.ops.op_builder import AsyncIOBuilder

    where, host = "deepspeed.zero_optimization.offload_optimizer", socket.gethostname()
    if not AsyncIOBuilder().is_compatible():
        raise HostError(
            f"{where}: device nvme needs libaio and a C++ compiler, and {host} lacks one of them; install libaio-dev "
            f"(libaio-devel) and g++ there, or use device: cpu"
        )
    folder = Path(offload["nvme_path"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = _claimed(folder)
    except OSError as error:
        raise HostError(
            f"{where}.nvme_path: {folder} cannot be used on {host} ({error.strerror or error}); it must be a folder "
            f"that can be written, on a disk that takes O_DIRECT, or use device: cpu"
        ) from error
    section = copy.deepcopy(section)
    section["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(own)
    return section


def _claimed(folder: Path) -> Path:
    """A new folder in this one, locked while this process lives. Removes those that nobody locks any more."""
    with _locked(folder):
        for left in folder.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError), _locked(left, wait=False):
                if _WITHIN.issuperset(os.listdir(left)):  # and nobody has put anything there
                    shutil.rmtree(left)
        own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        _OWN.enter_context(_locked(own))
    _OWN.callback(shutil.rmtree, own, ignore_errors=True)
    os.close(os.open(own / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    return own


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Raises OSError where another process has the lock and waiting is not wanted, or the folder is another user's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_memory(optimizer: Any) -> Iterator[None]:
    """Between two steps: what the optimizer keeps on NVMe is, inside, its files there mapped into memory, to be read
    and changed like any tensor; the host can have that memory back. Moments that there are not yet are made, as zeros.
    Nothing happens to an optimizer that is elsewhere.

    Raises HostError where the files cannot be opened, or there is no room for them.
    """
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None:
        yield
        return
    mapped: list[mmap.mmap] = []
    flats = optimizer.fp32_partitioned_groups_flat
    states = [
        optimizer.optimizer.state[flat] for flat in flats
    ]  # in this order in every checkpoint, also before a step
    infos = [swapper.swap_params_info.get(flat.ds_id) for flat in flats]  # None of the small ones, which stay in memory
    try:
        for flat, state, info in zip(flats, states, infos, strict=True):
            if info is not None:
                mapped += _mapped(state, flat, info, swapper)
        yield
    finally:
        for info in infos:
            if info is not None:
                info.release_memory()
        for each in mapped:
            each.flush()


def _mapped(state: dict, flat: torch.Tensor, info: Any, swapper: Any) -> list[mmap.mmap]:
    """Map the files of a tensor and of its state, after making those that there are not yet."""
    found = []
    try:
        if not state:
            _make_moments(state, flat, info, swapper)
        for held in swapper._get_param_swap_info(flat).tensors:
            with open(held.swap_path, "r+b") as file:
                found.append(mmap.mmap(file.fileno(), info.numel() * torch.float32.itemsize))
            held.compute_tensor.data = torch.frombuffer(found[-1], dtype=torch.float32)
            if held.compute_tensor is not flat:
                vars(held.compute_tensor).clear()  # the name of its file, which is known by now and in no checkpoint
    except OSError as error:
        raise HostError(
            f"{swapper.swap_folder} on {socket.gethostname()}: what is offloaded there cannot be read or written "
            f"({error.strerror or error}); make room, or use another nvme_path, then start again; it resumes from the "
            f"newest checkpoint"
        ) from error
    return found


def _make_moments(state: dict, flat: Any, info: Any, swapper: Any) -> None:
    """AdamW's state of a tensor that has not been stepped, its moments in files of zeros."""
    state["step"] = torch.zeros(())
    moments = []
    for name in _MOMENTS:
        moment: Any = torch.zeros(0)
        moment.ds_id = f"{name}-{flat.ds_id}"  # DeepSpeed names the file by it
        state[name] = moment
        moments.append(moment)
    info.add_state_tensors(moments)
    for held in info.tensors[1:]:
        descriptor = os.open(held.swap_path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, swapper._io_aligned_numel(info.numel()) * flat.element_size())
        finally:
            os.close(descriptor)
