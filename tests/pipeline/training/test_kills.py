"""Promise 5: kill any process at any moment; the restarted run ends with the weights of one never killed, having seen
every sample once. Five kills here, a hundred with BEITFORGE_NIGHTLY=1.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from beitforge.pipeline.cluster.watchdog import EXIT_HUNG
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.training.sample_log import read_sample_log
from tests.pipeline.training.test_trainer import finished, kill, launch, trained, weights

KILLS = 100 if os.environ.get("BEITFORGE_NIGHTLY") else 5
STEPS = 300 if KILLS == 5 else 3000  # more than it gets through between its kills
SECONDS = 180 if KILLS == 5 else 1800
SETTINGS = [f"train.duration={STEPS} steps", "checkpoint.every=2 steps", "checkpoint.keep=3", "log.positions=true"]
SETTINGS += ["log.every_steps=1", "data.heldout_images=", "data.heldout_tokens="]
WHERE = ("rank", "launcher", "everything", "save")


def processes(run: Path) -> dict[int, bool]:
    """Every process that works for a run folder; True for the launcher's."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if f"train.run={run}".encode() in words:
                launcher = any(word == b"launch" or word.startswith(b"deepspeed.launcher") for word in words)
                found[int(path.parent.name)] = launcher
    return found


def gone(run: Path, seconds: float) -> None:
    """Wait until no process of the run is left."""
    end = time.monotonic() + seconds
    while processes(run):
        assert time.monotonic() < end, f"still there after {seconds} s: {processes(run)}"
        time.sleep(0.05)


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl, without reading all of it."""
    with contextlib.suppress(OSError), open(run / "metrics.jsonl", "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
        found = re.findall(rb'"step": (\d+), "kind": "train"', file.read())
        return int(found[-1]) if found else 0
    return 0


def size(run: Path) -> int:
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").stat().st_size
    return 0


def unfinished(run: Path) -> set[str]:
    """Checkpoints that are being written, or were when a kill came."""
    return {path.name for path in (run / "checkpoints").glob("step-*") if not (path / "state.json").exists()}


def strike(run: Path, where: str, torn: set[str], draws: random.Random) -> bool:
    """SIGKILL what `where` says; False when the run had ended by itself. torn: what an earlier kill left unfinished."""
    if where == "save":
        while processes(run) and not unfinished(run) - torn:
            time.sleep(0.001)
    there = processes(run)
    ranks = [pid for pid, launcher in there.items() if not launcher]
    launchers = [pid for pid, launcher in there.items() if launcher]
    victims = {"rank": ranks, "launcher": launchers}.get(where, list(there))
    if not victims:
        return False
    for pid in [draws.choice(victims)] if where in ("rank", "launcher") else victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    trained(tiny, run, *SETTINGS)
    yield run


def test_any_kill_at_any_moment(tiny, unbroken, tmp_path):
    run, seed = tmp_path / "run", int.from_bytes(os.urandom(4), "little")
    draws, kills = random.Random(seed), 0
    print(f"seed {seed}")
    while kills < KILLS:
        found, torn = newest(run, lambda _: None), unfinished(run)
        process = launch(tiny, run, *SETTINGS, *(("checkpoint.asynchronous=true",) if draws.random() < 0.5 else ()))
        reach, before = (found[1].step if found else 0) + draws.randrange(0, 20), size(run)
        while process.poll() is None and (size(run) == before or last_step(run) <= reach):
            time.sleep(0.001)
        struck = strike(run, WHERE[kills % len(WHERE)], torn, draws)
        kills += struck
        print(f"kill {kills}, of {WHERE[(kills - 1) % len(WHERE)]}, at step {last_step(run)}", flush=True)
        gone(run, 90)
        kill(process)
        output, _ = process.communicate()
        began = re.findall(r"from step (\d+),", output)  # nothing where it was killed before it said so
        assert began in ([], [str(found[1].step if found else 0)]), f"seed {seed}\n{output}"
        assert struck, f"seed {seed}: the run ended before it was killed for the {kills + 1}th time\n{output}"
    finished(launch(tiny, run, *SETTINGS), seconds=SECONDS)
    assert read_sample_log(run) == {step: list(range(8 * step, 8 * step + 8)) for step in range(STEPS)}, f"seed {seed}"
    whole, restarted = weights(unbroken), weights(run)
    for name, tensor in whole.items():
        assert torch.equal(tensor, restarted[name]), f"seed {seed}: {name} differs after {kills} kills"


def test_a_rank_that_stands_still_ends_the_run(tiny, unbroken, tmp_path):
    """SIGSTOP: the other rank ends itself after faults.hang_seconds, the launcher kills the stopped one within half a
    minute more, and the next start goes on."""
    run = tmp_path / "run"
    process = launch(tiny, run, *SETTINGS, "faults.hang_seconds=4")
    while process.poll() is None and len(read_metrics(run, "train")) < 3:
        time.sleep(0.01)
    ranks = [pid for pid, launcher in processes(run).items() if not launcher]
    os.kill(max(ranks), signal.SIGSTOP)
    begun = time.monotonic()
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        kill(process)
    gone(run, 5)
    assert process.returncode not in (0, None), output
    assert time.monotonic() - begun < 4 + 4 + 45, output  # silence, the look every second, the launcher's patience
    assert "stands still: step" in output and "faults.hang_seconds" in output, output
    trained(tiny, run, *SETTINGS)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(unbroken).items())


def test_a_process_that_cannot_even_say_so_is_ended():
    """The watchdog's own thread needs the interpreter; what holds that is ended from outside of it."""
    program = "from beitforge.pipeline.cluster import watchdog; watchdog._GRACE = 1.0; import re\n"
    program += "with watchdog.Watchdog(0.5, 0) as dog:\n    dog.beat('a step')\n    re.match('(a+)+$', 'a' * 60 + 'b')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode not in (0, EXIT_HUNG) and "Timeout" in done.stderr
