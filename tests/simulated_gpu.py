"""A GPU that is none: tensors which say they are on `cuda:0`, have values, and refuse what CUDA refuses.

Its tensors keep their values on the CPU. An operation on them together with a tensor that was left on the CPU raises,
as it does on a GPU; so do a NumPy view, a generator of the CPU, and a Triton kernel that is given memory of the host.
Streams are in order: what one wrote is not to be read on another that has not waited for it. Unlike torch's `meta`
device and its fake tensors it has values, so that code which reads them (`.item()`, masks, sorting) is walked too, its
results can be compared, and Triton's kernels run, interpreted.

What it cannot show is in docs/contributing.md, "What is tested without a GPU, and what is not".
"""

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from tests.simulated_streams import DEFAULT, HERE, Event, Stream, on_stream, synchronize

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # looked at when Triton is imported, as in tests/kernels
DEVICE = torch.device("cuda", 0)
_ATEN = torch.ops.aten
# between devices, or with indices of the host: as CUDA has it
_ACROSS = {_ATEN.copy_, _ATEN._to_copy, _ATEN.index, _ATEN.index_put_, _ATEN.index_put, _ATEN._index_put_impl_}
# results whose shape or value the host waits for
_READS = {_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.equal, _ATEN._unique2, _ATEN.bincount, _ATEN.masked_select}


class _Memory:
    """What a tensor and its views share: the stream it was made on, where it was last written, who else used it."""

    def __init__(self, gpu: "Gpu"):
        self.home = HERE.stream
        self.written = (HERE.stream, HERE.stream.issued)
        self.users: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.recorded: weakref.WeakSet[Stream] = weakref.WeakSet()
        weakref.finalize(self, _freed, gpu, self.users, self.recorded)


def _freed(gpu: "Gpu", users: set, recorded: set) -> None:
    if set(users) - set(recorded):
        gpu.faults.append("memory was freed that another stream may still read: record_stream is missing")


class GpuTensor(torch.Tensor):
    """Of torch's C++ it is on `meta`, which has no kernels to fall back to; of Python it is on DEVICE."""

    held: Tensor
    memory: _Memory
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, memory: _Memory) -> "GpuTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            requires_grad=False,
        )
        made.held, made.memory = held, memory
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "GpuTensor") -> None:
        torch.Tensor.data.__set__(self, other)
        self.held, self.memory = other.held, other.memory

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def record_stream(self, stream: Stream) -> None:
        self.memory.recorded.add(stream)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.held.detach().__reduce_ex__(protocol)  # files hold what is loaded onto the CPU

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"GpuTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _gpu().run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, *_: Any) -> "GpuTensor":
        return GpuTensor(inner["held"], _Memory(_gpu()))


class Generator(torch.Generator):
    """Of the GPU, when made for it. torch hands on what is inside of it, so that is what the GPU knows it by."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        if made.place.type == "cuda":
            _gpu().generators[_inside(made)] = made
        return made

    @property
    def device(self) -> torch.device:
        return self.place


def _inside(generator: torch.Generator) -> int:
    """The address of its C++ object, which torch's Python object has as its one field."""
    return ctypes.c_void_p.from_address(id(generator) + object.__basicsize__).value or 0


