"""Tokenizers as their publishers saved them, read without running anything of the file.

OpenAI's encoder.pkl and decoder.pkl are whole pickled modules, and VQ-KD's .pth is a pickled dictionary. A pickle names
functions and the reader calls them; here every name it may use stands for an `_Inert`, which records what it is given
and does nothing. torch.load is not used: it hands some archives to other loaders, and its storages to torch's own
functions. Must not know shards, deepspeed or any stage.
"""

import dataclasses
import io
import itertools
import json
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.dalle import Dalle, DalleShape, flava_name, openai_name
from pipeline.vqkd import Vqkd, VqkdShape, published_name

Weights = dict[str, Tensor]
_Pick = Callable[[Any], dict[str, "_Inert"]]  # from what was saved, the tensors that are wanted, by name
_Bytes = Callable[[str, int], bytes]  # of a storage, data/KEY, and how many they must be
_Names = Callable[[str], str]  # our name of a weight to its publisher's

_ENCODER, _DECODER = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
# All that published files ask for, in full: a longer name, with a dot more, is another.
_ADMITTED = f"""
{_ENCODER} dall_e.encoder.EncoderBlock {_DECODER} dall_e.decoder.DecoderBlock dall_e.utils.Conv2d
torch.nn.modules.container.Sequential torch.nn.modules.activation.ReLU torch.nn.modules.linear.Identity
torch.nn.modules.pooling.MaxPool2d torch.nn.modules.upsampling.Upsample
{_TENSOR} {_PARAMETER} torch.device builtins.set __builtin__.set argparse.Namespace
numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.dtype _codecs.encode
""".split()  # the last line: learning rates in VQ-KD's optimizer
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
_GROUPS = 4  # of residual blocks in DALL-E's halves
_HEAD = 64  # size of VQ-KD's attention heads
# what else its training saves: the decoder, the codebook's statistics, the teacher
_VQKD_LEFT = re.compile(
    r"decode|quantize\.(cluster_size|embedding\.(cluster_size|embed_avg|initted))|loss|teacher|scaling"
)
_FLAVA = re.compile(r"(image_codebook\.)?blocks\.")  # alone, or within a whole FLAVA
_CURE = "give the file as its publisher serves it, downloaded whole"
# what reading a damaged or forged file can end in
_DAMAGE: tuple[type[Exception], ...] = (pickle.PickleError, zipfile.BadZipFile, EOFError, LookupError, MemoryError)
_DAMAGE += (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


class _Refused(Exception):
    """What a file asks for or lacks; becomes a line with its path."""


class _Inert:
    """What a pickle's classes and functions, and what it makes of them, become: a record of what it said."""

    kind = ""  # the name it asked for
    arguments: tuple[Any, ...]
    state: Any
    __slots__ = ("arguments", "state")

    def __new__(cls, *arguments: Any) -> "_Inert":
        made = object.__new__(cls)
        made.arguments, made.state = arguments, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


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
            raise _Refused(f"asks for the global {kind[:100]!r}, which no published tokenizer needs")
        return type(name, (_Inert,), {"__slots__": (), "kind": kind})

    def persistent_load(self, identity: Any) -> Any:
        """A storage is named, not read: an _Inert of its kind with key and number of items."""
        sort, kind, *rest = identity
        if sort == "module" and _is_kind(kind):
            return kind  # the old format names a class so, and adds its source
        plain = sort == "storage" and _is_kind(kind) and kind.kind in _STORAGES and len(rest) in (3, 4)
        if not plain or any(view is not None for view in rest[3:]):
            raise _Refused(f"holds a persistent object that is no plain storage ({str(sort)[:40]!r})")
        key, _, items = rest[:3]
        if not isinstance(key, str) or not isinstance(items, int) or items < 0:
            raise _Refused("holds a storage whose name or size is none")
        self.storages[key] = items * _STORAGES[kind.kind].itemsize
        return kind(key, items)


def _is_kind(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, _Inert)


def _unpickle(file: BinaryIO | io.BytesIO) -> tuple[Any, dict[str, int]]:
    """The next pickle of `file` as plain containers and _Inert, and the bytes of every storage it names."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        read = file.tell() - start
        # the extension table answers without find_class; a memo index makes room for all the smaller ones
        if opcode.name.startswith("EXT"):
            raise _Refused(f"asks for the extension {argument} of Python's pickle, which no published tokenizer needs")
        if read > _LARGEST_PICKLE or ("PUT" in opcode.name and int(argument or 0) > read):
            raise _Refused(f"holds a pickle beyond {_LARGEST_PICKLE >> 20} MiB")
    file.seek(start)
    unpickler = _Unpickler(file.read(read))
    return unpickler.load(), unpickler.storages


def read_pickle(path: Path, pick: _Pick) -> Weights:
    """float32 weights out of a file of torch.save, in either of its formats; tensors that `pick` leaves are not read.

    Raises ConfigError for a file that cannot be read, is damaged, is none of torch.save, or names anything that
    published tokenizers do not.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bad escapes in a pickle's texts
            head = file.read(len(_LEGACY))
            file.seek(0)
            if head.startswith(_ZIP):
                return _read_zip(file, pick)
            if head == _LEGACY:
                return _read_legacy(file, pick)
        hint = " (the log of the download, perhaps)" if head and head.isascii() else ""
        raise _Refused(f"is no file of torch.save: it begins with {head!r}{hint}")
    except _Refused as error:
        raise ConfigError(f"{path} {error}; nothing of it was run: {_CURE}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}): {_CURE}") from error
    except _DAMAGE as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): {_CURE}") from error


