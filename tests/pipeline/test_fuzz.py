"""Seeded fuzz of what people and others hand in: each case ends in a value or in one line, in bounded time and memory.

Some hundred cases a parser here, thousands with BEITFORGE_NIGHTLY=1.
"""

import json
import math
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from beitforge.pipeline.cluster.hostfile import read_hostfile
from beitforge.pipeline.cluster.ssh_environment import forwarded_lines, user_lines
from beitforge.pipeline.config.loading import from_dict, load_config, load_dict, to_yaml
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plan.assumptions import load_assumptions
from beitforge.pipeline.reports import comparison, components
from beitforge.pipeline.reports.provenance import what_ran
from beitforge.pipeline.reports.report import images_left_out, sections_of
from beitforge.pipeline.runs.record import read_config, read_record
from beitforge.pipeline.runs.status import Follower
from beitforge.pipeline.stages.import_encoder import described
from beitforge.pipeline.stages.import_encoder import run as import_encoder
from beitforge.pipeline.tokenizers.safe_pickle import read_pickle
from beitforge.pipeline.tokenizers.storage import load_tokenizer, stated_fingerprint
from beitforge.pipeline.watch import terminal
from beitforge.pipeline.weights.classifier import load_classifier
from beitforge.pipeline.weights.conversion import from_unilm, to_hf
from beitforge.pipeline.weights.encoder import class_names, fine_tuned, load_encoder
from beitforge.pipeline.weights.sources import Saved
from beitforge.shards.errors import ShardError
from tests.conftest import TINY
from tests.fuzzing import harmed, tried
from tests.pipeline.runs.made_runs import lines_of, measured

NIGHTLY = os.environ.get("BEITFORGE_NIGHTLY") == "1"
CASES = 3000 if NIGHTLY else 120
SECONDS = 5.0  # of one case, on a machine that does other things as well
MEMORY = 512 << 10  # KiB that all cases of a parser may add
NUMBERS = [
    0,
    -1,
    1,
    True,
    2**31,
    2**63,
    10**18,
    10**19,
    10**400,
    1e308,
    -1e308,
    5e-324,
    1e99,
    math.nan,
    math.inf,
    -math.inf,
    -0.0,
]
TEXTS = [
    "",
    "\0",
    "\n",
    "\x1b[2J",
    "\u2028",
    "<script>",
    "'\"><img src=x onerror=1>",
    "a" * 70_000,
    "\ud800",
    "9" * 5000,
]
TEXTS += [
    "auto",
    "1:30",
    "2024-01-01",
    "no",
    "!!python/object:os.system",
    "http://127.0.0.1:9/x",
    "/proc/self/mem",
    "-x",
]
ODD = [*NUMBERS, *TEXTS, None, [], {}, [[]], {"a": {}}, [1, 2], {"step": 1}]
YAML_PARTS = [
    "&a",
    "*a",
    "<<: ",
    "!!int ",
    "? ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "|\n",
    ">\n",
    "'",
    '"',
    "#",
    "%",
    "---\n",
    "\t",
    "0x",
    "1e9",
]
YAML_PARTS += ["[" * 50, "{a: " * 50, "- " * 50, "9" * 5000, "*a, " * 100, "\ufeff", "\x85", "~", "=", "@", "`"]


def exchanged(draw: random.Random, tree: Any, often: float = 0.1) -> Any:
    """A copy of plain values with some of them exchanged for odd ones, removed, or under another name."""
    if isinstance(tree, dict):
        found = {}
        for key, value in tree.items():
            chance = draw.random()
            if chance < often / 3:
                continue
            name = draw.choice(["x", "", "step", "a\nb", key.upper()]) if chance < often / 2 else key
            found[name] = draw.choice(ODD) if chance > 1 - often else exchanged(draw, value, often)
        return found
    if isinstance(tree, list):
        return [draw.choice(ODD) if draw.random() < often else exchanged(draw, value, often) for value in tree]
    return draw.choice(ODD) if draw.random() < often / 3 else tree


