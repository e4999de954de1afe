"""One training step on this CPU: ours beside transformers', timm's and the released code's, side by side in one run.

    python -m benchmarks.training.train_cpu [--minutes M] [--out DIR] [--images N] [--tiny]

fp32 and bf16, one thread and all cores, in rounds that go through the contenders in turn, so that whatever else the
machine does falls on all of them alike. Kept: what the forward keeps for the backward, weights not counted.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Bench, Row, reason
from benchmarks.results import RESULTS, write
from benchmarks.training.contenders import Contender
from benchmarks.training.train import SIZES, batch, contender, stepper

QUESTION = "one training step on a CPU, side by side"
NAMES = ("ours", "ours, reference", "transformers", "timm", "unilm's arithmetic")
ROUNDS = 5


def kept(made: Contender, tensors: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps between forward and backward, of other storages than the parameters'."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in made.module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made.loss(*tensors)
    del loss
    return sum(storages.values())


def measure(size: str, dtype: torch.dtype, threads: int, images: int, ends: float) -> list[Row]:
    """A row a contender: the median of ROUNDS steps, each contender in turn, and its time over ours round by round."""
    bench = Bench(torch.device("cpu"), dtype, "eager", "clock", ends)
    torch.set_num_threads(threads)
    model, _, masked, *_ = SIZES[size]
    tensors = batch(model, images, masked, bench)
    steps: dict[str, Callable[[], Tensor]] = {}
    memory: dict[str, int] = {}
    missing: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    for name in NAMES:
        try:
            made = contender(name, size, bench)
            memory[name], steps[name] = kept(made, tensors), stepper(made, tensors, False, bench)
            steps[name]()
        except Exception as error:  # a peer that is not installed, or does not run in this type
            missing[name] = reason(error)
            steps.pop(name, None)
    for number in range(ROUNDS):
        if number >= 2 and time.monotonic() > ends:
            break
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            times.setdefault(name, []).append(time.perf_counter() - before)
    known = {"model": size, "type": str(dtype).removeprefix("torch."), "threads": threads}
    return [{**known, "step": name, **_cells(name, times, memory, missing)} for name in NAMES]


def _cells(name: str, times: dict[str, list[float]], memory: dict[str, int], missing: dict[str, str]) -> Row:
    if name in missing or "ours" not in times:
        return {"ms": missing.get(name, "not timed"), "fastest": "", "over ours": "", "kept": ""}
    ratio = statistics.median(theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True))
    return {
        "ms": f"{1e3 * statistics.median(times[name]):.0f}",
        "fastest": f"{1e3 * min(times[name]):.0f}",
        "over ours": f"{ratio:.2f}",
        "kept": f"{memory[name] / 2**20:.0f} MiB",
    }


def main(words: list[str]) -> None:
    """The table; what is done is kept."""
    parser = argparse.ArgumentParser(prog="bench train_cpu", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=15.0, help="after which rounds end early (%(default)s)")
    parser.add_argument("--images", type=int, default=4, help="a step (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    asked = parser.parse_args(words)
    ends, size = time.monotonic() + 60 * asked.minutes, "dry" if asked.tiny else "base"
    note = (
        f"{asked.images} images a step, {ROUNDS} rounds through all contenders in turn; ms: the median; over ours: the "
        "median of the rounds' ratios. A whole step without loader and DeepSpeed, eager. ours, reference: with "
        "`model.kernels: reference`. Kept: by the forward for the backward, weights not counted."
    )
    rows: list[Row] = []
    cores = len(os.sched_getaffinity(0))
    for threads in sorted({1, cores}):
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(size, dtype, threads, asked.images, ends)
            for row in rows[-len(NAMES) :]:
                print(" · ".join(map(str, row.values())), flush=True)
            write("train_cpu", QUESTION, rows, {}, [note], asked.out)


if __name__ == "__main__":
    main(sys.argv[1:])
