"""The first and the last rank of 64 to 4,096: what they read, keep, write and say. The others are torch's fake process
group (tests/pipeline/large_worlds.py), so nothing here waits for a network, and sums are of one rank."""

import copy
import functools
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from beitforge.pipeline.checkpoints import zero_layout
from beitforge.pipeline.distributed import collectives
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.doctor.findings import OK, WARNING, Finding, to_text
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.shards.stream.order import Order, OrderPolicy, RankBatches, rank_batches
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.simulated_gpu import DEVICE, simulated_gpu

WORLDS = (64, 512, 4096)
BATCH, STEPS = 4096, 2
SHORT = [f"train.duration={STEPS} steps", f"train.global_batch={BATCH}", "train.micro_batch=1", "log.every_steps=1"]
SHORT += ["optimizer.warmup=1 steps", "log.evaluation_share=0", "data.heldout_images=", "data.heldout_tokens="]
SHORT += ["log.positions=true", "loader.lanes=256"]


def rank_of(*words: object) -> tuple[dict, list[str]]:
    """What a rank found, and every line that it said before."""
    done = run_ranks("tests.pipeline.large_worlds", *words)
    assert done.returncode == 0, done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return json.loads(found), [line for line in (done.stdout + done.stderr).splitlines() if line != found]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The run folder of the first and the last rank of a world, and what each found and said."""

    @functools.cache
    def found(world: int) -> tuple[Path, list[tuple[dict, list[str]]]]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        words = ["train", tiny.config, f"train.run={folder}", *SHORT]
        return folder, [rank_of(rank, world, *words) for rank in (0, world - 1)]

    return found


# The stream.


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_share_a_step_without_gap_or_overlap(world, paired):
    """Every rank's batches of three steps far into a run: each sample once, and the steps those of any other world."""
    batch, first = 2 * BATCH, 10**12 + 7
    micro = 2 if world == 4096 else 16
    steps = []
    for step in range(3):
        samples = [
            rank_batches(
                first_sample=first,
                global_batch=batch,
                micro_batch=micro,
                rank=rank,
                world=world,
                steps=3,
                paired=paired,
            )
            for rank in range(world)
        ]
        turns = range(step * batch // (micro * world), (step + 1) * batch // (micro * world))
        steps.append(np.concatenate([batches[turn] for batches in samples for turn in turns]))
    for step, samples in enumerate(steps):
        assert np.array_equal(np.sort(samples), first + step * batch + np.arange(batch))


@pytest.mark.parametrize("world", WORLDS)
def test_an_epoch_is_read_once_by_all_ranks(world):
    """Samples of a whole epoch, rank by rank, located: every row of every shard once; the last rank is of its class of
    lanes."""
    order = Order([1000, 3, 999, 64] * 16, OrderPolicy(chunk=16, window=4, lanes=256))
    epoch, classes = 3, math.gcd(256, world)
    numbers = epoch * order.samples + np.arange(order.samples)
    seen = []
    for rank in range(world):
        mine = numbers[numbers % world == rank]
        _, shards, rows = order.locate(mine)
        seen.append(shards * 1000 + rows)
        assert set((mine % order.samples % 256).tolist()) <= set(order._lanes_of(rank, world, epoch))
    everything = np.concatenate(seen)
    assert len(everything) == len(np.unique(everything)) == order.samples
    assert len(order._lanes_of(world - 1, world, epoch)) == 256 // classes


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_rank_took_is_what_the_order_gives_it(runs, world):
    folder, _ = runs(world)
    for rank in (0, world - 1):
        lines = (folder / f"positions/rank-{rank}.jsonl").read_text().splitlines()
        for step, line in enumerate(map(json.loads, lines)):
            assert line["step"] == step
            assert sorted(line["samples"]) == list(range(step * BATCH + rank, (step + 1) * BATCH, world))


# What a rank takes, says and writes.


@pytest.mark.parametrize("rank", [0, -1])
def test_nothing_of_a_rank_grows_badly(runs, rank):
    """64 ranks and 4,096: no more collectives a step, open files, threads or lines; memory and time by little."""
    (few, few_said), (many, many_said) = (runs(world)[1][rank] for world in (64, 4096))
    assert many["talked"] == {**few["talked"], "all_reduce": many["talked"]["all_reduce"]}
    assert many["talked"]["all_reduce"] <= few["talked"]["all_reduce"]  # 64 accumulate micro batches
    assert many["talked"]["all_gather_object"] <= 4  # a good part of a second each, at the start and the end
    assert many["open files"] <= few["open files"] + 4 and many["threads"] <= few["threads"] + 1
    assert many["bytes"] < few["bytes"] + 64e6
    assert many["seconds"] < few["seconds"] + 5
    assert len(many_said) == len(few_said)
    if rank:
        assert many_said == []


@pytest.mark.parametrize("world", WORLDS)
def test_files_of_a_run(runs, world):
    """A rank writes its own part of a checkpoint; the logs are the first rank's, one line however many ranks."""
    folder, _ = runs(world)
    checkpoint, state = newest(folder, print)
    assert (state.step, state.world, state.samples_seen) == (STEPS, world, STEPS * BATCH)
    parts = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, world - 1)}
    assert {path.name for path in checkpoint.iterdir()} == parts | {"mp_rank_00_model_states.pt", "state.json"}
    lines = read_metrics(folder, "train")
    assert len(lines) == STEPS and max(len(json.dumps(line)) for line in lines) < 1000
    ranks = json.loads((folder / "ranks.json").read_text())["ranks"]
    assert [row["rank"] for row in ranks] == list(range(world))
    assert (folder / "ranks.json").stat().st_size < 160 * world


