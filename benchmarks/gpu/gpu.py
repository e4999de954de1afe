"""The one call for a GPU: everything that waits for one, within the minutes that are given.

    ./launch.sh bench gpu --minutes 8 --out DIR     # writes DIR/gpu.json, DIR/gpu.md and a file a part
    ./launch.sh bench gpu --estimate                # what it would do, and how long it takes; needs no GPU
    ./launch.sh bench gpu --dry                     # every row once on a CPU at a tiny size; nothing is timed

Each part runs in a process of its own, and every row is on disk before the next begins. A row that hangs or kills its
process costs itself alone; when the time is over, what is there is written.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.harness import Job, Row, need_gpu, refuse
from benchmarks.results import as_json, section, table, write

START = 7.0  # seconds in which a process has imported everything and has a GPU
AHEAD = 0.15  # at most this share of the time goes into compiling side by side
PATIENCE, LEAST_PATIENCE = 4.0, 30.0  # a row is given up after four times its estimate, and 30 seconds at least
_QUESTION = "everything that waited for a GPU"


@dataclass(frozen=True)
class Call:
    """What was asked for. ends: by time.monotonic, when the last row must be done."""

    parts: tuple[Part, ...]
    minutes: float
    out: Path
    dry: bool
    ends: float


def main(words: list[str]) -> int:
    """Say what will be done, do it, write what is there."""
    parser = argparse.ArgumentParser(prog="bench gpu", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of results (runs/gpu-DATE)")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--estimate", action="store_true", help="only say what it would do; needs no GPU")
    parser.add_argument("--dry", action="store_true", help="every row once on a CPU; nothing is timed")
    asked = parser.parse_args(words)
    unknown = [name for name in asked.parts.split(",") if name not in PARTS]
    if unknown or not asked.minutes > 0:
        refuse(
            f"bench gpu has no part {unknown[0]!r}; it takes {', '.join(PARTS)}"
            if unknown
            else "--minutes is not over 0"
        )
    parts = tuple(part for part in PARTS.values() if part.name in asked.parts.split(","))
    if not (asked.estimate or asked.dry):
        need_gpu("bench gpu", "--estimate says what it would do")
    out = asked.out or Path("runs") / time.strftime("gpu-%Y-%m-%d-%H%M%S")
    call = Call(parts, asked.minutes, out, asked.dry, time.monotonic() + 60 * asked.minutes)
    print("\n".join(plan(call)), flush=True)
    if asked.estimate:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    ready = [] if call.dry else compile_ahead(call)
    contents = [run_part(part, call, until) for part, until in deadlines(call)]
    for process in ready:
        stop(process)
    write_all(call, contents)
    return 0


def plan(call: Call) -> Iterator[str]:
    """What will be done, and how long it takes about: a line a part."""
    yield f"bench gpu: {call.minutes:g} minutes, results in {call.out}"
    if not call.dry:
        count = sum(job.compiles for part in call.parts for job in part.jobs(False))
        yield f"  first   {60 * call.minutes * AHEAD:4.0f} s at most: {count} rows are compiled side by side"
    total, left = 0.0, 60 * call.minutes * (1 - AHEAD)
    for part in call.parts:
        jobs = part.jobs(call.dry)
        needed = START + sum(job.seconds for job in jobs)
        total += needed
        yield f"  {part.name:13} {needed:4.0f} s for {len(jobs):2} rows: {part.question}"
    yield f"  in all {total / 60:.1f} minutes of {left / 60:.1f}; rows that do not fit say so, the last of a part first"


def deadlines(call: Call) -> Iterator[tuple[Part, float]]:
    """Each part and when it must be done: by the shares of those that are left, so that no time is lost."""
    for number, part in enumerate(call.parts):
        shares = [later.share for later in call.parts[number:]]
        now = time.monotonic()
        yield part, now + max(0.0, call.ends - now) * part.share / sum(shares)


def compile_ahead(call: Call) -> list[subprocess.Popen]:
    """Fill the compilers' caches with all that is compiled, as many processes at once as there are cores for; and leave
    one behind that compiles DeepSpeed's attention, where there are nvcc and CUTLASS, for the last part."""
    names = [part.name for part in call.parts]
    build = [sys.executable, "-c", "from deepspeed.ops.op_builder import EvoformerAttnBuilder as b; b().load()"]
    behind = [_start(build, call, "evoformer-build.log")] if "evoformer" in names else []
    compiled = [(-job.seconds, p.name, i) for p in call.parts for i, job in enumerate(p.jobs(False)) if job.compiles]
    waiting = [(name, first) for _, name, first in sorted(compiled)]
    ends = min(call.ends, time.monotonic() + 60 * call.minutes * AHEAD)
    running: list[subprocess.Popen] = []
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
    while (waiting or running) and time.monotonic() < ends:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < max(1, (os.cpu_count() or 2) - 2):
            name, first = waiting.pop(0)
            command = _child(name, first, ends - time.monotonic(), call, "--ahead")
            running.append(_start(command, call, f"{name}.log", threads))
        time.sleep(0.2)
    for process in running:
        stop(process)
    return behind


