"""Tensors out of a pickle, without running anything of it.

A pickle names functions and its reader calls them; here every name that published files may use stands for an `Inert`,
which records what it is given and does nothing. torch.load is not used: it hands some archives to other loaders, and
their storages to torch's own functions. Must not know shards or deepspeed.
"""

import io
import math
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reading import open_regular

Weights = dict[str, Tensor]
_Pick = Callable[[Any], dict[str, "Inert"]]  # from what was saved, the tensors that are wanted, by name
_Bytes = Callable[[str, int], bytes]  # of a storage, data/KEY, and how many they must be

ENCODER, DECODER = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder"
_NAMESPACE = "argparse.Namespace"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
# All that published files ask for, in full: a longer name, with a dot more, is another.
_ADMITTED = f"""
{ENCODER} dall_e.encoder.EncoderBlock {DECODER} dall_e.decoder.DecoderBlock dall_e.utils.Conv2d
torch.nn.modules.container.Sequential torch.nn.modules.activation.ReLU torch.nn.modules.linear.Identity
torch.nn.modules.pooling.MaxPool2d torch.nn.modules.upsampling.Upsample
{_TENSOR} {_PARAMETER} torch.device builtins.set __builtin__.set {_NAMESPACE}
torch.Size torch.float32 torch.float16 torch.bfloat16
pathlib.PosixPath pathlib.PurePosixPath pathlib._local.PosixPath pathlib._local.PurePosixPath
numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.dtype _codecs.encode
""".split()  # the last lines: what training saves beside its model, such as folders and learning rates
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_ZIP, _LEGACY = b"PK\x03\x04", pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how files of torch.save begin
_LARGEST_PICKLE = 64 << 20  # bytes; published ones are below 1 MiB
CURE = "give the file as its publisher serves it, downloaded whole"
# what reading a damaged or forged file can end in
DAMAGE: tuple[type[Exception], ...] = (pickle.PickleError, zipfile.BadZipFile, EOFError, LookupError, MemoryError)
DAMAGE += (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


class Refused(Exception):
    """What a file asks for or lacks; becomes a line with its path."""


class Inert:
    """What a pickle's classes and functions, and what it makes of them, become: a record of what it said."""

    kind = ""  # the name it asked for
    arguments: tuple[Any, ...]
    state: Any
    __slots__ = ("arguments", "state")

    def __new__(cls, *arguments: Any) -> "Inert":
        made = object.__new__(cls)
        made.arguments, made.state = arguments, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def is_tensor(value: Any) -> bool:
    """Whether a pickle describes a tensor here."""
    return isinstance(value, Inert) and value.kind in (_TENSOR, _PARAMETER)


def plain_settings(value: Any) -> dict[str, Any]:
    """The settings of an argparse.Namespace or a dictionary that are a text, a number, a truth value, None, or a list
    of such; {} for anything else."""
    held = value.state if isinstance(value, Inert) and value.kind == _NAMESPACE else value
    found: dict[str, Any] = {}
    for name, setting in held.items() if isinstance(held, dict) else ():
        items = setting if isinstance(setting, list | tuple) else [setting]
        if isinstance(name, str) and all(isinstance(item, str | int | float | None) for item in items):
            found[name] = list(items) if items is setting else setting
    return found


class _Dict(dict):
    """In place of OrderedDict: one whose attributes, such as a state dict's _metadata, are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, int] = {}  # bytes of each, by key

    def find_class(self, module: str, name: str) -> Any:
        kind = f"{module}.{name}".replace("torch.cuda.", "torch.")
        if kind == "collections.OrderedDict":
            return _Dict
        if kind not in _STORAGES and kind not in _ADMITTED:
            raise Refused(f"asks for the global {kind[:100]!r}, which no file of weights needs")
        return type(name, (Inert,), {"__slots__": (), "kind": kind})

    def persistent_load(self, identity: Any) -> Any:
        """A storage is named, not read: an _Inert of its kind with key and number of items."""
        sort, kind, *rest = identity
        if sort == "module" and _is_kind(kind):
            return kind  # the old format names a class so, and adds its source
        plain = sort == "storage" and _is_kind(kind) and kind.kind in _STORAGES and len(rest) in (3, 4)
        if not plain or any(view is not None for view in rest[3:]):
            raise Refused(f"holds a persistent object that is no plain storage ({str(sort)[:40]!r})")
        key, _, items = rest[:3]
        if not isinstance(key, str) or not isinstance(items, int) or items < 0:
            raise Refused("holds a storage whose name or size is none")
        self.storages[key] = items * _STORAGES[kind.kind].itemsize
        return kind(key, items)


def _is_kind(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Inert)


def _unpickle(file: BinaryIO | io.BytesIO) -> tuple[Any, dict[str, int]]:
    """The next pickle of `file` as plain containers and _Inert, and the bytes of every storage it names."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        read = file.tell() - start
        # the extension table answers without find_class; a memo index allocates all the smaller ones
        if opcode.name.startswith("EXT"):
            raise Refused(f"asks for the extension {argument} of Python's pickle, which no file of weights needs")
        if read > _LARGEST_PICKLE or ("PUT" in opcode.name and int(argument or 0) > read):
            raise Refused(f"holds a pickle beyond {_LARGEST_PICKLE >> 20} MiB")
    file.seek(start)
    unpickler = _Unpickler(file.read(read))
    return unpickler.load(), unpickler.storages


def read_pickle(path: Path, pick: _Pick) -> Weights:
    """float32 weights out of a file of torch.save, in either of its formats; tensors that `pick` leaves are not read.

    Raises ConfigError for a file that cannot be read, is damaged, is none of torch.save, or names anything that
    files of weights do not.
    """
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bad escapes in a pickle's texts
            head = file.read(len(_LEGACY))
            file.seek(0)
            if head.startswith(_ZIP):
                return _read_zip(file, pick)
            if head == _LEGACY:
                return _read_legacy(file, pick)
        hint = " (the log of the download, perhaps)" if head and head.isascii() else ""
        raise Refused(f"is no file of torch.save: it begins with {head!r}{hint}")
    except ConfigError:
        raise
    except Refused as error:
        raise ConfigError(f"{path} {error}; nothing of it was run: {CURE}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}): {CURE}") from error
    except DAMAGE as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): {CURE}") from error