class Gpu(TorchDispatchMode):
    """The simulated device while it is entered.

    waits: what the host waited for the device for, in order. faults: races that showed only later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = HERE.waits = []
        self.faults: list[str] = []
        self.really_meta = False  # within `with torch.device("meta")`
        self.generators: dict[int, Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operation where its tensors are, or where its `device` says."""
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        asked = kwargs.get("device")
        there = bool(ours) if asked is None else self._means_the_gpu(torch.device(asked))
        if not ours and not there:
            return func(*args, **kwargs)
        if func.namespace == "beitforge":
            return self._own_operator(func, args, kwargs)
        self._refuse(
            func, args, kwargs, [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)], bool(ours)
        )
        HERE.stream.issued += 1
        for tensor in ours:
            self._read(tensor)
        self._note_waits(func, args, ours, there)
        plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
        if asked is not None:
            plain_kwargs["device"] = torch.device("cpu")
        found = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable:
            for tensor in ours:
                if any(tensor is args[i] for i, a in enumerate(func._schema.arguments[: len(args)]) if _written(a)):
                    tensor.memory.written = (HERE.stream, HERE.stream.issued)
        if not there:
            return found
        known = {tensor.held.untyped_storage()._cdata: tensor.memory for tensor in ours}
        made = tree_map(lambda item: self._wrapped(item, known), found)
        return return_and_correct_aliasing(func, args, kwargs, made) if ours else made

    def _means_the_gpu(self, device: torch.device) -> bool:
        """Asked for by name; or, as `meta`, by torch's C++ for something like a tensor of the GPU."""
        return device.type == "cuda" or (device.type == "meta" and not self.really_meta)

    def _wrapped(self, item: Any, known: dict[int, _Memory]) -> Any:
        if not isinstance(item, Tensor) or isinstance(item, GpuTensor):
            return item
        return GpuTensor(item, known.get(item.untyped_storage()._cdata) or _Memory(self))

    def _own_operator(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What this project registered: its Python is walked, down to the launch of its kernels."""
        definition = torch._library.custom_ops.OPDEFS[f"{func.namespace}::{func._opname}"]
        with self:
            return definition._init_fn(*args, **kwargs)

    def _refuse(self, func: Any, args: tuple, kwargs: dict, host: list[Tensor], mixed: bool) -> None:
        generator = kwargs.get("generator")
        if generator is not None and _inside(generator) not in self.generators:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
        pointwise = torch.Tag.pointwise in func.tags
        wrong = [tensor for tensor in host if not (pointwise and tensor.dim() == 0)]
        if mixed and wrong and func.overloadpacket not in _ACROSS and func.namespace == "aten":
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in wrong)
            raise RuntimeError(f"{func}: expected all tensors to be on cuda:0, found {shapes} on cpu")

    def _read(self, tensor: GpuTensor) -> None:
        stream, number = tensor.memory.written
        if stream is not HERE.stream and HERE.stream.seen.get(stream, 0) < number:
            raise RuntimeError("a race: a tensor is read on a stream that has not waited for the one that wrote it")
        if tensor.memory.home is not HERE.stream:
            tensor.memory.users.add(HERE.stream)

    def _note_waits(self, func: Any, args: tuple, ours: list[GpuTensor], there: bool) -> None:
        masked = func.overloadpacket in (_ATEN.index, _ATEN.index_put_) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        away = func.overloadpacket is _ATEN._to_copy and bool(ours) and not there
        away |= func.overloadpacket is _ATEN.copy_ and bool(ours) and not isinstance(args[0], GpuTensor)
        if func.overloadpacket in _READS or masked or away:
            self.waits.append(str(func.overloadpacket).removeprefix("aten."))


def _held(item: Any) -> Any:
    return item.held if isinstance(item, GpuTensor) else item


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


_entered: list[Gpu] = []


def _gpu() -> Gpu:
    assert _entered, "a tensor of the simulated GPU is used outside of it"
    return _entered[-1]


@contextlib.contextmanager
def simulated_gpu(monkeypatch: Any) -> Iterator[Gpu]:
    """This process with one GPU, an H200 as far as code asks. At the end it raises for races that showed."""
    gpu = Gpu()
    _replace(monkeypatch, gpu)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # as torch's fake tensors: else torch.tensor(…, device=…) goes past us
    _entered.append(gpu)
    try:
        with gpu:
            yield gpu
    finally:
        _entered.pop()
        torch._C._set_only_lift_cpu_tensors(before)
    assert not gpu.faults, gpu.faults


def _replace(monkeypatch: Any, gpu: Gpu) -> None:
    """torch.cuda, pinned memory, generators and Triton's launches."""
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": lambda device=None: HERE.stream,
        "default_stream": lambda device=None: DEFAULT,
        "synchronize": synchronize,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_device_properties": lambda device=None: SimpleNamespace(
            uuid="00000000", name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30
        ),
        "mem_get_info": lambda device=None: (130 << 30, 141 << 30),
        "is_bf16_supported": lambda including_emulation=True: True,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        **{f"{kind}_{what}": lambda device=None: 1 << 20 for kind in ("memory", "max_memory") for what in
           ("allocated", "reserved")},
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    plain = DeviceContext.__torch_function__

    def within(self: DeviceContext, *args: Any, **kwargs: Any) -> Any:
        before, gpu.really_meta = gpu.really_meta, self.device.type == "meta"
        try:
            return plain(self, *args, **kwargs)
        finally:
            gpu.really_meta = before

    monkeypatch.setattr(DeviceContext, "__torch_function__", within)
    for name in ("range_push", "range_pop"):
        monkeypatch.setattr(torch.cuda.nvtx, name, lambda *_, **__: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", _pinned)
    # a module is moved by swapping its parameters, which torch leaves to who has a weak reference, as DeepSpeed has
    monkeypatch.setattr(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda tensor: []))
    for where, name in ((torch.Tensor, "to"), (torch, "tensor")):
        monkeypatch.setattr(where, name, _with_numbers(getattr(where, name)))
    monkeypatch.setattr(torch, "Generator", Generator)
    _replace_launches(monkeypatch)


