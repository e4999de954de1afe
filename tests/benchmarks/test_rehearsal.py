"""Every row of every benchmark of a GPU is measured once on a CPU: Triton interpreted, results checked, no times."""

import math
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.gpu import gpu
from benchmarks.gpu.parts import PARTS
from benchmarks.harness import Bench, Job, Times, Wrong, attempt, rehearsal
from benchmarks.kernels import blocks, correctness, fusions, kernels
from benchmarks.kernels.attention_providers import GRADIENT, PROVIDERS
from benchmarks.training import operations, train, train_cpu
from benchmarks.training.operations import busy
from tests.conftest import ROOT, installed

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # other libraries' own
]
# What no CPU has, by the beginning of a provider's name, and what its row says then
NOT_ON_A_CPU = {
    "SDPA efficient": "No viable backend",
    "SDPA cuDNN": "No viable backend",
    "Flex": "does not support backward on CPU",
    "cuDNN graph": "No module named 'cudnn'",
    "TransformerEngine": "No module named 'transformer_engine'",
    "Liger-Kernel": "No module named 'liger_kernel'",
    "DS4Sci": "not been implemented on CPU",
    "torch's, in chunks": "LinearCrossEntropyOptions",  # before torch 2.13
}
IN_A_PROCESS = ("operations",)  # joins a process group


def jobs() -> list[tuple[str, Job]]:
    """Every row, but of the many blocks a fifth: the chosen ones, and each kind of change."""
    listed = [(name, job) for name, part in PARTS.items() if name not in IN_A_PROCESS for job in part.jobs(True)]
    blocks = [each for each in listed if each[0] == "blocks"]
    return [each for each in listed if each[0] != "blocks"] + blocks[::4]


@pytest.mark.parametrize(("part", "job"), [pytest.param(*each, id=f"{each[0]}: {each[1].name}") for each in jobs()])
def test_every_row_is_measured(part, job):
    name = job.known.get("provider", job.known.get("step", ""))
    for package in ("transformers", "timm"):
        if name.startswith(package) and not installed(package):
            pytest.skip(f"needs {package}, which `./launch.sh setup peers` installs")
    row, error = attempt(job, rehearsal())
    assert set(job.known) | set(job.finds) <= set(row)
    expected = next((why for provider, why in NOT_ON_A_CPU.items() if name.startswith(provider)), "")
    if error is None:
        assert "wrong" not in " ".join(map(str, row.values()))
    else:
        assert expected and expected in str(error), row


