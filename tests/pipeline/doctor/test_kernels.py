"""What `doctor` says of kernels: right, wrong, and not running, whatever Triton, a compiler or a driver raised."""

import ast
import errno
import subprocess

import pytest
import torch

from beitforge.kernels import attention
from beitforge.kernels.faults import faults
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.doctor import kernels
from beitforge.pipeline.doctor.findings import OK, STOP, Local
from beitforge.pipeline.stages import doctor
from tests.pipeline.doctor.test_doctor import CPU, found

pytest.importorskip("triton")
compiling = pytest.importorskip("triton.compiler.errors")
running = pytest.importorskip("triton.runtime.errors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_agree_here(tiny, precision):
    local = Local("here", 0)
    kernels.kernels(load_config(str(tiny.config), [f"train.precision={precision}"]), CPU, local)
    assert "agree with their references" in found(local, "kernels", OK)


@pytest.mark.parametrize(("wrong", "words"), [(float("nan"), "not finite"), (1.01, "is off by")])
def test_a_kernel_that_is_wrong(tiny, monkeypatch, wrong, words):
    right = attention.attention
    monkeypatch.setattr(kernels, "attention", lambda *given: right(*given) * wrong)
    local = Local("here", 0)
    kernels.kernels(load_config(str(tiny.config), []), CPU, local)
    assert f"attention {'gives values that are ' if words == 'not finite' else ''}{words}" in found(
        local, "kernels", STOP
    )


def nested() -> Exception:
    """As Triton reports a function that a kernel calls: the message is that of the cause."""
    outer = compiling.CompilationError("def f():\n    g()", ast.parse("g()").body[0], None)
    outer.__cause__ = compiling.CompilationError(
        "def g():\n    h", ast.parse("h").body[0], "NameError('h is not defined')"
    )
    return outer


NODE = ast.parse("x = 1").body[0]
SOURCE = "\n".join(f"    line {number}" for number in range(40))
# what is raised, words of the finding, words of its cure
RAISED = [
    (running.OutOfResources(300_000, 232_448, "shared memory"), "Hardware limit: 232448", "model.kernels=sdpa"),
    (running.InterpreterError("a loop without end"), "InterpreterError: a loop without end", "report the chip"),
    (compiling.CompilationError(SOURCE, NODE, "at no cost"), "CompilationError: at no cost", "report the chip"),
    (compiling.CompileTimeAssertionFailure(SOURCE, NODE, "BM > 8"), "BM > 8", "report the chip"),
    (compiling.UnsupportedLanguageConstruct(SOURCE, NODE, "a lambda"), "a lambda", "report the chip"),
    (nested(), "h is not defined", "report the chip"),
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "find C compiler", "install a C compiler"),
    (RuntimeError("PassManager::run failed"), "PassManager", "report the chip"),
    (RuntimeError("Cannot find ptxas"), "ptxas", "TRITON_PTXAS_PATH"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory", "end what else holds"),
    (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-O3"]), "gcc", "headers of this Python"),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/usr/local/cuda/bin/ptxas"),
        "ptxas",
        "TRITON_PTXAS",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "/root/.triton/cache"), "Permission", "TRITON_CACHE_DIR"),
    (OSError(errno.ENOSPC, "No space left on device", "/home/a/.triton/cache/x"), "No space", "TRITON_CACHE_DIR"),
    (ImportError("libtriton.so: undefined symbol"), "ImportError: libtriton.so", "report the chip"),
    (ModuleNotFoundError("No module named 'triton'"), "No module named", "install triton"),
    (AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"), "libcuda", "ldconfig"),
    (AssertionError(), "AssertionError", "report the chip"),
    (KeyError("num_warps"), "KeyError: 'num_warps'", "report the chip"),
    (IndexError("map::at"), "IndexError: map::at", "report the chip"),
    (TypeError("can't convert a tensor"), "TypeError: can't", "report the chip"),
    (AttributeError("module 'triton' has no attribute 'jit'"), "no attribute 'jit'", "report the chip"),
    (NotImplementedError("unsupported capability"), "unsupported capability", "report the chip"),
    (ValueError("type fp8e4nv not supported"), "fp8e4nv", "report the chip"),
]
# those that only some versions of Triton have
RAISED += [
    (getattr(running, name)("of line 7"), "of line 7", cure)
    for name, cure in (("PTXASError", "TRITON_PTXAS_PATH"), ("AutotunerError", "report the chip"))
    if hasattr(running, name)
]


@pytest.mark.parametrize(("error", "words", "cure"), RAISED, ids=[type(error).__name__ for error, _, _ in RAISED])
def test_a_kernel_that_does_not_run(tiny, monkeypatch, error, words, cure):
    """One line with a cure; the other kernels are looked at all the same, and so are the checks behind."""

    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(kernels, "attention", raises)
    monkeypatch.setattr(kernels, "jittered", raises)
    local = Local("here", 0)
    kernels.kernels(load_config(str(tiny.config), []), CPU, local)
    assert [finding.level for finding in local.found] == [STOP, STOP]
    for kernel, finding in zip(("attention", "pixels"), local.found, strict=True):
        assert finding.what.startswith(f"{kernel} does not run: ") and words in finding.what
        assert "\n" not in finding.what and "line 39" not in finding.what and len(finding.what) < 450
        assert cure in finding.cure and "model.kernels=sdpa" in finding.cure
    doctor._guarded(local, "memory", raises)
    assert words in found(local, "memory", STOP)


def test_every_error_of_triton_is_known():
    """Of the version that is installed."""
    own = [kind for module in (compiling, running) for kind in vars(module).values() if isinstance(kind, type)]
    errors = [kind for kind in own if issubclass(kind, Exception)]
    assert len(errors) > 5 and all(issubclass(kind, faults()) for kind in errors)
