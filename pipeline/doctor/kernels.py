"""Kernels against their references on this chip, for `doctor`, and what to do where they do not run. Must not know the
stages."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from beitforge.kernels.attention import attention, pack
from beitforge.kernels.attention import check as attention_check
from beitforge.kernels.cross_entropy import check as cross_entropy_check
from beitforge.kernels.cross_entropy import linear_cross_entropy
from beitforge.kernels.faults import faults, line_of
from beitforge.kernels.pixels import check as pixels_check
from beitforge.kernels.pixels import jittered
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.distributed.device import DTYPES
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


def _cure(line: str) -> str:
    fitting = [cure for words, cure in _CURES if words in line.lower()]
    return f"{fitting[0]}; or {_WITHOUT}" if fitting else _REPORT


def kernels(config: Config, device: torch.device, local: Local) -> None:
    """Attention, cross entropy and pixels at this model's sizes against their references on this chip.

    The error against float64 may be at most twice that of the plain low-precision version, three times for gradients.
    """
    model, name, vocabulary = config.model, config.model.kernels, config.tokenizer.vocabulary
    dtype, head_size = DTYPES[config.train.precision], model.width // model.heads
    problems: dict[str, str] = {}  # with their cures

    def attended(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(qkv, bias, pack(bias, head_size, qkv.dtype, name), name)

    entropy = partial(linear_cross_entropy, implementation=name)
    shape = (model.num_patches + 1, model.heads, head_size)
    checks: tuple[tuple[str, Callable[[], list[str]]], ...] = (
        ("attention", lambda: attention_check.problems(*shape, device, dtype, attended)),
        ("cross entropy", lambda: cross_entropy_check.problems(vocabulary, model.width, device, dtype, entropy)),
        ("pixels", lambda: pixels_check.problems(*model.input_size, device, partial(jittered, implementation=name))),
    )
    for kernel, check in checks:
        try:
            problems |= dict.fromkeys(check(), _REPORT)
        except faults() as error:
            line = line_of(error)
            problems[f"{kernel} does not run: {line}"] = _cure(line)
    for problem, cure in problems.items():
        local.add(STOP, "kernels", problem, cure)
    if not problems:
        local.add(OK, "kernels", f"agree with their references in {str(dtype).removeprefix('torch.')}")
