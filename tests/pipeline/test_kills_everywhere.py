"""Every command that writes is killed at random moments, its processes singly or all at once, and started again until
it ends: what it leaves is byte for byte what a call that nobody killed leaves.

A few kills of each here; a thousand in all with BEITFORGE_NIGHTLY=1, whose counts BENCHMARKS.md has.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.training.sample_log import read_sample_log
from tests.conftest import TINY
from tests.fuzzing import tried
from tests.ranks import places, server
from tests.shards.storage.servers import http_server

NIGHTLY = bool(os.environ.get("BEITFORGE_NIGHTLY"))
KILLS = 125 if NIGHTLY else 4  # of each command
PATIENCE = 120.0  # seconds for one call to end
GRACE = 5.0  # seconds that the others have when one was killed: who waits for it at the start is ended by the launcher
RUN = ["checkpoint.every=2 steps", "checkpoint.keep=2", "log.every_steps=1", "loader.workers=1", "log.positions=true"]
NO_HELDOUT = ["data.heldout_images=", "data.heldout_tokens="]


@dataclass(frozen=True, kw_only=True)
class Killed:
    """A command under attack. words(out): what follows `python -m beitforge`; made(out): what it leaves, to compare;
    whole(out): raises AssertionError when what is there at this moment is half of something."""

    words: Callable[[Path], list[str]]
    made: Callable[[Path], dict]
    processes: int = 1
    prepare: Callable[[Path], None] = lambda out: None
    whole: Callable[[Path], None] = field(default=lambda out: None)


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """sha256 of every file below a folder, but for what killed calls left beside the finished ones."""
    paths = (path for path in folder.rglob(pattern) if path.is_file() and ".partial" not in path.name)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def trained(run: Path) -> dict:
    """Every weight of the last checkpoint and the samples of every step."""
    found = newest(run, lambda _: None)
    assert found is not None
    weights = zero_layout.open_checkpoint(found[0], found[1].zero_stage, found[1].groups).weights()
    numbers = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in weights}
    return {"step": found[1].step, "weights": numbers, "samples": read_sample_log(run)}


class Calls:
    """The calls of one command, each as forked ranks in sessions of their own."""

    def __init__(self, command: Killed, out: Path, logs: Path):
        self.command, self.out, self.logs, self.count = command, out, logs, 0
        self.pids: list[int] = []

    def start(self) -> None:
        self.count += 1
        words = ["beitforge", *self.command.words(self.out)]
        for rank, place in enumerate(places(self.command.processes)):
            outputs = (self.logs / f"{self.count}-{rank}.out", self.logs / f"{self.count}-{rank}.err")
            self.pids.append(server().start(words, {**os.environ, **place}, *outputs))

    def running(self) -> list[int]:
        server().wait(-1, 0.001)
        return [pid for pid in self.pids if server().codes.get(pid) is None]

    def ended(self, seconds: float, launched: bool = False) -> list[int]:
        """Exit codes, once all have ended of themselves within so long. What is left is killed, as a launcher does
        (launched) or as a failure."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.01)
        late = self.running()
        self.kill(late)
        codes = [server().codes[pid] for pid in self.pids]
        self.pids = []
        assert launched or not late, f"still running after {seconds} s:\n{self.said()}"
        return codes

    def kill(self, pids: list[int]) -> None:
        """SIGKILL processes with all of their sessions, loader and packing workers too."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in pids:
            server().wait(pid, 30)

    def said(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.logs.glob(f"{self.count}-*.err")))


def unbroken(command: Killed, out: Path, logs: Path) -> tuple[dict, float]:
    """What a call that nobody kills leaves, and the seconds it takes."""
    command.prepare(out)
    calls, begun = Calls(command, out, logs), time.monotonic()
    calls.start()
    assert not any(calls.ended(PATIENCE)), calls.said()
    seconds = time.monotonic() - begun
    return command.made(out), seconds


def attack(command: Killed, out: Path, logs: Path, kills: int, seconds: float, draws: random.Random) -> Iterator[dict]:
    """Kill calls until `kills` have been killed; yields what is left each time that one reaches its end."""
    done = 0
    while done < kills:
        shutil.rmtree(out, ignore_errors=True)
        command.prepare(out)
        calls, finished = Calls(command, out, logs), False
        while not finished:
            calls.start()
            reach = time.monotonic() + draws.uniform(0, 1.2 * seconds)
            while calls.running() and time.monotonic() < reach:
                time.sleep(0.001)
            running = calls.running()
            if struck := bool(running) and done < kills:
                done += 1
                calls.kill(running if draws.random() < 0.5 else [draws.choice(running)])
            codes = calls.ended(GRACE if struck else PATIENCE, launched=struck)
            finished = not any(codes)
            assert finished or -signal.SIGKILL in codes, calls.said()
            command.whole(out)
        yield command.made(out)


def set_commands(tiny) -> dict[str, Killed]:
    """The commands that make shard sets and their tokens."""
    images, shards = tiny.folder / "images" / "train", tiny.folder / "shards" / "train"

    def copied(out: Path) -> None:
        out.mkdir(parents=True)
        for tar in shards.glob("*.tar"):
            shutil.copy2(tar, out)

    def pack(workers: int) -> Killed:
        options = ["--samples-per-shard", "4", "--workers", str(workers)]
        return Killed(words=lambda out: ["pack", str(images), str(out), *options], made=digests)

    tokenize = ["tokenize", "--rank", str(tiny.config), *NO_HELDOUT]
    return {
        "pack": pack(1),
        "pack with workers": pack(2),
        "index": Killed(words=lambda out: ["index", str(out), "--workers", "1"], made=digests, prepare=copied),
        "tokenize": Killed(words=lambda out: [*tokenize, f"data.tokens={out}"], made=digests, processes=2),
    }


def training_commands(tiny, folder: Path, url: str) -> dict[str, Killed]:
    """The commands that train, from files and from the server at `url`, and what exports a run."""
    config, labelled, run = str(tiny.config), folder / "labelled.yaml", folder / "run"
    data = {"labelled_images": str(tiny.folder / "shards" / "train")}
    data |= {"labelled_test": str(tiny.folder / "shards" / "test")}
    tune = {"duration": "16 steps", "global_batch": 8, "micro_batch": 4, "randaugment": "", "warmup": "2 steps"}
    labelled.write_text(yaml.safe_dump({**TINY, "data": data, "finetune": tune}))
    short = ["pretrain", "--rank", config, "train.duration=6 steps", *NO_HELDOUT]
    unbroken(Killed(words=lambda out: [*short, f"train.run={out}"], made=lambda _: {}), run, folder)
    tokenizer = ["tokenizer", "--rank", config, "tokenizer.duration=12 steps", "tokenizer.global_batch=8"]
    tokenizer += ["tokenizer.micro_batch=4", *RUN, *NO_HELDOUT]
    remote = ["pretrain", "--rank", config, f"data.images={url}/shards/train", f"data.tokens={url}/tokens/train"]
    remote += ["train.global_batch=12", "train.duration=16 steps", "train.zero_stage=3", *RUN, *NO_HELDOUT]

    def no_half_export(out: Path) -> None:
        assert not out.exists() or set(digests(out)) == {"model.safetensors", "config.json", "beitforge.json"}

    return {
        "tokenizer": Killed(
            words=lambda out: [*tokenizer, f"data.tokenizer={out}"],
            made=lambda out: digests(out, "tokenizer.*"),
            processes=2,
        ),
        "finetune": Killed(
            words=lambda out: ["finetune", "--rank", str(labelled), f"finetune.run={out}", *RUN],
            made=trained,
            processes=2,
        ),
        "export": Killed(words=lambda out: ["export", str(run), str(out)], made=digests, whole=no_half_export),
        "pretrain from a server, with cache": Killed(
            words=lambda out: [*remote, f"train.run={out}/run", f"data.cache={out}/cache"],
            made=lambda out: trained(out / "run"),
            processes=3,
        ),
    }


@pytest.fixture(scope="module")
def commands(tiny, tmp_path_factory) -> Iterator[dict[str, Killed]]:
    with http_server(tiny.folder) as url:
        yield set_commands(tiny) | training_commands(tiny, tmp_path_factory.mktemp("kills"), url)


COMMANDS = ("pack", "pack with workers", "index", "tokenize", "tokenizer", "finetune", "export")
COMMANDS = (*COMMANDS, "pretrain from a server, with cache")


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_killed_ends_as_if_it_had_not_been(commands, tmp_path, name):
    command, seed = commands[name], int.from_bytes(os.urandom(4), "little")
    (tmp_path / "logs").mkdir()
    expected, seconds = unbroken(command, tmp_path / "whole", tmp_path / "logs")
    print(f"{name}: seed {seed}, {seconds:.1f} s unbroken")
    for found in attack(command, tmp_path / "out", tmp_path / "logs", KILLS, seconds, random.Random(seed)):
        assert found == expected, f"seed {seed}"
    tried(KILLS, f"kills of {name}")
