"""auto takes a fused kernel where it compiles, launches and agrees with its reference, and says why where not."""

import re
import subprocess
import warnings

import pytest
import torch

from beitforge.kernels import dispatch, probe
from beitforge.kernels.attention import attention, chosen
from beitforge.kernels.attention import check as attention_check
from beitforge.kernels.cross_entropy import check as cross_entropy_check
from beitforge.kernels.cross_entropy import linear_cross_entropy
from beitforge.kernels.faults import line_of
from beitforge.kernels.pixels import check as pixels_check
from beitforge.kernels.pixels import jittered
from beitforge.kernels.probe import FallbackWarning, differences

pytest.importorskip("triton")
# BLAS leaves floating-point flags behind that numpy reports of whatever comes next
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
CPU = torch.device("cpu")
SHAPE = (17, 2, 16, torch.float32)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """auto takes this device for a GPU of today, and has asked nothing yet."""

    class Gpu:
        type = "cuda"

    def runs(implementation, device, passes, original=dispatch.runs_fused):
        return passes() if implementation == "auto" else original(implementation, device, passes)

    for module in ("attention", "cross_entropy", "pixels"):
        monkeypatch.setattr(f"beitforge.kernels.{module}.runs_fused", runs)
    monkeypatch.setattr(probe, "ineligible", lambda device: "")
    monkeypatch.setattr(probe, "_found", {})


def test_auto_takes_what_passes():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert chosen("auto", CPU, *SHAPE) == "fused"
        assert chosen("auto", CPU, 17, 2, 129, torch.float32) == "sdpa"  # heads it cannot take are not asked about
    assert list(probe._found.values()) == [True]


TROUBLES = [
    RuntimeError(
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
    ),
    subprocess.CalledProcessError(1, ["ptxas"]),
    OSError("libcuda.so.1: cannot open shared object file"),
    NotImplementedError(),
    AttributeError("'NoneType' object has no attribute 'get_current_target'"),
    AssertionError("libcuda.so cannot be found"),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: type(trouble).__name__)
def test_whatever_is_raised_is_a_fall_back(monkeypatch, trouble):
    def broken(*_):
        raise trouble

    monkeypatch.setattr("beitforge.kernels.attention.operator.attention_fused", broken)
    with pytest.warns(
        FallbackWarning, match=re.escape(f"fused attention kernel is not used on cpu: {line_of(trouble)}")
    ):
        assert chosen("auto", CPU, *SHAPE) == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)  # it has been asked and has been said
        assert chosen("auto", CPU, *SHAPE) == "sdpa"
    qkv = torch.randn(2, 17, 3, 2, 16)
    assert torch.allclose(attention(qkv, None), attention(qkv, None, None, "reference"), atol=1e-5)


def test_a_driver_that_does_not_answer_is_a_fall_back(monkeypatch):
    def silent(device):
        raise RuntimeError("no CUDA-capable device is detected")

    monkeypatch.setattr(probe, "ineligible", silent)
    with pytest.warns(FallbackWarning, match="no CUDA-capable device"):
        assert chosen("auto", CPU, *SHAPE) == "sdpa"


def test_a_wrong_result_is_a_fall_back(monkeypatch):
    from beitforge.kernels.attention import operator

    right = operator.attention_fused
    monkeypatch.setattr(operator, "attention_fused", lambda *all: right(*all) * 1.01)
    with pytest.warns(FallbackWarning, match=r"attention is off by .*; the plain version by"):
        assert chosen("auto", CPU, *SHAPE) == "sdpa"


def test_a_kernel_falls_back_alone(monkeypatch):
    monkeypatch.setattr(pixels_check, "problems", lambda *_: ["pixels are wrong"])
    monkeypatch.setattr(cross_entropy_check, "problems", lambda *_: [])
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    with pytest.warns(FallbackWarning, match="pixels are wrong"):
        jittered(pixels, torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2))
    x, weight = torch.randn(5, 8), torch.randn(16, 8)
    linear_cross_entropy(x, weight, torch.zeros(16), torch.zeros(5, dtype=torch.int64), torch.ones(5))
    assert {key[0]: found for key, found in probe._found.items()} == {"pixels": False, "cross entropy": True}


def test_old_chips_are_not_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert dispatch.ineligible(CPU) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert dispatch.ineligible(CPU) == ""
    monkeypatch.setattr(dispatch, "_TRITON", False)
    assert "Triton is not installed" in dispatch.ineligible(CPU)


def test_compiled_code_asks_once_and_has_no_break(monkeypatch):
    asked = []
    monkeypatch.setattr(attention_check, "problems", lambda *shape: asked.append(shape) or ["no"])
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    qkv = torch.randn(2, 17, 3, 2, 16)
    with pytest.warns(FallbackWarning):
        found = compiled(qkv, None)
    assert torch.allclose(found, attention(qkv, None, None, "reference"), atol=1e-5)
    compiled(qkv, None)
    assert len(asked) == 1


def test_the_checks_find_nothing_in_the_kernels():
    assert attention_check.problems(17, 2, 16, CPU, torch.float32) == []
    assert cross_entropy_check.problems(40, 16, CPU, torch.float32) == []
    assert pixels_check.problems(5, 7, CPU) == []


def test_what_is_not_finite_is_a_difference():
    x = [torch.ones(3)]
    assert "not finite" in differences("f", lambda x: x / 0, lambda x: x, x, torch.float32)[0]


def test_on_a_cpu_auto_is_what_is_faster_there(monkeypatch):
    monkeypatch.undo()
    assert chosen("auto", CPU, 197, 12, 64, torch.bfloat16) == "reference"
    assert chosen("auto", CPU, 197, 12, 64, torch.float32) == "sdpa"