def run_part(part: Part, call: Call, until: float) -> dict:
    """The part's table, of the rows that were done until then, written into the folder."""
    jobs, note = part.jobs(call.dry), ""
    rows: list[Row] = []
    print(f"{part.name}: {until - time.monotonic():.0f} s", flush=True)
    lines = call.out / f"{part.name}.rows.jsonl"
    lines.write_text("")
    while len(rows) < len(jobs) and until - time.monotonic() > START / 2:
        process = _start(_child(part.name, len(rows), until - time.monotonic(), call), call, f"{part.name}.log")
        why = watch(process, lines, jobs, until)
        rows, note = read_rows(lines, note)
        if why and len(rows) < len(jobs):
            row = jobs[len(rows)].failed(why)
            rows.append(row)
            with lines.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"done": len(rows) - 1, "row": row}) + "\n")
    rows += [job.failed("not begun: no time was left") for job in jobs[len(rows) :]]
    for row in rows:
        print("  " + " · ".join(str(value) for key, value in row.items() if value and not key.startswith("_")))
    notes = [note or "The part was not finished in its time."]
    content = table(part.name, part.question, rows, {} if call.dry else part.ratios(rows), notes)
    write(part.name, part.question, rows, content["ratios"], notes, call.out)
    return content


def watch(process: subprocess.Popen, lines: Path, jobs: list[Job], until: float) -> str:
    """Wait for a part's process. Why the row it was at is lost, if it is: the process ended, or it took too long."""
    seen, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        begun, done = progress(lines)
        if begun != seen:
            seen, since = begun, time.monotonic()
        now, limit = time.monotonic(), max(LEAST_PATIENCE, PATIENCE * jobs[min(max(begun, 0), len(jobs) - 1)].seconds)
        if now > until + 2 or (begun > done and now - since > limit) or (begun < 0 and now - since > 120):
            stop(process)
            return f"given up after {now - since:.0f} s"
    begun, done = progress(lines)
    if begun > done or begun < 0:
        return f"its process ended with {process.returncode}; see {lines.name.partition('.')[0]}.log"
    return ""


def progress(lines: Path) -> tuple[int, int]:
    """The last row that was begun, and the last that was done; -1 before."""
    read = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return (max([line[what] for line in read if what in line], default=-1) for what in ("begun", "done"))  # type: ignore[return-value]


def read_rows(lines: Path, note: str) -> tuple[list[Row], str]:
    """The rows so far, and the note if the part came to its end."""
    read = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [line["row"] for line in read if "row" in line], next((x["note"] for x in read if "note" in x), note)


def write_all(call: Call, contents: list[dict]) -> None:
    """One JSON of all parts, and the tables in Markdown."""
    whole = {**table("gpu", _QUESTION, [], {}, []), "minutes": call.minutes, "parts": contents}
    del whole["rows"], whole["ratios"], whole["notes"]
    (call.out / "gpu.json").write_text(as_json(whole), encoding="utf-8")
    tables = "".join(section(content) for content in contents)
    (call.out / "gpu.md").write_text(
        f"# {_QUESTION}\n\n{whole['machine']}, {whole['date']}\n\n{tables}", encoding="utf-8"
    )
    print(f"wrote {call.out / 'gpu.json'} and {call.out / 'gpu.md'}")


def _child(part: str, first: int, seconds: float, call: Call, *flags: str) -> list[str]:
    file = str(call.out / f"{part}.rows.jsonl")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.child", part, str(first), f"{seconds:.0f}", file]
    return [*command, *flags, *(["--dry"] if call.dry else [])]


def _start(command: list[str], call: Call, log: str, more: dict[str, str] | None = None) -> subprocess.Popen:
    with (call.out / log).open("a", encoding="utf-8") as file:
        environment = {**os.environ, **(more or {})}
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def stop(process: subprocess.Popen) -> None:
    """End a process and what it started: compilers' workers would go on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
