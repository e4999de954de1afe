"""What does `tokenize` cost beside the tokenizer: its bookkeeping by the number of shards, and its rate beside the bare
tokenizer's."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beitforge.pipeline.cli import main as beitforge
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Tokenizer
from beitforge.pipeline.stages import tokenize
from beitforge.pipeline.tokenizers.dalle import DalleShape
from beitforge.pipeline.tokenizers.dvae import Dvae, save_dvae
from beitforge.pipeline.tokenizers.storage import save_tokenizer
from beitforge.shards.stream.view_batches import Piece, ViewBatch, ViewCutter
from benchmarks.data.loader_corpus import corpus
from benchmarks.learning.tokenizer_precision import random_dalle
from benchmarks.results import write

ROOT = Path(__file__).resolve().parents[2]
SHARDS, PROCESSES = (1_000, 10_000), 2
IMAGES, PER_SHARD, VIEWS, ROUNDS = 96, 16, 4, 2  # of the own dVAE's rate; DALL-E's encoder takes FEW images
FEW = 4
_PATCHES = 196


def tiny_shards(folder: Path, count: int) -> Path:
    """A set of `count` shards, all of them the same tar of one image of 8 × 8."""
    one, out = folder / "one", folder / f"shards-{count}"
    if not one.exists():
        (folder / "images").mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "images" / "a.png")
        assert beitforge(["pack", str(folder / "images"), str(one), "--workers", "1"]) == 0
    content = json.loads((one / "manifest.json").read_text())
    (entry,) = content["shards"]
    out.mkdir()
    for number in range(count):
        for suffix in (".tar", ".index.safetensors"):
            os.link(one / f"{entry['name']}{suffix}", out / f"s{number:06d}{suffix}")
    content["shards"] = [{**entry, "name": f"s{number:06d}"} for number in range(count)]
    del content["digest"]
    (out / "manifest.json").write_text(json.dumps(content))
    return out


def process(words: list[str]) -> None:
    """Be one process of `tokenize`; says its CPU seconds, and how often it opened, listed and asked for files."""
    calls: Counter = Counter()
    stat = os.stat

    def counting(*args: object, **options: object) -> os.stat_result:
        calls["stats"] += 1
        return stat(*args, **options)  # type: ignore[arg-type]

    config = load_config(words[0], words[1:])
    events = {"open": "opens", "os.scandir": "listings", "os.listdir": "listings"}
    sys.addaudithook(lambda event, _: calls.update([events[event]] if event in events else []))
    os.stat = counting
    _cost_nothing()
    begun = time.process_time()
    assert tokenize.run(config) == 0
    print(json.dumps({"CPU s": time.process_time() - begun, **calls}))


def _cost_nothing() -> None:
    """Views that are drawn and cut once and given ever after, and tokens of nothing: what is left is bookkeeping."""
    made: list[ViewBatch] = []
    cut = ViewCutter.cut

    def again(cutter: ViewCutter, piece: Piece) -> ViewBatch:
        if not made:
            made.append(cut(cutter, piece))
        return made[0]._replace(piece=piece)

    def nothing(task: tokenize.Task, batch: ViewBatch) -> np.ndarray:
        return np.zeros((task.cutter.num_views, len(batch.bad), _PATCHES), np.uint16)

    setattr(ViewCutter, "cut", again)  # noqa: B010 (a method of a frozen class)
    setattr(tokenize.Task, "tokens", nothing)  # noqa: B010


def bookkeeping(folder: Path, count: int) -> dict:
    """A row: `PROCESSES` processes that share `count` shards; the costs are the mean process's."""
    small = Tokenizer(vocabulary=16, width=4, embedding=4, residual_blocks=0)
    save_dvae(folder / "small", Dvae(small, seed=0), small)
    words = [str(ROOT / "configs" / "beit_base.yaml"), f"data.images={tiny_shards(folder, count)}"]
    words += [f"data.tokens={folder}/tokens-{count}", f"data.tokenizer={folder}/small", "data.heldout_images="]
    words += ["data.heldout_tokens=", "tokenizer.vocabulary=16"]
    words += ["view.num_views=1", "loader.workers=0"]
    command = [sys.executable, "-m", "benchmarks.data.tokenize", "--process", *words]
    places = [{"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)} for rank in range(PROCESSES)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place}, stdout=subprocess.PIPE, text=True)
        for place in places
    ]
    said = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
    assert (folder / f"tokens-{count}" / "manifest.json").exists() and not any(one.returncode for one in running)
    shutil.rmtree(folder / f"tokens-{count}")
    mean = {name: sum(one.get(name, 0) for one in said) / PROCESSES for name in ("CPU s", "stats", "opens", "listings")}
    return {"shards": count, **mean, "CPU ms a shard it made": 1e3 * mean["CPU s"] / (count / PROCESSES)}


def rate(folder: Path, tokenizer: Path, images: int, label: str, resample: str) -> dict:
    """A row: views a second of `tokenize` and of its tokenizer on the same views, cut before; in turn."""
    words = [f"data.images={folder}/photographs-{images}", f"data.tokenizer={tokenizer}", "data.heldout_images="]
    words += ["data.heldout_tokens=", f"view.num_views={VIEWS}", f"loader.workers={os.cpu_count()}"]
    found: dict[str, list[float]] = {"wall": [], "CPU": [], "bare wall": [], "bare CPU": []}
    for turn in range(ROUNDS):
        out = folder / f"tokens-{tokenizer.name}-{turn}"
        config = load_config(str(ROOT / "configs" / "beit_base.yaml"), [*words, f"data.tokens={out}"])
        (task,) = tokenize._tasks(config)
        shards = task.images.manifest.shards
        pieces = [Piece(number, 0, shard.samples) for number, shard in enumerate(shards)]
        pixels = [task.pixels(task.cutter.cut(piece)) for piece in pieces]
        with torch.no_grad():
            begun = _clocks()
            for batch in pixels:
                task.tokenizer.tokenize(batch)
        _add(found, "bare ", begun)
        begun = _clocks()
        task.folder.begin()
        tokenize._tokenize_set(config, task)
        _add(found, "", begun)
    views = images * VIEWS
    ratios = [np.divide(found[f"bare {clock}"], found[clock]) for clock in ("CPU", "wall")]
    return {
        "tokenizer": label,
        "filter": resample,
        "views": views,
        "views/s": views / float(np.median(found["wall"])),
        "bare views/s": views / float(np.median(found["bare wall"])),
        "bare / tokenize, CPU s": float(np.median(ratios[0])),
        "bare / tokenize, time": float(np.median(ratios[1])),
    }


def _clocks() -> tuple[float, float]:
    spent = os.times()
    return time.monotonic(), spent.user + spent.system + spent.children_user + spent.children_system


def _add(found: dict[str, list[float]], prefix: str, begun: tuple[float, float]) -> None:
    for clock, start, end in zip(("wall", "CPU"), begun, _clocks(), strict=True):
        found[f"{prefix}{clock}"].append(end - start)


def photographs(folder: Path, count: int) -> None:
    """A set of `count` images like ImageNet's, `PER_SHARD` a shard."""
    chosen = folder / f"chosen-{count}"
    chosen.mkdir()
    for path in corpus(IMAGES).files()[:count]:
        shutil.copy(path, chosen / path.name)
    out, per_shard = folder / f"photographs-{count}", min(PER_SHARD, count // 2)
    words = ["pack", str(chosen), str(out), "--workers", "1", "--samples-per-shard", str(per_shard)]
    assert beitforge(words) == 0


def main() -> None:
    """Both questions; two tables would be two files, so a row has what it has."""
    tokenize._provenance = lambda task: {}  # once a set, whatever its size
    memory = Path("/dev/shm")  # so that it is no disk's flushing that is measured
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        kept = [bookkeeping(folder, count) for count in SHARDS]
        photographs(folder, IMAGES)
        photographs(folder, FEW)
        rows = []
        for resample in ("lanczos", "torch lanczos"):
            settings = Tokenizer(filter=resample)
            save_dvae(folder / f"dvae {resample}", Dvae(settings, seed=0), settings)
            rows.append(rate(folder, folder / f"dvae {resample}", IMAGES, "own dVAE", resample))
        shape, weights = dataclasses.asdict(DalleShape(has_decoder=False)), random_dalle().state_dict()
        save_tokenizer(folder / "dalle", weights, "dalle", shape, Size(112, 112), "lanczos")
        rows.append(rate(folder, folder / "dalle", FEW, "DALL-E's encoder", "lanczos"))
    growth = {name: kept[1][name] / kept[0][name] for name in ("CPU s", "stats", "opens")}
    ratios = {f"{name} at {SHARDS[1]:,} shards / at {SHARDS[0]:,}": value for name, value in growth.items()}
    ratios |= {
        f"tokenize / bare tokenizer, {row['tokenizer']}, {row['filter']}": row["bare / tokenize, CPU s"] for row in rows
    }
    notes = [
        f"Bookkeeping of {PROCESSES} processes that share the shards, views and tokens given for nothing, the "
        "mean process: "
        + "; ".join(
            f"{row['shards']:,} shards {row['CPU s']:.1f} CPU s ({row['CPU ms a shard it made']:.2f} ms a shard that "
            f"it made, its file included), {row['stats']:,.0f} stats, {row['opens']:,.0f} opens, "
            f"{row['listings']:.0f} listings"
            for row in kept
        )
        + ".",
        f"Rates: {os.cpu_count()} cores, which the tokenizer's threads share with as many workers; "
        f"images like ImageNet's, {VIEWS} views each, weights drawn at random; median of {ROUNDS} turns. Time is the "
        "machine's at that hour; CPU seconds, workers' included, are what a machine has to give.",
    ]
    write("tokenize", "what does tokenize cost beside the tokenizer?", rows, ratios, notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        process(sys.argv[2:])
    else:
        main()
