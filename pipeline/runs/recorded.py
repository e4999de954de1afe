"""What a run wrote down of each of its steps, for those who do them again. A line that is not what it should be is
passed over. Must not know torch, the model or any stage.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

from beitforge.pipeline.runs.jsonl import metric_line, read_lines
from beitforge.pipeline.runs.record import by_kind, job_of, json_object


@dataclass(frozen=True, kw_only=True)
class Step:
    """The loss, mean over ranks and micro batches, and the gradient norm of one step, None where only lines of metrics
    are known, and how many processes did it."""

    loss: float | None = None
    norm: float | None = None
    world: int


@dataclass
class Recorded:
    """A run by its files. steps: by number, from 1 on as in metrics.jsonl. means: the values of lines of metrics by the
    steps they are means over, the one before the first and the last. replaced: shard and key of its bad samples."""

    job: str
    environment: dict
    steps: dict[int, Step] = field(default_factory=dict)
    means: dict[tuple[int, int], dict] = field(default_factory=dict)
    replaced: set[tuple[str, str]] = field(default_factory=set)
    world: int = 1  # of the last start

    def world_at(self, number: int) -> int:
        """How many processes did a step; the last start's where it is not known."""
        return self.steps[number].world if number in self.steps else self.world


def read_recorded(run: Path) -> Recorded:
    """What the run folder says. Of steps done again after a start, the last time counts."""
    lines = [line for line in read_lines(run / "metrics.jsonl", run, metric_line).lines if _whole(line.get("step"))]
    environment = json_object(run / "environment.json", [], run)
    found, reached = Recorded(job_of(environment, by_kind(lines)), environment), 0
    for line in lines:
        number, kind = line["step"], line.get("kind")
        if kind == "start":
            reached = number
            found.world = line["world"] if _whole(line.get("world")) else 1
            found.steps = {done: step for done, step in found.steps.items() if done <= number}
            found.means = {ends: values for ends, values in found.means.items() if ends[1] <= number}
        elif kind == "return":
            reached = number
        elif kind == "steps":
            found.steps |= _steps(line, found.world)
        elif kind == "train":
            found.means[reached, number], reached = line, number
            norm = line.get("gradient_norm")
            if number not in found.steps and isinstance(norm, float):
                found.steps[number] = Step(norm=norm, world=found.world)
    bad = read_lines(run / "bad_samples.jsonl", run).lines
    found.replaced = {(str(line.get("shard")), str(line.get("key"))) for line in bad}
    return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _steps(line: dict, world: int) -> dict[int, Step]:
    """The steps of a line of the kind `steps`; none when it is damaged."""
    try:
        losses, norms = from_hex("f", line["losses"]), from_hex("d", line["gradient_norms"])
    except (KeyError, TypeError, ValueError):
        return {}
    first = line["step"] - len(norms) + 1
    if len(losses) != len(norms) or first != line.get("first"):
        return {}
    world = line["world"] if _whole(line.get("world")) else world
    pairs = enumerate(zip(losses, norms, strict=True), start=first)
    return {number: Step(loss=loss, norm=norm, world=world) for number, (loss, norm) in pairs}


def to_hex(form: str, numbers: list[float]) -> str:
    """Numbers as hexadecimal digits, bit for bit; form: f (float32) or d (float64), little-endian."""
    return struct.pack(f"<{len(numbers)}{form}", *numbers).hex()


def from_hex(form: str, digits: str) -> list[float]:
    """The numbers that `to_hex` wrote. Raises ValueError for what it did not write."""
    try:
        return [number for (number,) in struct.iter_unpack(f"<{form}", bytes.fromhex(digits))]
    except struct.error as error:
        raise ValueError(str(error)) from error