def _read_zip(file: BinaryIO, pick: _Pick) -> Weights:
    with zipfile.ZipFile(file) as archive:
        roots = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise _Refused("is a zip archive, but none of torch.save")
        prefix = roots[0].removesuffix("data.pkl")

        def record(name: str, limit: int) -> bytes:
            entry = archive.getinfo(prefix + name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
                raise _Refused(f"holds more than {limit} bytes, or compressed ones, in {name[:100]!r}")
            return archive.read(entry)

        if f"{prefix}byteorder" in archive.namelist() and record("byteorder", 8) != b"little":
            raise _Refused("was saved on a big-endian machine")
        wanted = pick(_unpickle(io.BytesIO(record("data.pkl", _LARGEST_PICKLE)))[0])
        return {name: _tensor(name, made, record) for name, made in wanted.items()}


def _read_legacy(file: BinaryIO, pick: _Pick) -> Weights:
    """torch.save before 1.6: five pickles, then every storage behind its number of items."""
    (_, protocol, system, root, keys), sizes = zip(*(_unpickle(file) for _ in range(5)), strict=True)
    if protocol != 1001 or system["little_endian"] is not True:
        raise _Refused(f"is of protocol {str(protocol)[:20]}, not 1001, or of a big-endian machine")
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
    if isinstance(made, _Inert) and made.kind == _PARAMETER:
        made = made.arguments[0]
    if not isinstance(made, _Inert) or made.kind != _TENSOR or made.arguments[0].kind not in _STORAGES:
        raise _Refused(f"holds no plain tensor as {name[:100]!r}")
    source, offset, size, stride = made.arguments[:4]
    (key, items), dtype = source.arguments, _STORAGES[source.kind]
    # a stride of 0 would make a small storage a tensor beyond all memory
    if min(size, default=1) < 0 or math.prod(size) > items:
        raise _Refused(f"holds a tensor of size {str(size)[:40]} in {items} numbers as {name[:100]!r}")
    data = bytearray(read(f"data/{key}", items * dtype.itemsize))
    if len(data) != items * dtype.itemsize:
        raise _Refused(f"is cut: {name[:100]!r} has {len(data)} of {items * dtype.itemsize} bytes")
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.as_strided(size, stride, offset).float().contiguous()


def read_dalle_pickles(encoder: Path, decoder: Path | None) -> tuple[DalleShape, Weights]:
    """OpenAI's encoder.pkl and, if given, decoder.pkl: shape and weights of a pipeline.dalle.Dalle.

    Raises ConfigError for a file that is not theirs.
    """
    encoded = read_pickle(encoder, lambda saved: _module_tensors(saved, _ENCODER))
    shape = _encoder_shape(encoder, encoded, openai_name)
    decoded: Weights = {}
    if decoder is not None:
        decoded = read_pickle(decoder, lambda saved: _module_tensors(saved, _DECODER))
        shape = dataclasses.replace(
            shape,
            decoder_hidden=_sizes(decoder, decoded, "blocks.output.conv.w", 4)[1],
            decoder_init=_sizes(decoder, decoded, "blocks.input.w", 4)[0],
            decoder_blocks_per_group=_blocks(decoded, openai_name),
            has_decoder=True,
        )
    dalle = _meta(shape)
    weights = _ours(encoder, dalle.encoder, encoded, openai_name, "encoder.")
    if decoder is not None and dalle.decoder is not None:
        weights |= _ours(decoder, dalle.decoder, decoded, openai_name, "decoder.")
    return shape, weights


def _module_tensors(root: Any, kind: str) -> dict[str, _Inert]:
    """The parameters of a saved module, under the names its state dict would give them."""
    if not isinstance(root, _Inert) or root.kind != kind:
        held = root.kind if isinstance(root, _Inert) else type(root).__name__.strip("_").lower()
        raise _Refused(f"holds a {held}, not a {kind}")
    found: dict[str, _Inert] = {}
    seen: set[int] = set()
    left = [("", root)]
    while left:
        prefix, module = left.pop()
        # a module in itself would have endless names, and a long chain of modules long ones
        if id(module) in seen or len(prefix) > 100 or not isinstance(module, _Inert):
            raise _Refused(f"holds no module of its own as {prefix[:100]!r}")
        seen.add(id(module))
        own: dict[str, Any] = module.state.get("_parameters", {})
        inner: dict[str, Any] = module.state.get("_modules", {})
        found |= {f"{prefix}{name}": tensor for name, tensor in own.items() if tensor is not None}
        left += [(f"{prefix}{name}.", child) for name, child in inner.items() if child is not None]
    return found


def read_flava_codebook(folder_or_file: Path) -> tuple[DalleShape, Weights]:
    """A FlavaImageCodebook of `transformers`, alone or within a whole FLAVA: model.safetensors or pytorch_model.bin.

    Its names are the encoder's with two more levels; a decoder it has not. Raises ConfigError for anything else.
    """
    path = folder_or_file
    if path.is_dir():
        safe = path / "model.safetensors"
        path = safe if safe.exists() else path / "pytorch_model.bin"
        if not path.exists():
            raise ConfigError(f"{folder_or_file} holds neither model.safetensors nor pytorch_model.bin: {_CURE}")
    _check_flava_config(path.with_name("config.json"))
    found = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, _flava_tensors)
    inner = {name.removeprefix("image_codebook."): tensor for name, tensor in found.items()}
    shape = _encoder_shape(path, inner, flava_name)
    return shape, _ours(path, _meta(shape).encoder, inner, flava_name, "encoder.")


