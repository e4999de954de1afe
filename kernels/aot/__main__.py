"""What the fused kernels ask of a chip, without one: `python -m beitforge.kernels.aot [--json] [CHIP …]`.

Every kernel as the dispatcher can choose it, for the shapes of the published models. Compiles in two processes; Triton
keeps what it compiled.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from beitforge.kernels.aot.compile import TARGETS, Build, Target, compiled, resources
from beitforge.kernels.attention import fused as attention
from beitforge.kernels.attention import stored
from beitforge.kernels.attention.block_sizes import Blocks, Plan, choose, padded
from beitforge.kernels.attention.operator import REGISTERS
from beitforge.kernels.cross_entropy import fused as cross_entropy
from beitforge.kernels.cross_entropy import operator as cross_entropy_operator
from beitforge.kernels.pixels import fused as pixels

# positions, head size and type: base and large at 224, giant at 224, base at 384, and float32
SHAPES = ((197, 64, "bf16"), (257, 88, "bf16"), (577, 64, "bf16"), (197, 64, "fp32"))
VOCABULARIES = ((8192, "bf16"), (8192, "fp32"), (65536, "fp16"))  # DALL-E's and VQ-KD's, and the largest
PIXELS = ((224 * 224, "bf16"), (384 * 384, "fp16"), (112 * 112, "fp32"))
HEADS = 12


@dataclass(frozen=True)
class Row:
    """One kernel for one chip and shape; from registers on as kernels.aot.compile.Resources."""

    chip: str
    kernel: str
    shape: str
    blocks: str
    stages: int
    warps: int
    registers: int
    spills: int
    shared: int
    programs: int
    ahead: int | None


def table(names: list[str]) -> list[Row]:
    """Every kernel on the chips named, by default on all of TARGETS."""
    places = [(chip, i) for chip in TARGETS if not names or chip.name in names for i in range(len(builds(chip)))]
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(_row, *zip(*places, strict=True)))


def _row(chip: Target, place: int) -> Row:
    """Of the build in a place of `builds`."""
    build = builds(chip)[place]
    found = resources(compiled(build, chip), build, chip)
    what = (chip.name, build.kernel, build.shape, build.blocks, build.stages, build.warps)
    return Row(*what, found.registers, found.spills, found.shared, found.programs, found.ahead)


def builds(chip: Target) -> list[Build]:
    """All kernels as a chip gets them, of attention's both designs."""
    found = []
    for positions, head_size, kind in SHAPES:
        plan = choose(chip.capability, positions, head_size, kind == "fp32")
        kernels = [("forward", plan.forward), ("backward_queries", plan.queries)]
        kernels += [("backward_keys_values", plan.keys_values)]
        kernels += [] if plan.held else [("backward_bias", plan.queries)]
        second = choose(chip.capability, positions, head_size, kind == "fp32", store=True)
        if second.stored and head_size == 64 and kind == "bf16":
            kernels += [("backward_keys_values, stored", second.keys_values), ("queries, stored", second.stored)]
        found += [_attention(chip, *kernel, positions, head_size, kind, plan) for kernel in kernels]
    found += [_cross_entropy(vocabulary, kind) for vocabulary, kind in VOCABULARIES]
    return found + [_pixels(size, kind) for size, kind in PIXELS]


def _attention(
    chip: Target, kernel: str, blocks: Blocks, positions: int, head_size: int, kind: str, plan: Plan
) -> Build:
    second = kernel.endswith(", stored")
    constants = {"S": positions, "A": HEADS, "K": head_size, "KP": padded(head_size), "BM": blocks.rows}
    constants |= {"BN": blocks.columns, "BR": blocks.split(positions)[1], "BIAS": True, "UP": False}
    constants |= {"STAGES": blocks.stages, "SUM": plan.held, "WIDTH": blocks.columns, "FIRST": 0, "STORE": second}
    function = getattr(attention, kernel.removesuffix(", stored"), stored.queries)
    if function is stored.queries:
        constants |= dict(zip(("HEIGHT", "WIDTH"), plan.keys_values.padded(positions), strict=True))
    tile = "*fp32" if kind == "fp32" else "*fp16"
    types = {"lse": "*fp32", "delta": "*fp32", "partial": "*fp32", "tiles": tile, "to_log2": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(("qkv", "out", "dout", "dqkv", "stored"), f"*{kind}")
    return Build(
        kernel=kernel,
        shape=f"S {positions}, K {head_size}, {kind}",
        blocks=f"{blocks.rows}×{blocks.columns}",
        function=function,
        types=types,
        constants=constants,
        warps=blocks.warps,
        stages=blocks.stages,
        aligned=frozenset({"tiles_of_head", "tiles_of_image"}),
        options={"maxnreg": REGISTERS} if chip.name.startswith("sm_") else {},
    )


def _cross_entropy(vocabulary: int, kind: str) -> Build:
    block = cross_entropy_operator.block(vocabulary)
    return Build(
        kernel="cross_entropy_rows",
        shape=f"V {vocabulary}, {kind}",
        blocks=str(block),
        function=cross_entropy.cross_entropy_rows,
        types={"logits": f"*{kind}", "tokens": "*i64", "counts": "*fp32", "losses": "*fp32", "right": "*fp32"},
        constants={"V": vocabulary, "BLOCK": block, "GRADIENT": True},
        warps=cross_entropy_operator.WARPS,
    )


def _pixels(size: int, kind: str) -> Build:
    types = {"pixels": "*u8", "out": f"*{kind}", "jitters": "*fp32", "orders": "*i64", "pivots": "*fp32"}
    types |= dict.fromkeys(("mean0", "mean1", "mean2", "std0", "std1", "std2"), "fp32")
    return Build(
        kernel="jitter_pixels",
        shape=f"{size} pixels, {kind}",
        blocks=str(pixels.BLOCK),
        function=pixels.jitter_pixels,
        types=types,
        constants={"HW": size, "BLOCK": pixels.BLOCK, "NORMAL": True},
        warps=pixels.WARPS,
        options={"enable_fp_fusion": False},
    )


def main() -> None:
    """Print the table; --json for programs."""
    rows = [asdict(row) for row in table([word for word in sys.argv[1:] if word != "--json"])]
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    columns = list(rows[0])
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for line in [columns, *([str(row[column]) for column in columns] for row in rows)]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