def test_operations_of_a_step():
    """In a process of its own; a step under DeepSpeed has more operations than its optimizer step alone."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training.operations", "--dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [line.split(" · ") for line in done.stdout.splitlines() if line.startswith("dry · ")]
    counts = {row[1]: float(row[2]) for row in rows}
    assert len(counts) == 4, done.stdout + done.stderr
    assert counts["under DeepSpeed, ZeRO-2"] > counts["of it the optimizer step"] > 0
    assert counts["ours"] > 100


def test_a_provider_costs_its_row_alone():
    def run(_: Bench) -> dict:
        raise KeyboardInterrupt if stop else MemoryError("out of memory\nand more | of it")

    job, stop = Job({"provider": "peer"}, ("ms", "memory"), 1.0, run), False
    row, error = attempt(job, rehearsal())
    assert row == {"provider": "peer", "ms": "MemoryError: out of memory", "memory": ""}
    assert isinstance(error, MemoryError)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        attempt(job, rehearsal())


def test_a_row_that_does_not_fit_is_not_begun():
    job = Job({}, ("ms",), 60.0, lambda _: pytest.fail("it was begun"))
    row, error = attempt(job, rehearsal(time.monotonic() + 20))
    assert error is None and row["ms"] == "not begun: takes about 60 s, 20 s were left"


def test_a_wrong_provider_has_no_speed():
    shape = kernels.SHAPES["dry"]
    right = next(provider for provider in PROVIDERS if provider.name == "eager")
    off = kernels.Provider("off", GRADIENT, lambda *of: lambda *on: 1.05 * right.build(*of)(*on))
    row, error = attempt(Job({}, ("forward µs",), 1.0, partial(kernels.measure, shape, off)), rehearsal())
    assert isinstance(error, Wrong) and str(row["forward µs"]).startswith("wrong: out by 5.0e-02")


def test_a_loss_in_sixteen_bits_may_be_off_by_their_rounding():
    """Eager's loss is float32: torch's own in chunks returns the type of its input, and is not wrong for it."""
    operation = fusions.loss(fusions.SIZES["dry"], torch.device("cpu"), torch.bfloat16)
    fusions.check(operation, "loss", lambda *leaves: operation.eager(*leaves).bfloat16())
    with pytest.raises(Wrong, match="output"):
        fusions.check(operation, "loss", lambda *leaves: 1.02 * operation.eager(*leaves).bfloat16())
    with pytest.raises(Wrong, match="output"):
        fusions.check(operation, "loss", lambda *leaves: 1.001 * operation.eager(*leaves))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of Triton's interpreter")
def test_why_a_rehearsal_is_in_float16():
    """Triton's interpreter cuts bfloat16 off; a GPU rounds. The same kernel in float32, cut off, gives these bits."""
    operation = fusions.pixels(fusions.SIZES["dry"], torch.device("cpu"), torch.bfloat16)
    whole = fusions.pixels(fusions.SIZES["dry"], torch.device("cpu"), torch.float32)
    found, exact = (each.providers["ours"](*each.leaves) for each in (operation, whole))
    cut = (exact.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(found.float(), cut) and not torch.equal(found, exact.bfloat16())
    assert rehearsal().dtype == torch.float16


@pytest.mark.peers("transformers", "timm")
def test_steps_on_a_cpu_side_by_side(monkeypatch):
    monkeypatch.setattr(train_cpu, "ROUNDS", 1)
    rows = train_cpu.measure("dry", torch.float32, 1, 2, math.inf)
    assert [row["step"] for row in rows] == list(train_cpu.NAMES)
    assert rows[0]["over ours"] == "1.00" and all(float(str(row["ms"])) > 0 for row in rows)
    made, tensors = train.contender("ours", "dry", rehearsal()), train.batch(*train.SIZES["dry"][:3], rehearsal())
    states = 2 * 17 * 48 * 2  # bytes of one hidden state: 2 images, 17 positions, 48 numbers of 2 bytes
    assert train_cpu.kept(made, tensors) > 2 * 10 * states, "two layers keep more than ten states each"


def test_times():
    assert Times(1.25, 1.0, 2.0).cell() == "1.2 (1.0–2.0)" and Times(1.25, 1.0, 2.0).cell("µs") == "1250 (1000–2000)"
    assert Times(math.nan, math.nan, math.nan).cell("µs") == "not timed"
    slept = Bench(torch.device("cpu"), torch.float32, "eager", "clock").time(lambda: time.sleep(0.01), milliseconds=50)
    assert 5 < slept.low <= slept.median <= slept.high


def test_idle_is_what_no_kernel_covers():
    assert busy([(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (8.0, 9.0)]) == 7.0

    def event(name: str, kind: DeviceType, start: float, end: float, annotates: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=annotates)

    kernels = [event("gemm", DeviceType.CUDA, 3e3 * n, 3e3 * n + 1.5e3) for n in range(operations.STEPS)]
    others = [event("Optimizer.step", DeviceType.CUDA, 0.0, 9e3, True), event("Memcpy DtoH", DeviceType.CUDA, 7e3, 9e3)]
    waits = [event("cudaStreamSynchronize", DeviceType.CPU, 0.0, 1.0)] * 6
    row = operations.on_device(kernels + others + waits)
    # 9 ms, of which 1.5 + 1.5 and, the copy and the last kernel together, 3 are busy
    assert row == {"kernels": "1", "copies": "0", "reads": "2.0", "ms": "3.0", "idle": "33.3%"}


@pytest.mark.parametrize("module", [kernels, fusions, correctness, blocks, train, operations, gpu])
def test_without_a_gpu_there_are_no_numbers(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit) as ended:
        module.main(*([[]] if module is gpu else []))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: bench ") and "needs a GPU" in line


def test_a_size_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--sizes", "base,huge"])
    with pytest.raises(SystemExit) as ended:
        kernels.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: bench kernels has no size 'huge'; it takes base, large, giant, base384\n"
