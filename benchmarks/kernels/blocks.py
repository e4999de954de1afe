"""Are the block sizes that the attention kernels run with the best near them on this chip?

    python -m benchmarks.kernels.blocks          # on a GPU; about a minute a size
    python -m benchmarks.kernels.blocks --dry    # on a CPU, Triton interpreted

Around the plan that beitforge.kernels.attention.block_sizes.choose gives, one kernel's blocks are changed at a time:
rows, columns, stages or warps. Each is checked first, since other blocks are other sums.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

from beitforge.kernels.attention import block_sizes
from beitforge.kernels.attention.block_sizes import Blocks, Plan
from benchmarks.harness import Bench, Job, Row, measured, options
from benchmarks.kernels.attention_providers import GRADIENT, ours
from benchmarks.kernels.kernels import SHAPES, SIZES, check, errors, prepared, timed

QUESTION = "are the chosen block sizes the best near them?"
NOTE = (
    "Median of forward and backward in µs with the fifths at either end, all else as chosen. Blocks: rows × columns, "
    "stages, warps."
)
_FINDS = ("blocks", "forward µs", "backward µs")
KERNELS = tuple(field.name for field in dataclasses.fields(Plan) if field.type in (Blocks, "Blocks"))
CHANGES: dict[str, Callable[[Blocks], Blocks]] = {
    "stages + 1": lambda b: dataclasses.replace(b, stages=b.stages + 1),
    "columns × 2": lambda b: dataclasses.replace(b, columns=2 * b.columns),
    "columns / 2": lambda b: dataclasses.replace(b, columns=max(16, b.columns // 2)),
    "rows × 2": lambda b: dataclasses.replace(b, rows=2 * b.rows, warps=2 * b.warps),
    "rows / 2": lambda b: dataclasses.replace(b, rows=max(16, b.rows // 2)),
}


def measure(size: str, kernel: str, change: str, bench: Bench) -> Row:
    """Forward and backward with one kernel's blocks changed; as chosen for no kernel."""
    from beitforge.kernels.attention import operator

    chosen, used = block_sizes.choose, []

    def choose(*asked: object, **named: object) -> Plan:
        plan = chosen(*asked, **named)  # type: ignore[arg-type]
        if kernel:
            plan = dataclasses.replace(plan, **{kernel: CHANGES[change](getattr(plan, kernel))})  # type: ignore[arg-type]
        used.append(plan)
        return plan

    shape = SHAPES[size]
    tensors, rights, plain = prepared(shape, bench.device, bench.dtype)
    with patch.object(operator, "choose", choose):
        run = ours(shape, bench)
        check(errors(run, GRADIENT, rights[True], tensors), plain[True])
        times = timed(run, bench, *tensors)
    assert used, "the operator asks `choose`"
    blocks = "; ".join(_words(getattr(used[-1], name)) for name in ([kernel] if kernel else KERNELS))
    total = sum(times[name].median for name in ("forward", "backward"))
    cells = {f"{name} µs": times[name].cell("µs") for name in ("forward", "backward")}
    return {"blocks": blocks, **cells, "_ms": total}


def _words(blocks: Blocks) -> str:
    return f"{blocks.rows} × {blocks.columns}, {blocks.stages}, {blocks.warps}"


def jobs(sizes: tuple[str, ...]) -> list[Job]:
    """For each size the chosen plan, then a row a kernel and change."""
    changes = [("", "as chosen"), *((kernel, change) for change in CHANGES for kernel in KERNELS)]
    return [
        Job(
            {"shape": SHAPES[size].name, "kernel": kernel or "all", "change": change},
            _FINDS,
            2.5 if kernel else 6.0,
            partial(measure, size, kernel, change),
        )
        for size in sizes
        for kernel, change in changes
    ]


def ratios(rows: list[Row]) -> dict[str, float]:
    """The chosen plan's time over the best changed one's, by shape: above 1, something near is faster."""
    found: dict[str, float] = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = [(row["kernel"], float(row["_ms"])) for row in rows if row["shape"] == shape and "_ms" in row]  # type: ignore[arg-type]
        chosen = [time for kernel, time in here if kernel == "all"]
        others = [time for kernel, time in here if kernel != "all"]
        if chosen and others and not math.isnan(chosen[0]):
            found[f"{shape}: chosen / best near it"] = chosen[0] / min(others)
    return found


def note(bench: Bench) -> str:
    return NOTE


def main() -> None:
    """The table."""
    asked = options("blocks", SIZES, sys.argv[1:])
    list(measured("blocks", QUESTION, jobs(asked.sizes), asked, ratios, NOTE))


if __name__ == "__main__":
    main()
