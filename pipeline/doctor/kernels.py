"""Kernels against their references on this chip, for `doctor`, and what to do where they do not run. Must not know the
stages."""

from collections.abc import Callable

import torch
from torch import Tensor

from beitforge.kernels.attention import attention, pack
from beitforge.kernels.attention.reference import attention_reference
from beitforge.kernels.cross_entropy import linear_cross_entropy
from beitforge.kernels.cross_entropy.reference import linear_cross_entropy_reference
from beitforge.kernels.faults import faults
from beitforge.kernels.pixels import jittered
from beitforge.kernels.pixels.reference import jittered_reference
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.doctor.device import dtype_of
from beitforge.pipeline.doctor.findings import OK, STOP, Local

_WITHOUT = "set model.kernels=sdpa (or reference)"
_REPORT = f"{_WITHOUT}, and report the chip and the versions of torch and triton"
# words of an error: what else cures it; the first that fits
_CURES = (
    ("c compiler", "install a C compiler (gcc), or name one in CC: Triton builds its launcher with it"),
    ("gcc", "install the headers of this Python (python3-dev): Triton builds its launcher with them"),
    ("clang", "install the headers of this Python (python3-dev): Triton builds its launcher with them"),
    ("ptxas", "unset TRITON_PTXAS_PATH, or install the triton that this torch was built with"),
    ("libcuda", "see that the driver's libcuda.so.1 is found (ldconfig -p, LD_LIBRARY_PATH)"),
    ("triton_cache_dir", "set TRITON_CACHE_DIR to a folder of this host that can be written and executed from"),
    (".triton", "set TRITON_CACHE_DIR to a folder of this host that can be written and executed from"),
    ("out of memory", "end what else holds the GPU's memory"),
    ("no module named", "install triton"),
)


def line_of(error: Exception) -> str:
    """What an error says, in one line: of a compilation not the source that it quotes, but what it came of; its kind
    where that says more."""
    while isinstance(error.__cause__, Exception) and getattr(error, "error_message", "") is None:
        error = error.__cause__
    words = " ".join(str(getattr(error, "error_message", None) or error).split())[:400]
    plain = words and isinstance(error, RuntimeError | ValueError | OSError)
    return words if plain else f"{type(error).__name__}: {words}".removesuffix(": ")


def _cure(line: str) -> str:
    fitting = [cure for words, cure in _CURES if words in line.lower()]
    return f"{fitting[0]}; or {_WITHOUT}" if fitting else _REPORT


def kernels(config: Config, device: torch.device, local: Local) -> None:
    """Attention, cross entropy and pixels at this model's sizes against their references on this chip.

    The error against float64 may be at most twice that of the plain low-precision version, three times for gradients.
    """
    dtype = dtype_of(config)
    generator = torch.Generator().manual_seed(0)
    problems: dict[str, str] = {}  # with their cures
    checks: tuple[tuple[str, Callable[[], list[str]]], ...] = (
        ("attention", lambda: _attention_differs(config, device, dtype, generator)),
        ("cross entropy", lambda: _cross_entropy_differs(config, device, dtype, generator)),
        ("pixels", lambda: _pixels_differ(config, device, generator)),
    )
    for name, check in checks:
        try:
            problems |= dict.fromkeys(check(), _REPORT)
        except faults() as error:
            line = line_of(error)
            problems[f"{name} does not run: {line}"] = _cure(line)
    for problem, cure in problems.items():
        local.add(STOP, "kernels", problem, cure)
    if not problems:
        local.add(OK, "kernels", f"agree with their references in {str(dtype).removeprefix('torch.')}")


def _attention_differs(
    config: Config, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> list[str]:
    model = config.model
    s, a = model.num_patches + 1, model.heads
    k = model.width // a
    qkv = torch.randn(2, s, 3, a, k, generator=generator).to(device, dtype)
    bias = torch.randn(a, s, s, generator=generator).to(device)

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(qkv, bias, pack(bias, k, qkv.dtype, model.kernels), model.kernels)

    return _differs("attention", ours, attention_reference, [qkv, bias], dtype)


def _cross_entropy_differs(
    config: Config, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> list[str]:
    width, vocabulary = config.model.width, config.tokenizer.vocabulary
    x = torch.randn(64, width, generator=generator).to(device, dtype)
    weight = (0.1 * torch.randn(vocabulary, width, generator=generator)).to(device, dtype)
    bias = torch.randn(vocabulary, generator=generator).to(device, dtype)
    tokens = torch.randint(vocabulary, (64,), generator=generator).to(device)
    counts = torch.ones(64, device=device)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, bias, tokens, counts, config.model.kernels)[0]

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x, weight, bias, tokens, counts.to(x.dtype))[0]

    return _differs("cross entropy", ours, reference, [x, weight, bias], dtype)


def _differs(
    name: str, ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> list[str]:
    """Value and gradients by ours and by the plain version, both against float64."""
    exact = _with_gradients(reference, [tensor.double() for tensor in inputs])
    plain, found = _with_gradients(reference, inputs), _with_gradients(ours, inputs)
    problems = []
    for i, (got, low, true) in enumerate(zip(found, plain, exact, strict=True)):
        what = f"{name}{' backward' if i else ''}"
        if not bool(torch.isfinite(got).all()):
            problems.append(
                f"{what} gives values that are not finite where its reference gives {true.flatten()[0]:.3g}"
            )
            continue
        slack = 8 * torch.finfo(dtype).eps * float(true.abs().max())
        error, allowed = (float((tensor.double() - true).abs().max()) for tensor in (got, low))
        if error > (3 if i else 2) * allowed + slack:
            problems.append(f"{what} is off by {error:.2g}; the plain version by {allowed:.2g}")
    return problems


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients of its sum of squares."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    weights = torch.linspace(-1, 1, value.numel(), device=value.device, dtype=torch.float64)
    value.backward(weights.reshape(value.shape).to(value.dtype))
    return [value.detach(), *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)]


def _pixels_differ(config: Config, device: torch.device, generator: torch.Generator) -> list[str]:
    height, width = config.model.input_size
    views = (
        torch.randint(256, (2, 3, height, width), generator=generator, dtype=torch.uint8),
        torch.rand(2, 3, generator=generator) + 0.5,
        torch.arange(2),
        torch.full((2,), 117.0),
    )
    normal = (config.model.mean, config.model.std)
    pixels, jitters, orders, greys = (view.to(device) for view in views)
    there = jittered(pixels, jitters, orders, greys, normal, torch.float32, config.model.kernels)
    same = torch.equal(there.cpu(), jittered_reference(*views, normal, torch.float32))
    return [] if same else ["pixels are not bit for bit those of its reference"]