def replace_nccl(monkeypatch: Any) -> None:
    """gloo in its place, which moves the values; like NCCL it takes no memory of the host from who asks for it."""
    import torch.distributed as dist

    start = dist.init_process_group

    def on_gpus(plain: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            given = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
            if any(not isinstance(tensor, GpuTensor) for tensor in given):
                raise RuntimeError("No backend type associated with device type cpu")
            return plain(*args, **kwargs)

        return collective

    def gloo(backend: str = "", *args: Any, **kwargs: Any) -> Any:
        assert backend == "nccl", f"a GPU's processes meet by NCCL, not {backend}"
        return start("gloo", *args, **kwargs)

    monkeypatch.setattr(dist, "init_process_group", gloo)
    for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(dist, name, on_gpus(getattr(dist, name)))


def _pinned(tensor: Tensor, device: Any = None) -> Tensor:
    assert not isinstance(tensor, GpuTensor), "only memory of the host is pinned"
    return tensor.clone()


def _with_numbers(plain: Any) -> Any:
    """Tensor.to and torch.tensor ask a driver for the number of a device that is given without."""

    def numbered(*args: Any, **kwargs: Any) -> Any:
        return plain(*map(_numbered, args), **{name: _numbered(value) for name, value in kwargs.items()})

    return numbered


def _numbered(item: Any) -> Any:
    return DEVICE if isinstance(item, str | torch.device) and str(item) == "cuda" else item


def _replace_launches(monkeypatch: Any) -> None:
    """The interpreter runs a kernel on the values; memory of the host is refused, as a GPU cannot read it."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    launch = interpreter.GridExecutor.__call__

    def on_gpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if any(isinstance(item, GpuTensor) for item in given):
            for number, item in enumerate(given):
                if isinstance(item, Tensor) and not isinstance(item, GpuTensor):
                    raise ValueError(f"Pointer argument (at {number}) cannot be accessed from Triton (cpu tensor?)")
            gpu = _gpu()
            HERE.stream.issued += 1
            for item in given:
                if isinstance(item, GpuTensor):
                    gpu._read(item)
                    item.memory.written = (HERE.stream, HERE.stream.issued)
            with torch._C._DisableTorchDispatch():
                args, kwargs = tree_map(_held, (args, kwargs))
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", on_gpu)