def dumped(tree: Any) -> bytes:
    """As JSON, numbers of any length included."""
    return (
        json.dumps(tree, default=str).encode()
        if not _long(tree)
        else repr(tree).replace("'", '"').encode("utf-8", "replace")
    )


def _long(tree: Any) -> bool:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return (isinstance(tree, int) and tree > 10**300) or any(map(_long, inner))


def cases(name: str, work: Callable[[random.Random], object], count: int = CASES) -> None:
    """Run seeded cases: each gives something, or raises an error that the command line turns into one line."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = 0
    for number in range(count):
        begun = time.process_time()
        try:
            work(random.Random(f"{name} {number}"))
            values += 1
        except (ConfigError, ShardError) as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 3000, (name, number)
        except Exception as error:
            raise AssertionError(f"{name}, case {number}: {type(error).__name__}: {error!s:.300}") from error
        assert time.process_time() - begun < SECONDS, (name, number)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY, name
    tried(count, f"{name}, {count - values} of them refused")
    assert values > 0, f"{name}: no case gave a value, so nothing behind the first refusal was reached"


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "file"


def test_configs(file):
    text = to_yaml(from_dict({**TINY, "deepspeed": {"zero_optimization": {"overlap_comm": True}}}, "test"))
    lines = text.splitlines()

    def case(draw: random.Random) -> None:
        if draw.random() < 0.5:
            file.write_bytes(harmed(text.encode(), draw))
        else:
            chosen = list(lines)
            for _ in range(draw.choice([1, 1, 2, 5])):
                place = draw.randrange(len(chosen))
                key, colon, _ = chosen[place].partition(":")
                odd = draw.choice([*map(str, NUMBERS[:8]), "1e308", "9e999", ".nan", ".inf", *TEXTS[1:], *YAML_PARTS])
                chosen[place] = key + colon + " " + "".join(draw.choices([odd, *YAML_PARTS], k=draw.choice([1, 2])))
            file.write_bytes("\n".join(chosen).encode("utf-8", "surrogatepass"))
        config = load_config(str(file), [])
        assert from_dict({}, "x") and load_config_again(file, to_yaml(config)) == config

    cases("config", case)


def load_config_again(file: Path, text: str) -> object:
    file.write_text(text, encoding="utf-8")
    return load_config(str(file), [])


def test_overrides():
    names = ["train.run", "train.duration", "train.global_batch", "model.mean", "tokenizer.input_size", "optimizer.lr"]
    names += ["deepspeed.a", "deepspeed.zero_optimization.stage", "data.images", "log.wandb", "checkpoint.asynchronous"]

    def case(draw: random.Random) -> None:
        value = draw.choice([*TEXTS, *map(str, NUMBERS[:8]), "1e308 epochs", "9e999", "224x" + "9" * 5000, *YAML_PARTS])
        name = draw.choice([*names, "." * 2000, "deepspeed" + ".a" * 5000, "x", "", "train", "train.x\ny"])
        tree = draw.choice([{}, {"train": {"run": "a"}}, {"train": 3}, {"train": None}])
        to_yaml(load_dict(dict(tree), [f"{name}{draw.choice(['=', '=', '=', ''])}{value}"], "test"))

    cases("override", case)


def test_dicts():
    """As a config.json of an encoder holds one."""
    tree = {**TINY, "deepspeed": {"zero_optimization": {"a": [1, 2, {"b": "c"}]}}}
    cases("dict", lambda draw: to_yaml(from_dict(exchanged(draw, tree, 0.02), "config.json")))


def test_hostfiles_and_variables(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    text = b"# hosts\nn1 slots=8\n\nme@n2.cluster   slots=4  # two\nn3 slots=1\n"

    def host(draw: random.Random) -> None:
        file.write_bytes(harmed(text, draw))
        found = read_hostfile(str(file))
        assert all(name.isascii() and name.isprintable() and not name.startswith("-") for name in found)

    def variables(draw: random.Random) -> None:
        file.write_bytes(harmed(b"A=b c\nNCCL_X=$(id)\n# x\n\nB = 'y'\n", draw))
        lines = forwarded_lines({}, user_lines({"DS_ENV_FILE": str(file)}))
        assert all(len(line.splitlines()) == 1 for line in lines)

    cases("hostfile", host)
    cases("variables", variables)


def test_plans(file):
    measured_by = {
        "measured": {"achieved_flops": 3e14, "node_read": 1e9},
        "rows": [{"path": "ours"}],
        "name": "loader",
        "notes": [],
    }

    def case(draw: random.Random) -> None:
        file.write_bytes(dumped(exchanged(draw, draw.choice([measured_by, measured_by["measured"]]))))
        load_assumptions([str(file)], [f"straggler_cv={draw.choice([*TEXTS, *map(str, NUMBERS[:8]), '0.05'])}"], 1e11)

    cases("plan", case)


def write_run(draw: random.Random, run: Path) -> None:
    """A run folder of which every file is a little, or much, of what it should be."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(from_dict({**TINY, "data": {"images": "http://127.0.0.1:9/x"}}, "x")))
    lines = [dumped(exchanged(draw, line)) for line in measured(lines_of(24, 24))]
    text = b"\n".join(lines) + b"\n"
    (run / "metrics.jsonl").write_bytes(harmed(text, draw) if draw.random() < 0.5 else text)
    bad = [{"sample": 1, "shard": "a", "key": "<b>", "reason": "x", "substitute": 2}]
    (run / "bad_samples.jsonl").write_bytes(b"\n".join(dumped(exchanged(draw, line)) for line in bad * 3))
    environment = {
        "host": "box",
        "world": 2,
        "versions": {"torch": "2"},
        "command": ["a", "b"],
        "job": "pretrain",
        "device": "cpu",
    }
    environment["job"] = draw.choice(["pretrain", "finetune", "tokenizer"])
    result = {"knn": 0.5, "linear": 0.6, "features": "mean", "chosen": True}
    probe = {
        "results": {"trained": result, "untrained": result},
        "step": 4,
        "classes": 5,
        "majority_class": 0.2,
        "epochs": 3,
    }
    probe |= {"train_samples": 10, "test_samples": 5, "tested_apart": True}
    ranks = {"time": 1e9, "ranks": [{"rank": 0, "host": "a", "data_wait": 0.1, "memory_bytes": 1e9}] * 2}
    for name, tree in (("environment", environment), ("probe", probe), ("ranks", ranks)):
        content = dumped(exchanged(draw, tree))
        (run / f"{name}.json").write_bytes(harmed(content, draw) if draw.random() < 0.3 else content)
    (run / "classes.json").write_bytes(harmed(b'["cat", "dog"]', draw))
    (run / "ended").write_bytes(harmed(b"24 finished\n", draw))


