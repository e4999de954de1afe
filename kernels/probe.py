"""Whether a fused kernel gives on a device what its reference gives: compiled, launched and compared, once a process.

`auto` takes the kernel where it does. `doctor` asks the same at a config's sizes.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from beitforge.kernels.dispatch import ineligible
from beitforge.kernels.faults import faults, line_of

_found: dict[tuple, bool] = {}


class FallbackWarning(RuntimeWarning):
    """A fused kernel does not run on a GPU, and another implementation takes its place."""


def constant_when_compiled(function: Callable[..., bool]) -> Callable[..., bool]:
    """torch.compiler.assume_constant_result, which would import the compiler, and Triton, in seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def passes(kernel: str, device: torch.device, shape: tuple, check: Callable[[], list[str]]) -> bool:
    """Whether `check` finds nothing wrong with a kernel on a device; asked once for each kernel, device and shape.

    Whatever it raises counts: Triton, ptxas, a C compiler or a driver can be at fault. Warns with a FallbackWarning.
    """
    key = (kernel, device, *shape)
    if key not in _found:
        try:
            problem = ineligible(device)
            if not problem:
                with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                    problem = "".join(check()[:1])
        except faults() as error:
            problem = line_of(error)
        if problem:
            message = f"the fused {kernel} kernel is not used on {device}: {problem}"
            warnings.warn(message, FallbackWarning, stacklevel=4)
        _found[key] = not problem
    return _found[key]


def differences(
    name: str, ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> list[str]:
    """What is wrong with the value and the gradients of `ours`: their error against float64 may be twice the plain
    version's in the same precision, three times for gradients."""
    exact = with_gradients(reference, [tensor.double() for tensor in inputs])
    plain, found = with_gradients(reference, inputs), with_gradients(ours, inputs)
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


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients of its sum of squares."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    weights = torch.linspace(-1, 1, value.numel(), device=value.device, dtype=torch.float64)
    value.backward(weights.reshape(value.shape).to(value.dtype))
    return [value.detach(), *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)]
