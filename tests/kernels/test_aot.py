"""The fused kernels compile for every chip, without one, and fit: registers without spilling, shared memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")
# loads and stores of spilled registers in a kernel's code that are accepted, by chip
ACCEPTED = {"sm_80": 80, "sm_90": 8, "sm_100": 8, "gfx942": 0}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.fixture(scope="module")
def table() -> Iterator[list[dict]]:
    yield json.loads(compiling(["-m", "beitforge.kernels.aot", "--json"]))


def compiling(words: list[str]) -> str:
    """What a Python process of its own prints: in this one Triton may be interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("chip", ACCEPTED)
def test_every_kernel_fits_the_chip(table, chip):
    rows = [row for row in table if row["chip"] == chip]
    attention = {"forward", "backward_queries", "backward_keys_values", "backward_bias"}
    assert {row["kernel"] for row in rows} == attention | {"cross_entropy_rows", "jitter_pixels"}
    shapes = {"S 197, K 64, bf16", "S 257, K 88, bf16", "S 577, K 64, bf16", "S 197, K 64, fp32"}
    assert {row["shape"] for row in rows if row["kernel"] in attention} == shapes
    for row in rows:
        assert row["spills"] <= ACCEPTED[chip], row
        assert 0 <= row["shared"] <= SHARED[chip], row
        assert 0 < row["registers"] <= (512 if chip == "gfx942" else 255), row


def test_two_programs_share_a_multiprocessor(table):
    """Base at 224 px on Hopper: registers and shared memory leave room for a second program, which hides waiting."""
    for row in table:
        if row["chip"] == "sm_90" and row["shape"] == "S 197, K 64, bf16":
            assert 2 * 32 * row["warps"] * row["registers"] <= 65536 and 2 * row["shared"] <= 227 << 10, row


def test_jitter_contracts_nothing():
    """No product and sum are rounded as one, divisions are whole: the code gives the bits that plain PyTorch gives."""
    program = "from beitforge.kernels.aot import __main__, compile; chip = compile.TARGETS[1]; "
    program += "builds = [build for build in __main__.builds(chip) if build.kernel == 'jitter_pixels']; "
    program += "print(*(compile.compiled(build, chip).asm['ptx'] for build in builds))"
    code = compiling(["-c", program])
    assert code.count("div.rn.f32") >= 6 and "mul" in code
    assert "fma." not in code and "div.full" not in code
