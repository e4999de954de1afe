"""A file of a checkpoint, read as data: numbers, names and containers. Nothing in it is run, whoever wrote it.

The one place where the pickle in a checkpoint's file is opened (tests/pipeline/checkpoints/test_doctored.py). Imports
deepspeed when it is called. Must not know model, shards or any stage.
"""

import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from beitforge.pipeline.errors import ConfigError

# what a file that is none of ours, or is damaged, makes of whoever reads it
DAMAGE: tuple[type[Exception], ...] = (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError)
DAMAGE += (AssertionError,)  # torch's unpickler asserts what it relies on
DAMAGE += (AttributeError, OSError, EOFError, MemoryError, StopIteration, pickle.UnpicklingError, zipfile.BadZipFile)

_HEADER = struct.Struct("<4s5H3L2H")  # of a record in a zip archive; then come its name and more
_LARGEST_PICKLE = 1 << 28  # bytes: names, shapes and containers of a file
# All that DeepSpeed's files ask for. torch would also grant what takes any amount of memory, such as bytearray(n).
_NAMES = re.compile(
    rb"collections\n(OrderedDict)|torch\n(Tensor|Size|[A-Z]\w+Storage|(b?float|u?int)\d+|bool)|"
    rb"torch\._utils\n_rebuild_(tensor_v[23]|parameter|parameter_with_state)|torch\._tensor\n_rebuild_from_type_v2|"
    rb"torch\.nn\.parameter\nParameter|deepspeed\.runtime\.fp16\.loss_scaler\n(Dynamic)?LossScaler|"
    rb"deepspeed\.runtime\.zero\.config\nZeroStageEnum|deepspeed\.utils\.tensor_fragment\nfragment_address"
)
# where a pickle of torch's may ask for something; looked for at every byte, since an answer may be within a text
_ASKS = re.compile(rb"(?=c((?:torch|deepspeed|collections|builtins|__builtin__|_codecs)[\w.]*\n[\w.]+)\n)")


def read_file(path: Path) -> dict[str, Any]:
    """What DeepSpeed saved in a file, its tensors on the CPU and left on disk until they are read.

    Raises ConfigError for a file that asks for anything else than tensors, containers, numbers, names and four classes
    of DeepSpeed's that only hold numbers; and for tensors that the file has not got the bytes of.
    """
    try:
        _refuse_bombs(path)
        with torch.serialization.safe_globals(_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle's protocol
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary")
        _refuse_odd(content, path.stat().st_size)
        return content
    except DAMAGE as error:
        raise refusal(path, path.parent, error) from error


def refusal(what: Path, folder: Path, error: Exception) -> ConfigError:
    """The line for a file or folder `what` that led to this error, without torch's advice to trust it. folder: the
    checkpoint's."""
    said = " ".join(str(error).split())
    if asked := re.search(r"(?:GLOBAL|unrecognized function|add_safe_globals`,? but got) (\S+)", said):
        reason = f"no checkpoint: it asks for {asked[1]:.80}, and nothing of it was run"
    else:
        said = re.split(" Check the doc| Please ", said.partition("WeightsUnpickler error: ")[2] or said)[0]
        reason = f"damaged ({said[:200] or type(error).__name__})"
    return ConfigError(f"{what} is {reason}; remove {folder} to fall back to the checkpoint before")


def _classes() -> list:
    """DeepSpeed's own that its files name. They hold numbers: none does anything when it is made, filled or dropped."""
    quiet_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _refuse_bombs(path: Path) -> None:
    """Raise ValueError for a file that would take more memory than it has bytes, before it is unpickled."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = [record.filename for record in records]
        pickles = [name for name in names if name.endswith("data.pkl")]
        if len(set(names)) < len(names) or len(pickles) != 1:
            raise ValueError("it is no archive of torch.save")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("it is compressed, which no checkpoint is")
        found = archive.getinfo(pickles[0])
        if found.file_size > _LARGEST_PICKLE:
            raise ValueError(f"its pickle has more than {_LARGEST_PICKLE >> 20} MiB")
        # not by the archive, which would miss a CRC-32 that ours have not
        file.seek(found.header_offset + _HEADER.size - 4)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        pickled = file.read(found.file_size)
    for asked in _ASKS.finditer(pickled):
        if not _NAMES.fullmatch(asked[1]):
            raise ValueError(f"GLOBAL {asked[1].decode().replace(chr(10), '.')}")


def _refuse_odd(content: object, size: int) -> None:
    """Raise ValueError for what is no data; and for tensors that are not what they seem, larger than their bytes (a
    number that is repeated can pretend to be terabytes), than the file's `size`, or of another layout."""
    seen: set[int] = set()
    waiting, storages = [content], dict[int, int]()
    classes = tuple(_classes())
    while waiting:
        item = waiting.pop()
        if isinstance(item, str | bytes | int | float | torch.dtype | None) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif isinstance(item, torch.Tensor):
            waiting += vars(item).values()
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            plain = item.layout == torch.strided and item.device.type == "cpu" and not item.is_quantized
            if not plain or item.numel() * item.element_size() > storage.nbytes():
                raise ValueError(f"it holds a tensor {list(item.shape)} without its numbers")
        elif isinstance(item, classes):
            waiting += vars(item).values()
        else:
            raise ValueError(f"it holds a {type(item).__name__}")
    if sum(storages.values()) > size:
        raise ValueError("it holds tensors without their numbers")
