"""A process of test_large_worlds.py: one rank of a world whose others are torch's fake process group.

`python -m tests.pipeline.large_worlds RANK WORLD train CONFIG [SETTINGS …]` trains; `… lay FOLDER CONFIG …` puts a
checkpoint into an engine of this world. Last it prints what it took, or what the engine holds, as JSON.
"""

import collections
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from beitforge.pipeline.checkpoints import live_layout, zero_layout
from beitforge.pipeline.cli import execute, parse_arguments
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.distributed.deepspeed_config import setup_from
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.distributed.process_group import start_world
from beitforge.pipeline.evaluation import evaluations
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.runs.checkpoints import read_state
from beitforge.pipeline.training.optim import parameter_groups

_NODE = 8  # ranks of a host
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "barrier")


def join(rank: int, world: int) -> collections.Counter:
    """Become a rank of this world; returns how often it talks to the others. To a gather they bring what this one
    brings, to an evaluation's sums one in all (none of a set's few images is the last rank's), and the first broadcasts
    what this rank would."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank % _NODE), LOCAL_WORLD_SIZE=str(_NODE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", GLOO_SOCKET_IFNAME="lo")
    start, talked = dist.init_process_group, collections.Counter()

    def fake(*_: Any, **__: Any) -> None:
        start("fake", rank=rank, world_size=world, store=FakeStore())

    def counted(name: str, plain: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            talked[name] += 1
            return plain(*args, **kwargs)

        return collective

    dist.init_process_group = fake
    evaluations.all_sum = lambda tensor: tensor + 1
    dist.broadcast_object_list = lambda items, **_: None
    for name in _COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))
    return talked


def train(words: list[str], talked: collections.Counter) -> dict:
    started = time.perf_counter()
    code = execute(parse_arguments(["pretrain", "--rank", *words]))
    return {
        "code": code,
        "seconds": time.perf_counter() - started,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "talked": talked,
    }


def lay(folder: Path, words: list[str]) -> dict:
    """How much of the checkpoint this rank's engine holds, and whether all of it is as it should be: number i of a
    parameter's master is i, of its first moment -i, of its second 2 i."""
    config = load_config(words[0], words[1:])
    world = start_world()
    beit = Beit(config.model, config.tokenizer.vocabulary, 0)
    engine = Engine(beit, parameter_groups(beit, 0.05), setup_from(config, world, 1), world)
    state = read_state(folder)
    started = time.perf_counter()
    live_layout.load_into(engine, zero_layout.open_checkpoint(folder, state.zero_stage, state.groups))
    seconds, held, right = time.perf_counter() - started, {}, True
    for name, piece in live_layout.engine_pieces(engine):
        held[name] = [piece.start, piece.end]
        numbers = torch.arange(piece.start, piece.end, dtype=torch.float32)
        right &= torch.equal(piece.values["fp32"], numbers)
        right &= torch.equal(piece.values["exp_avg"], -numbers) and torch.equal(piece.values["exp_avg_sq"], 2 * numbers)
    return {"held": held, "right": right, "seconds": seconds, "samples": state.samples_seen}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, world, what, *words = sys.argv[1:]
    talked = join(int(rank), int(world))
    found = train(words, talked) if what == "train" else lay(Path(words[0]), words[1:])
    print(json.dumps(found), flush=True)
    os._exit(found.get("code", 0))


if __name__ == "__main__":
    main()
