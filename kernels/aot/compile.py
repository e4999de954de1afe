"""Triton kernels compiled ahead of time for chips that need not be here, and what they ask of them.

Spills are counted in the machine code, where the driver's compiler would have put them.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Target:
    """A chip. capability: of CUDA, (0, 0) for any other. warp: its threads. shared: bytes of shared memory a program
    can have. Of a multiprocessor: its shared memory in bytes, its warps and its programs at most."""

    name: str
    capability: tuple[int, int]
    warp: int
    shared: int
    shared_of_all: int
    warps: int
    programs: int


TARGETS = (
    Target("sm_80", (8, 0), 32, 163 << 10, 164 << 10, 64, 32),
    Target("sm_86", (8, 6), 32, 99 << 10, 100 << 10, 48, 16),
    Target("sm_89", (8, 9), 32, 99 << 10, 100 << 10, 48, 24),
    Target("sm_90", (9, 0), 32, 227 << 10, 228 << 10, 64, 32),
    Target("sm_100", (10, 0), 32, 227 << 10, 228 << 10, 64, 32),
    Target("sm_120", (12, 0), 32, 99 << 10, 100 << 10, 48, 24),
    Target("gfx942", (0, 0), 64, 64 << 10, 64 << 10, 32, 32),
)
_REGISTERS = 65536  # of a multiprocessor, NVIDIA: given to a warp in pieces of 8 a thread
_RESERVED = 1024  # bytes of shared memory that CUDA takes for each program
_AMD_REGISTERS, _AMD_UNITS = 512, 4  # a thread's, on each of the four units that share a program's warps


@dataclass(frozen=True)
class Build:
    """One kernel with what it is compiled for. types: of the arguments that are no constants, i32 where left out.

    aligned: integer arguments that are multiples of 16, as pointers are.
    """

    kernel: str
    shape: str
    blocks: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    aligned: frozenset[str] = field(default_factory=frozenset)
    options: dict[str, Any] = field(default_factory=dict)


def compiled(build: Build, chip: Target) -> Any:
    """Triton's compiled kernel."""
    names = build.function.arg_names
    constants = {name: value for name, value in build.constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else build.types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in build.aligned]
    source = ASTSource(
        fn=build.function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    cuda = chip.name.startswith("sm_")
    target = GPUTarget("cuda" if cuda else "hip", int(chip.name[3:]) if cuda else chip.name, chip.warp)
    options = {"num_warps": build.warps, "num_stages": build.stages, **build.options}
    return triton.compile(source, target=target, options=options)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel asks for. spills: loads and stores of local memory in NVIDIA's machine code, registers on
    AMD. programs: how many share a multiprocessor. ahead: blocks whose copies are under way while the main loop waits
    for one; None without asynchronous copies in a loop."""

    registers: int
    spills: int
    shared: int
    programs: int
    ahead: int | None


def resources(made: Any, build: Build, chip: Target) -> Resources:
    """Of a kernel compiled for a chip."""
    shared = made.metadata.shared
    fit = min(chip.programs, chip.warps // build.warps)
    if shared:
        fit = min(fit, chip.shared_of_all // (shared + (_RESERVED if "cubin" in made.asm else 0)))
    if "cubin" not in made.asm:
        said = [re.search(rf"\.{key}:\s+(\d+)", made.asm["amdgcn"]) for key in ("vgpr_count", "vgpr_spill_count")]
        assert said[0] and said[1], "AMD's assembly says neither registers nor spills"
        waves = _AMD_REGISTERS // (-(-int(said[0][1]) // 8) * 8) * _AMD_UNITS
        return Resources(int(said[0][1]), int(said[1][1]), shared, min(fit, waves // build.warps), None)
    usage, code = _disassembled(made.asm["cubin"])
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, "cuobjdump says no registers"
    threads = -(-int(registers[1]) // 8) * 8 * 32 * build.warps
    spills = len(re.findall(r"\b(?:STL|LDL)[.\s]", code))
    return Resources(int(registers[1]), spills, shared, min(fit, _REGISTERS // threads), copies_ahead(code))


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """What CUDA's tools say of a program: its use of resources, and its code."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, code


def copies_ahead(code: str) -> int | None:
    """By how many blocks the copies of a main loop, rolled or not, run ahead at its waits, from NVIDIA's machine code.

    0: a wait stands behind its own copies and lets none of them be under way, so that every block's latency shows.
    """
    steps = re.findall(r"\sDEPBAR\.LE SB0, 0x([0-9a-f]+)|\s(LDGDEPBAR)", code)
    ahead, left, groups = [], 0, 0
    for waits, _ in [*steps, ("0", "")]:  # a wait that further copies follow is one of a loop
        if not waits:
            groups += 1
            continue
        if groups:
            ahead.append(left // groups)
        left, groups = int(waits, 16), 0
    return min(ahead[1:], default=None)  # what stands before the first wait is no loop
