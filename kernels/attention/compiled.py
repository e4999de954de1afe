"""The fused kernels compiled ahead of time, without a GPU: `python -m kernels.attention.compiled [--json]`.

What a chip's registers and shared memory must hold, for every plan that the dispatcher can choose. Spills are counted
in the machine code, where the driver's compiler would have put them.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention import fused
from kernels.attention.plan import Blocks, choose, padded

# chip, its compute capability ((0, 0): not CUDA's), threads of a warp, shared memory a program can have in bytes
CHIPS = (
    ("sm_80", (8, 0), 32, 163 << 10),
    ("sm_90", (9, 0), 32, 227 << 10),
    ("sm_100", (10, 0), 32, 227 << 10),
    ("gfx942", (0, 0), 64, 64 << 10),
)
# positions, head size and type: base and large at 224, giant at 224, base at 384, and float32
SHAPES = ((197, 64, "bf16"), (257, 88, "bf16"), (577, 64, "bf16"), (197, 64, "fp32"))
HEADS = 12


@dataclass(frozen=True)
class Compiled:
    """One kernel for one chip and shape. shared: bytes; registers and spills (stores, loads) a thread, spills of AMD's
    compiler in registers."""

    chip: str
    kernel: str
    positions: int
    head_size: int
    type: str
    rows: int
    columns: int
    stages: int
    warps: int
    registers: int
    spills: int
    shared: int


def table(chips: tuple[str, ...] = ()) -> list[Compiled]:
    """Every kernel of every plan on the chips named (all of CHIPS by default), with a bias and its gradient."""
    found = []
    for chip, capability, warp, _ in CHIPS:
        for positions, head_size, kind in SHAPES if not chips or chip in chips else ():
            plan = choose(capability, positions, head_size, kind == "fp32")
            kernels = [("forward", plan.forward), ("backward_queries", plan.queries)]
            kernels += [("backward_keys_values", plan.keys_values)]
            kernels += [] if plan.held else [("backward_bias", plan.queries)]
            for kernel, blocks in kernels:
                made = compile_kernel(kernel, blocks, chip, warp, positions, head_size, kind, plan.held)
                rows = asdict(blocks)
                registers, spills = resources(made)
                found.append(
                    Compiled(
                        chip=chip,
                        kernel=kernel,
                        positions=positions,
                        head_size=head_size,
                        type=kind,
                        **rows,
                        registers=registers,
                        spills=spills,
                        shared=made.metadata.shared,
                    )
                )
    return found


def compile_kernel(
    kernel: str, blocks: Blocks, chip: str, warp: int, positions: int, head_size: int, kind: str, held: bool
) -> Any:
    """Triton's compiled kernel for a chip that need not be here."""
    function = getattr(fused, kernel)
    rest = blocks.split(positions)[1]
    constants = {"S": positions, "A": HEADS, "K": head_size, "KP": padded(head_size), "BM": blocks.rows}
    constants |= {"BN": blocks.columns, "BR": rest, "BIAS": True, "UP": False, "STAGES": blocks.stages}
    constants |= {"SUM": held, "WIDTH": blocks.columns, "FIRST": 0}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    tile = "*fp32" if kind == "fp32" else "*fp16"
    types = {"lse": "*fp32", "delta": "*fp32", "partial": "*fp32", "tiles": tile, "to_log2": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(("qkv", "out", "dout", "dqkv"), f"*{kind}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    aligned = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*") or "tiles_" in name]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    if chip.startswith("sm_"):
        target = GPUTarget("cuda", int(chip[3:]), warp)
        options["maxnreg"] = 255
    else:
        target = GPUTarget("hip", chip, warp)
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


def main() -> None:
    """Print the table; --json for programs, or the names of chips."""
    chips = tuple(word for word in sys.argv[1:] if word != "--json")
    rows = [asdict(row) for row in table(chips)]
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    columns = list(rows[0])
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for line in [columns, *([str(row[column]) for column in columns] for row in rows)]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