def _check_flava_config(path: Path) -> None:
    """The one setting that changes the tokens and shows in no weight."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        part = content.get("image_codebook_config") or content
        groups = part.get("num_groups", _GROUPS)
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): {_CURE}") from error
    if groups != _GROUPS:
        raise ConfigError(f"{path} says num_groups {groups!r:.40}; DALL-E's encoder has {_GROUPS}: {_CURE}")


def _flava_tensors(root: Any) -> dict[str, _Inert]:
    if not isinstance(root, dict):
        raise _Refused("holds no state dict")
    return {name: tensor for name, tensor in root.items() if _FLAVA.match(name)}


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys() if _FLAVA.match(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): {_CURE}") from error


def read_vqkd(path: Path) -> tuple[VqkdShape, Weights]:
    """BEiT v2's vqkd_encoder_base_*.pth: shape and weights of a pipeline.vqkd.Vqkd; its decoder is left where it is.

    The number of heads shows in no weight: it is width / 64, as in every published one. Raises ConfigError for anything
    that is not such a file.
    """
    found = read_pickle(path, _vqkd_tensors)
    width, _, patch_size, _ = _sizes(path, found, "encoder.patch_embed.proj.weight", 4)
    if width % _HEAD:
        raise ConfigError(f"{path} has width {width}; a VQ-KD tokenizer's is a multiple of {_HEAD}: {_CURE}")
    vocabulary, code_size = _sizes(path, found, "quantize.embedding.weight", 2)
    positions = _sizes(path, found, "encoder.pos_embed", 3)[1] - 1
    shape = VqkdShape(
        vocabulary=vocabulary,
        code_size=code_size,
        layers=_count(lambda layer: f"encoder.blocks.{layer}.norm1.weight" in found),
        width=width,
        heads=width // _HEAD,
        input_size=max(1, math.isqrt(positions)) * patch_size,
        patch_size=patch_size,
    )
    found["encoder.patch_embed.proj.weight"] = found["encoder.patch_embed.proj.weight"].flatten(1)
    with torch.device("meta"):
        vqkd = Vqkd(shape)
    return shape, _ours(path, vqkd, found, published_name, "")


def _vqkd_tensors(root: Any) -> dict[str, _Inert]:
    if not isinstance(root, dict):
        raise _Refused("holds no dictionary with the model in it")
    settings = root.get("args")
    if isinstance(settings, _Inert) and settings.state.get("process_type", "default") != "default":
        raise _Refused("was trained with another process_type than default, so on pixels in another range")
    model: Any = root.get("model", root.get("state_dict", root))
    return {name: tensor for name, tensor in model.items() if not _VQKD_LEFT.match(name)}


def _encoder_shape(path: Path, weights: Weights, theirs: _Names) -> DalleShape:
    """Of a DALL-E encoder alone."""
    return DalleShape(
        vocabulary=_sizes(path, weights, theirs("blocks.output.conv.weight"), 4)[0],
        hidden=_sizes(path, weights, theirs("blocks.input.weight"), 4)[0],
        blocks_per_group=_blocks(weights, theirs),
        has_decoder=False,
    )


def _meta(shape: DalleShape) -> Dalle:
    with torch.device("meta"):
        return Dalle(shape)


def _blocks(weights: Weights, theirs: _Names) -> int:
    return _count(lambda number: theirs(f"blocks.group_1.block_{number + 1}.res_path.conv_1.weight") in weights)


def _count(there: Callable[[int], bool]) -> int:
    """How many are there, from number 0 on; 1 for none, whose weights will be missed."""
    return next(number for number in itertools.count(1) if not there(number))


def _sizes(path: Path, weights: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a weight that tells the shape of the whole."""
    found = tuple(weights[name].shape) if name in weights else ()
    if len(found) != dimensions or min(found) < 1:
        held = f"is of shape {list(found)}" if name in weights else "is missing"
        raise ConfigError(f"{path}: {name} {held}, where {dimensions} dimensions are due: {_CURE}")
    return found


def _ours(path: Path, module: nn.Module, weights: Weights, theirs: _Names, prefix: str) -> Weights:
    """Weights by our names, with `prefix`, if they are those that `module` has, all of them and no others."""
    due = {theirs(name): (f"{prefix}{name}", list(tensor.shape)) for name, tensor in module.state_dict().items()}
    for name in sorted(due.keys() - weights.keys()):
        raise ConfigError(f"{path} lacks the weight {name!r} of such a tokenizer: {_CURE}")
    for name in sorted(weights.keys() - due.keys()):
        raise ConfigError(f"{path} has a weight {name[:100]!r} that such a tokenizer has not: {_CURE}")
    for name, (_, size) in due.items():
        if list(weights[name].shape) != size:
            raise ConfigError(f"{path}: {name} is of shape {list(weights[name].shape)}, where {size} is due: {_CURE}")
        if not weights[name].isfinite().all():
            raise ConfigError(f"{path}: {name} holds numbers that are not finite: {_CURE}")
    return {ours: weights[name] for name, (ours, _) in due.items()}
