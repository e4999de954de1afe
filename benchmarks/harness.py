"""What the benchmarks of a GPU share: rows that are measured one by one, each at its own risk, and what they run on.

A benchmark lists jobs, one a row of its table. A job that fails, or that no time is left for, says so in its row. The
same jobs run on a CPU in the tests, Triton interpreted and nothing timed (`rehearsal`), so that no call is first made
on the day a GPU is there.
"""

import argparse
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.results import RESULTS, write

Row = dict[str, object]  # keys that begin with _ are for computing with and are in no table
LEAST = 1.0  # seconds under which a job is not begun


class Wrong(Exception):
    """A provider's result is not right, so that it has no speed."""


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median, and the fifths at either end; NaN where nothing was timed."""

    median: float
    low: float
    high: float

    def cell(self, unit: str = "ms") -> str:
        """As a table has it, in ms or µs."""
        if math.isnan(self.median):
            return "not timed"
        scale, digits = (1e3, 0) if unit == "µs" else (1.0, 1)
        low, middle, high = (f"{scale * t:.{digits}f}" for t in (self.low, self.median, self.high))
        return f"{middle} ({low}–{high})"


@dataclass(frozen=True)
class Bench:
    """What is measured on. dtype: of the tensors. compiler: torch.compile's backend. timing: events (a GPU's), clock (a
    CPU's) or none. ends: when by time.monotonic no further job begins."""

    device: torch.device
    dtype: torch.dtype
    compiler: str
    timing: str
    ends: float = math.inf

    def left(self) -> float:
        """Seconds until no further job begins."""
        return self.ends - time.monotonic()

    def time(self, run: Callable[[], object], leaves: Iterable[torch.Tensor] = (), milliseconds: int = 200) -> Times:
        """Times of `run`, for about that long; the gradients of `leaves` are dropped before each."""
        if self.timing == "events":
            from triton.testing import do_bench

            ends, given = [0.5, 0.2, 0.8], list(leaves)
            return Times(*do_bench(run, rep=milliseconds, quantiles=ends, grad_to_none=given or None))
        run()
        if self.timing == "none":
            return Times(math.nan, math.nan, math.nan)
        began = time.perf_counter()
        rounds: list[float] = []
        while len(rounds) < 3 or time.perf_counter() - began < milliseconds / 1e3:
            for leaf in leaves:
                leaf.grad = None
            before = time.perf_counter()
            run()
            rounds.append(1e3 * (time.perf_counter() - before))
        fifths = statistics.quantiles(rounds, n=5)
        return Times(statistics.median(rounds), fifths[0], fifths[-1])

    def compile(self, function: Callable) -> Callable:
        """torch.compile for the shapes of the first call."""
        return torch.compile(function, dynamic=False, backend=self.compiler)

    def memory(self, run: Callable[[], object]) -> int:
        """Bytes that `run` allocates at most on top of what is there; 0 on a CPU."""
        if self.device.type != "cuda":
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    def clear(self) -> None:
        """Between jobs: Dynamo gives up on code that it has compiled for eight shapes, and memory must be free."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rates(self) -> tuple[float, float]:
        """What the chip does at best: bytes/s of a large copy, and FLOP/s of a large product; NaN without a GPU."""
        return _rates(self.device) if self.timing == "events" else (math.nan, math.nan)

    def reached(self) -> str:
        """The rates for a table's notes; `plan --from` reads them there."""
        copy, product = self.rates()
        return f"at what this chip reached: copy {copy / 1e12:.2f} TB/s, product {product / 1e12:.0f} TFLOP/s"


@cache
def _rates(device: torch.device) -> tuple[float, float]:
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    copy = do_bench(lambda: source.clone(), return_mode="median")
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = do_bench(lambda: square @ square, return_mode="median")
    return 2 * source.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


@dataclass(frozen=True)
class Job:
    """One row. known: its first cells. finds: the cells that `run` returns, where the reason goes when it fails.
    seconds: about what it takes on a GPU with its compilation. compiles: torch.compile takes most of that, and a run
    ahead of it in another process fills the compiler's caches."""

    known: dict[str, str]
    finds: tuple[str, ...]
    seconds: float
    run: Callable[[Bench], Row]
    compiles: bool = False

    def failed(self, reason: str) -> Row:
        """The row with a reason in the first cell of what it finds."""
        return {**self.known, **dict.fromkeys(self.finds, ""), self.finds[0]: reason}

    @property
    def name(self) -> str:
        return ", ".join(self.known.values())


def attempt(job: Job, bench: Bench) -> tuple[Row, BaseException | None]:
    """The job's row, and what it failed with. Whatever a provider raises costs its own row and no other."""
    left = bench.left()
    if left < max(LEAST, job.seconds):
        return job.failed(f"not begun: takes about {job.seconds:.0f} s, {max(0.0, left):.0f} s were left"), None
    try:
        return {**job.known, **job.run(bench)}, None
    except Exception as error:  # peers raise whatever they like
        return job.failed(reason(error)), error
    finally:
        bench.clear()


def reason(error: BaseException) -> str:
    """An error in one line of at most 120 characters, for a cell of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, Wrong):
        return f"wrong: {' '.join(lines)}"
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}".replace("|", "/")
    return text if len(text) <= 120 else text[:117] + "…"


def on_gpu(ends: float = math.inf) -> Bench:
    """A GPU, bf16, times by events."""
    return Bench(torch.device("cuda"), torch.bfloat16, "inductor", "events", ends)


def rehearsal(ends: float = math.inf) -> Bench:
    """The CPU, Triton interpreted, nothing timed. float16, since Triton's interpreter cuts bfloat16 off instead of
    rounding it, which is an error of its own; eager graphs, since a compiler's code for a CPU says nothing here."""
    return Bench(torch.device("cpu"), torch.float16, "aot_eager", "none", ends)


@dataclass(frozen=True)
class Options:
    """What a benchmark of a GPU was asked for on the command line."""

    sizes: tuple[str, ...]
    out: Path | None
    bench: Bench


def options(name: str, sizes: Iterable[str], words: list[str]) -> Options:
    """`--sizes A,B --out DIR --minutes M --dry` for the benchmark `name` with these sizes.

    Ends the process with one line and code 2 for an unknown size, and without a GPU unless `--dry`.
    """
    known = tuple(sizes)
    parser = argparse.ArgumentParser(prog=f"bench {name}", allow_abbrev=False)
    parser.add_argument("--sizes", default=",".join(known), help=f"of {', '.join(known)}; commas between")
    parser.add_argument("--out", type=Path, help="folder of results; otherwise benchmarks/results and BENCHMARKS.md")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no further row begins")
    parser.add_argument("--dry", action="store_true", help="every row once on a CPU at a tiny size; nothing is timed")
    asked = parser.parse_args(words)
    unknown = [size for size in asked.sizes.split(",") if size not in known]
    if unknown:
        refuse(f"bench {name} has no size {unknown[0]!r}; it takes {', '.join(known)}")
    ends = time.monotonic() + 60 * asked.minutes
    if asked.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when a kernel is first imported
        return Options(("dry",), asked.out, rehearsal(ends))
    need_gpu(f"bench {name}")
    return Options(tuple(asked.sizes.split(",")), asked.out, on_gpu(ends))


def need_gpu(what: str, otherwise: str = "--dry runs every call on a CPU") -> None:
    """End the process with one line and code 2 where no GPU is."""
    if not torch.cuda.is_available():
        refuse(f"{what} needs a GPU, and there is none; {otherwise}")


def refuse(line: str) -> NoReturn:
    """End the process with one line and code 2."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def measured(
    name: str, question: str, jobs: list[Job], asked: Options, ratios: Callable[[list[Row]], dict], note: str
) -> Iterator[Row]:
    """The rows of the jobs as they come. On a GPU each is written with those before it, so that what is there stays."""
    rows: list[Row] = []
    for job in jobs:
        row, _ = attempt(job, asked.bench)
        rows.append(row)
        print(" · ".join(str(value) for key, value in row.items() if not key.startswith("_")), flush=True)
        if asked.bench.timing != "none":
            write(name, question, rows, ratios(rows), [note], asked.out or RESULTS)
        yield row