def _read_zip(file: BinaryIO, pick: _Pick) -> Weights:
    with zipfile.ZipFile(file) as archive:
        roots = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise Refused("is a zip archive, but none of torch.save")
        prefix = roots[0].removesuffix("data.pkl")

        def record(name: str, limit: int) -> bytes:
            entry = archive.getinfo(prefix + name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
                raise Refused(f"holds more than {limit} bytes, or compressed ones, in {name[:100]!r}")
            return archive.read(entry)

        if f"{prefix}byteorder" in archive.namelist() and record("byteorder", 8) != b"little":
            raise Refused("was saved on a big-endian machine")
        wanted = pick(_unpickle(io.BytesIO(record("data.pkl", _LARGEST_PICKLE)))[0])
        return {name: _tensor(name, made, record) for name, made in wanted.items()}


def _read_legacy(file: BinaryIO, pick: _Pick) -> Weights:
    """torch.save before 1.6: five pickles, then every storage behind its number of items."""
    (_, protocol, system, root, keys), sizes = zip(*(_unpickle(file) for _ in range(5)), strict=True)
    if protocol != 1001 or system["little_endian"] is not True:
        raise Refused(f"is of protocol {str(protocol)[:20]}, not 1001, or of a big-endian machine")
    places: dict[str, int] = {}
    for key in keys:
        places[key] = file.tell() + 8
        file.seek(places[key] + sizes[3][key])

    def record(name: str, size: int) -> bytes:
        file.seek(places[name.removeprefix("data/")])
        return file.read(size)

    return {name: _tensor(name, made, record) for name, made in pick(root).items()}


def _tensor(name: str, made: Any, read: _Bytes) -> Tensor:
    """The float32 tensor that a pickle describes by storage, offset, size and stride."""
    if isinstance(made, Inert) and made.kind == _PARAMETER:
        made = made.arguments[0]
    if not isinstance(made, Inert) or made.kind != _TENSOR or made.arguments[0].kind not in _STORAGES:
        raise Refused(f"holds no plain tensor as {name[:100]!r}")
    source, offset, size, stride = made.arguments[:4]
    (key, items), dtype = source.arguments, _STORAGES[source.kind]
    # a stride of 0 would make a small storage a tensor beyond all memory
    if min(size, default=1) < 0 or math.prod(size) > items:
        raise Refused(f"holds a tensor of size {str(size)[:40]} in {items} numbers as {name[:100]!r}")
    data = bytearray(read(f"data/{key}", items * dtype.itemsize))
    if len(data) != items * dtype.itemsize:
        raise Refused(f"is cut: {name[:100]!r} has {len(data)} of {items * dtype.itemsize} bytes")
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.as_strided(size, stride, offset).float().contiguous()
