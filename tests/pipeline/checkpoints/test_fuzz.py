"""Whatever stands in the files of a checkpoint, reading it ends in a value or in one line, in bounded time and memory.

The digests fit in every case: an adversary computes them anew. Some hundred cases a parser here, thousands with
BEITFORGE_NIGHTLY=1.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.distributed.file_reader import read_file
from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.checkpoints import STATE, NotWhole, damage, newest, read_state
from tests.fuzzing import chance, ended, harmed, harmed_json, tried
from tests.pipeline.training.test_trainer import trained

CASES = 4000 if os.environ.get("BEITFORGE_NIGHTLY") else 150
SHORT = ["data.heldout_images=", "data.heldout_tokens=", "train.duration=1 steps", "optimizer.warmup=1 steps"]
SEED = 20261130
FOUND = (1818, 2116)  # cases that once ended in neither a value nor a line


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """One checkpoint, of one process under ZeRO-2."""
    quiet_deepspeed()
    run = tmp_path_factory.mktemp("fuzzed") / "run"
    trained(tiny, run, *SHORT, processes=1)
    return run


@pytest.fixture
def folder(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run")) / "checkpoints" / "step-1"


def unsealed(folder: Path) -> dict:
    """state.json without digests, as the first versions wrote it: nothing but its content can be held against it."""
    content = json.loads((folder / STATE).read_text())
    files = {name: file["bytes"] for name, file in content.pop("files").items()}
    return {name: value for name, value in content.items() if name != "digest"} | {"files": files}


def test_states(folder):
    content, ends = unsealed(folder), {"value": 0, "line": 0}
    for number in range(CASES):
        (folder / STATE).write_bytes(harmed_json(content, chance(SEED, number)))

        def read() -> None:
            state = read_state(folder)
            list(damage(folder, state, state.files, whole=True))

        ends["value" if ended(read, NotWhole, f"state.json {number}") == "value" else "line"] += 1
        ended(lambda: newest(folder.parents[1], lambda _: None, whole=True), ConfigError, f"newest {number}")
    tried(CASES, f"state.json, {ends['line']} of them refused")
    assert min(ends.values()) > CASES // 100


@pytest.mark.parametrize("part", ["model_states", "optim_states"])
def test_files(folder, part):
    (path,) = folder.glob(f"*{part}.pt")
    data, state, ends = path.read_bytes(), read_state(folder), {"value": 0, "line": 0}
    pickled = data.index(b"\x80\x02")  # of data.pkl, which decides what is read
    for number in [*range(CASES), *FOUND]:
        rng = chance(SEED, number)
        if rng.random() < 0.5:
            path.write_bytes(harmed(data, rng))
        else:
            changed = bytearray(data)
            for _ in range(random.Random(number).randint(1, 4)):
                changed[pickled + rng.randrange(3000)] = rng.randrange(256)
            path.write_bytes(bytes(changed))
        found = ended(lambda: read_file(path), ConfigError, f"{path.name} {number}", seconds=20, megabytes=2048)
        ends["value" if found == "value" else "line"] += 1

        def layout() -> None:
            for _ in zero_layout.open_checkpoint(folder, state.zero_stage, state.groups).weights():
                pass

        ended(layout, ConfigError, f"layout with {path.name} {number}", seconds=20, megabytes=2048)
    tried(CASES, f"{part}, {ends['line']} of them refused")
    assert ends["line"] > CASES // 100