def test_gathers_are_read_at_once(monkeypatch):
    """On a GPU every read waits for the device: one for the numbers of 4,096 ranks, not one each."""
    world, calls = World(5, 4096, DEVICE), []

    def gather(everyone: torch.Tensor, mine: torch.Tensor) -> None:
        calls.append(everyone.numel())
        everyone.copy_(mine.repeat(world.size, *([1] * (mine.dim() - 1))).view_as(everyone))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    with simulated_gpu(monkeypatch) as gpu:
        found = collectives.all_gather_values([1.0, 2.0, 3.0], world)
        assert found == [[1.0, 2.0, 3.0]] * 4096
        assert gpu.waits == ["_to_copy"]
        rows = collectives.all_gather_rows(torch.ones(2, 3, device=DEVICE), world)
        assert rows.shape == (8192, 3) and len(gpu.waits) == 2
    assert calls == [3 * 4096, 4096, 6 * 4096]


# Elastic restarts.


@pytest.fixture(scope="module")
def of_4096(runs, tmp_path_factory) -> Path:
    """A checkpoint of 4,096 ranks: the first one's file, and all others cut from the same numbers as it says."""
    made, state = newest(runs(4096)[0], print)
    folder = tmp_path_factory.mktemp("made") / made.name
    folder.mkdir()
    model = torch.load(made / "mp_rank_00_model_states.pt", weights_only=False)
    shutil.copy(made / "mp_rank_00_model_states.pt", folder)
    first = torch.load(made / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    template, groups = first["optimizer_state_dict"], []
    for group, shapes in enumerate(model["param_shapes"]):
        paddings = template["param_alignment_paddings"][group]
        parts = [
            torch.cat([torch.arange(math.prod(shape), dtype=torch.float32), torch.zeros(padding)])
            for shape, padding in zip(shapes.values(), paddings, strict=True)
        ]
        share = template["single_partition_of_fp32_groups"][group].numel()
        whole = torch.zeros(4096 * share)
        flat = torch.cat(parts)
        whole[: len(flat)] = flat
        groups.append((whole, share))
    last = torch.load(made / "zero_pp_rank_4095_mp_rank_00_optim_states.pt", weights_only=False)["optimizer_state_dict"]
    assert [part.numel() for part in last["single_partition_of_fp32_groups"]] == [
        max(0, min(share, sum(map(math.prod, model["param_shapes"][group].values())) - 4095 * share))
        for group, (_, share) in enumerate(groups)
    ]
    for rank in range(4096):
        content = copy.copy(template)
        content["single_partition_of_fp32_groups"] = []
        content["base_optimizer_state"] = {**template["base_optimizer_state"], "state": {}}
        for group, (whole, share) in enumerate(groups):
            own = whole[rank * share : (rank + 1) * share].clone()
            content["single_partition_of_fp32_groups"].append(own)
            moments = {"exp_avg": -own, "exp_avg_sq": 2 * own, "step": torch.tensor(2.0)}
            content["base_optimizer_state"]["state"][group] = moments
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({**first, "optimizer_state_dict": content}, path)
    (folder / "state.json").write_text((made / "state.json").read_text())
    assert state.world == 4096
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_from_4096_to_64(tiny, of_4096, stage):
    """The first and the last of 64 ranks hold their parts of the 4,096, number for number; and go on with the sample
    behind the last one that any of those saw."""
    words = ["lay", of_4096, tiny.config, *SHORT, f"train.zero_stage={stage}"]
    words += ["deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}"] if stage == 3 else []
    held = []
    for rank in (0, 63):
        found, _ = rank_of(rank, 64, *words)
        assert found["right"] and found["held"]
        assert found["samples"] == STEPS * BATCH
        held.append({(name, number) for name, (start, end) in found["held"].items() for number in range(start, end)})
        following = RankBatches(found["samples"], BATCH, 1, rank, 64, 1)[0]
        assert following.tolist() == [STEPS * BATCH + rank]
    assert not held[0] & held[1]


def test_weights_of_4096_ranks_come_out_whole(of_4096):
    """As `export` reads them."""
    saved = zero_layout.open_checkpoint(of_4096, 2, [])
    for name, tensor in saved.weights():
        assert torch.equal(tensor.flatten(), torch.arange(tensor.numel(), dtype=torch.float32)), name


# Commands for such worlds.


def command(*words: object) -> tuple[str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "beitforge", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, time.monotonic() - started


def test_a_plan_and_a_script(tmp_path):
    """In a second or two, and no longer script for 512 nodes than for 8."""
    said, seconds = command("plan", "beit_base", "train.global_batch=4096", "--gpus", "64,512,4096", "--json")
    assert seconds < 20 and all(f'"gpus": {world}' in said for world in WORLDS)
    lengths = []
    for nodes in (8, 512):
        words = ["pretrain", "beit_base", "train.global_batch=4096", f"train.run={tmp_path}/{nodes}"]
        _, seconds = command("slurm", "--dry-run", "--nodes", nodes, "--gpus-per-node", 8, *words)
        assert seconds < 20
        script = (tmp_path / f"{nodes}/slurm/pretrain.sbatch").read_text()
        assert f"--nodes={nodes}\n" in script
        lengths.append(len(script.splitlines()))
    assert lengths[0] == lengths[1]


def test_doctors_table_of_512_hosts():
    """A line a host, faults that many share named once, in a moment."""
    found = [
        Finding(level=OK, check=check, host=f"node{rank // 8}", rank=rank, what=f"{check} is well", value="1")
        for rank in range(4096)
        for check in ("device", "kernels", "memory", "step", "loader", "signals")
    ]
    found += [Finding(level=WARNING, check="shm", host=f"node{n}", what="64 MiB free", cure="more") for n in range(512)]
    started = time.monotonic()
    lines = to_text(found, 1.0).splitlines()
    assert time.monotonic() - started < 5
    assert len(lines) < 512 + 40
    assert sum("64 MiB free" in line for line in lines) == 1 and "and 508 more" in "".join(lines)
