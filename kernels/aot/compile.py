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
    """capability: of CUDA, (0, 0) for any other. shared: bytes of shared memory that a program can have."""

    name: str
    capability: tuple[int, int]
    warp: int
    shared: int


TARGETS = (
    Target("sm_80", (8, 0), 32, 163 << 10),
    Target("sm_90", (9, 0), 32, 227 << 10),
    Target("sm_100", (10, 0), 32, 227 << 10),
    Target("gfx942", (0, 0), 64, 64 << 10),
)


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


def resources(made: Any) -> tuple[int, int]:
    """Registers a thread, and spills: loads and stores of local memory in NVIDIA's machine code, registers on AMD."""
    if "cubin" not in made.asm:
        registers, spills = (
            re.search(rf"\.{key}:\s+(\d+)", made.asm["amdgcn"]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        assert registers and spills, "AMD's assembly says neither registers nor spills"
        return int(registers[1]), int(spills[1])
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, "cuobjdump says no registers"
    return int(registers[1]), len(re.findall(r"\b(?:STL|LDL)[.\s]", code))
