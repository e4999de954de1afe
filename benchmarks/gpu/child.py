"""A process that measures rows of one part: `python -m benchmarks.gpu.child PART FIRST SECONDS FILE [--dry] [--ahead]`.

Each row is appended to FILE when it begins and when it is done, so that one that hangs, or takes the process with it,
costs itself alone: benchmarks/gpu/gpu.py starts another process behind it.
"""

import json
import sys
import time
from pathlib import Path

from benchmarks.harness import Bench, Row, attempt, on_gpu, rehearsal

BROKEN = 3  # exit code: the GPU's context is lost, and nothing after it would run


def main(words: list[str]) -> int:
    """Rows from FIRST on, as long as SECONDS last. --ahead: FIRST alone, for the compiler's caches, without a row."""
    name, first, seconds, file, *flags = words
    if "--dry" in flags:
        import os

        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when a kernel is first imported
    from benchmarks.gpu.parts import PARTS

    bench = (rehearsal if "--dry" in flags else on_gpu)(time.monotonic() + float(seconds))
    jobs, out = PARTS[name].jobs("--dry" in flags), Path(file)
    if "--ahead" in flags:
        untimed = Bench(bench.device, bench.dtype, bench.compiler, "none", bench.ends)
        return int(attempt(jobs[int(first)], untimed)[1] is not None)
    for number in range(int(first), len(jobs)):
        _append(out, {"begun": number})
        row, error = attempt(jobs[number], bench)
        _append(out, {"done": number, "row": row})
        if error is not None and any(word in str(error) for word in ("CUDA error", "HIP error", "device-side assert")):
            return BROKEN
    _append(out, {"note": PARTS[name].note(bench)})
    return 0


def _append(file: Path, line: dict[str, int | str | Row]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
