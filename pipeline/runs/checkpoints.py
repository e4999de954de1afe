"""What checkpoints of a run are there, told from their folders alone: a complete one has a state.json.

pipeline.checkpoints.saver writes and loads them. Must not know torch, engine, model, shards or any stage.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands. `samples_seen` is the whole state of the data stream; the fingerprints name its two sets.

    `groups`: the parameters' names in the order of the optimizer's groups, which ZeRO-0's files leave out.
    """

    step: int
    samples_seen: int
    world: int
    zero_stage: int
    precision: str
    images: str
    tokens: str
    config: str
    order: int = 1  # shards.stream.order.ARITHMETIC of the version that saved it; the first did not say
    groups: list[list[str]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)


def step_of(folder: Path) -> int:
    """Of a checkpoint's folder, step-N."""
    return int(folder.name[5:])


def candidates(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def newest(
    run: Path, say: Callable[[str], None], usable: Callable[[int], bool] = lambda _: True
) -> tuple[Path, State] | None:
    """The newest complete checkpoint of a run folder, or None. `say` is told of each one passed over, and why.

    usable: whether one of a step may be taken at all.
    """
    for folder in (folder for folder in candidates(run) if usable(step_of(folder))):
        problem, state = _read(folder)
        if state is not None:
            return folder, state
        say(f"checkpoint {folder.name} is not used: {problem}; taking the one before")
    return None


def _read(folder: Path) -> tuple[str, State | None]:
    try:
        state = State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return "its save was never finished", None
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError):
        return f"its {STATE} is damaged", None
    for name, size in state.files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            return f"{name} has {found} bytes instead of {size}" if found is not None else f"{name} is missing", None
    return "", state


def checkpoint_bytes(
    numbers: int, stage: int, number: int, matrices: Sequence[Sequence[int]] = (), world: int = 1
) -> int:
    """About what a checkpoint takes on disk: float32 masters, two moments, and the weights where they lie beside them.
    number: bytes of a weight.

    matrices: numbers of those that Muon updates, by its groups; they have one momentum, which under ZeRO-1 and 2 each
    of the `world` processes keeps whole of every matrix that reaches into its share, in the gradients' precision.
    """
    apart = stage in (1, 2) or (stage == 0 and number != 4)
    everywhere = numbers * (4 + (number if apart else 0))
    muon = sum(sum(group) for group in matrices)
    if stage not in (1, 2):
        return everywhere + 8 * (numbers - muon) + 4 * muon
    cut = sum((world - 1) * max(group) for group in matrices)  # at most: a matrix at each border between two shares
    return everywhere + 8 * (numbers - muon) + number * (muon + cut)