def test_run_folders(tmp_path):
    """As report, watch (page and terminal), a comparison, export and finetune read them."""
    run = tmp_path / "run"

    def case(draw: random.Random) -> None:
        write_run(draw, run)
        record = read_record(run, read_config(run))
        page = components.page("x", sections_of(record, [images_left_out("report")], what_ran(record, None, [])))
        assert "<img src=x" not in page and page.count("<script>") == 1, "what is read is escaped"
        components.page("x", comparison.sections_of([record, record]))
        follower = Follower(run)
        follower.refresh()
        follower.status()
        assert all(line.isprintable() for line in terminal.render(follower, 100))

    def small(draw: random.Random) -> None:
        write_run(draw, run)
        fine_tuned(run)
        class_names(run)

    cases("run", case, CASES // 3)
    cases("small files of a run", small, CASES // 3)


def safetensors_header(draw: random.Random, data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if draw.random() < 0.3:
        return struct.pack("<Q", draw.choice([0, 1, 2**60, 2**63, 2**32, len(data), length + 1])) + data[8:]
    if draw.random() < 0.5:
        return harmed(data, draw)
    text = dumped(exchanged(draw, header))
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_weights_folders(tmp_path):
    """model.safetensors and config.json of an encoder; tokenizer.json and its weights."""
    weights = save({"head.weight": torch.zeros(4, 4), "patch_embedding.weight": torch.zeros(8, 12)})
    encoder = {"kind": "beit", "step": 3, "samples_seen": 9, "tokens": "", "config": TINY}
    classifier = {**encoder, "kind": "beit-classifier", "num_classes": 4, "classes": ["a", "b", "c", "d"]}
    shape = {"vocabulary": 64, "width": 16, "embedding": 8, "residual_blocks": 1, "stride": 8}
    tokenizer = {"kind": "dvae", "shape": shape, "input_size": [32, 32], "filter": "lanczos", "fingerprint": "x"}

    def case(draw: random.Random) -> object:
        config = draw.choice([encoder, classifier])
        (tmp_path / "model.safetensors").write_bytes(safetensors_header(draw, weights))
        (tmp_path / "config.json").write_bytes(
            dumped(exchanged(draw, config)) if draw.random() < 0.5 else dumped(config)
        )
        (tmp_path / "tokenizer.safetensors").write_bytes(safetensors_header(draw, weights))
        (tmp_path / "tokenizer.json").write_bytes(dumped(exchanged(draw, tokenizer)))
        which = draw.randrange(6)
        if which == 0:
            return load_encoder(tmp_path)
        if which == 3:
            return load_classifier(tmp_path)
        if which == 1:
            return load_tokenizer(tmp_path)
        if which == 2:
            return import_encoder(tmp_path, tmp_path / "out", [])
        return stated_fingerprint(tmp_path) or read_config(tmp_path)

    cases("weights", case)


def test_descriptions_of_foreign_encoders():
    """What transformers, timm and the released code say of themselves."""
    shapes = {"{}norm.weight": (64,), "{}patch_embed.proj.weight": (64, 3, 8, 8), "{}cls_token": (1, 1, 64)}
    shapes |= {
        "{}blocks.0.mlp.fc1.weight": (256, 64),
        "{}blocks.0.attn.qkv.weight": (192, 64),
        "{}head.weight": (5, 64),
    }
    shapes |= {"{}rel_pos_bias.relative_position_bias_table": (52, 1)}
    weights = {name.format(""): torch.zeros(shape) for name, shape in shapes.items()}
    hf = {name.replace("beit.", ""): w for name, w in to_hf(from_unilm(weights), Model(patch_size=8)).items()}
    timm = {"architecture": "beit_base", "model_args": {"num_heads": 1, "global_pool": "token", "depth": 1}}
    timm |= {
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]},
        "label_names": ["a"] * 5,
    }
    words = {
        "model_type": "beit",
        "num_attention_heads": 1,
        "image_size": 32,
        "hidden_act": "gelu",
        "id2label": {"0": "a"},
    }
    words |= {
        "layer_norm_eps": 1e-6,
        "use_shared_relative_position_bias": True,
        "hidden_size": 64,
        "drop_path_rate": 0.1,
    }
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0.1, "size": {"height": 32}}
    arguments = {"model": "beit_base", "drop_path": 0.1, "use_mean_pooling": False, "input_size": 32, "nb_classes": 5}
    kinds = [(hf, words, pixels, {}), (weights, timm, {}, {}), (weights, {}, {}, arguments)]
    tried = [described(Saved(Path("x"), *kind), [], False) for kind in kinds]
    assert [found.library for found, *_ in tried] == ["transformers", "timm", "unilm"]

    def case(draw: random.Random) -> None:
        held, *said = draw.choice(kinds)
        for encoder_alone in (False, True):
            _, tree, _ = described(Saved(Path("x"), held, *(exchanged(draw, each) for each in said)), [], encoder_alone)
            load_dict(tree, [], "x")

    cases("description", case)


def test_pickles(file):
    tensors = {"model": {"a.weight": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.float16)}}
    torch.save(tensors, file)
    archive = file.read_bytes()
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    legacy = file.read_bytes()
    with zipfile.ZipFile(file, "w") as forged:
        forged.writestr("x/data.pkl", pickle.dumps({"model": {}}, protocol=2))
    forged_archive = file.read_bytes()

    def case(draw: random.Random) -> None:
        file.write_bytes(harmed(draw.choice([archive, archive, legacy, forged_archive]), draw))
        read_pickle(file, lambda saved: dict(saved["model"]) if isinstance(saved, dict) else {})

    cases("pickle", case)
