"""Run folders made by hand on real shards, tokens and tokenizers, with lines of every kind, for tests of reports."""

import dataclasses
import json
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import torch

from beitforge.pipeline.config.loading import from_dict, to_yaml
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.model.beit import Beit, Classifier
from beitforge.pipeline.stages import tokenize
from beitforge.pipeline.tokenizers.dvae import Dvae, save_dvae
from beitforge.shards.decode import codec
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions

SHAPE = {
    "view": {"num_views": 2, "area_min": 0.5},
    "tokenizer": {"input_size": 32, "vocabulary": 24, "width": 16, "embedding": 8, "residual_blocks": 0},
    "model": {"input_size": 64, "patch_size": 16, "layers": 1, "width": 16, "heads": 2, "drop_path": 0.0},
    "mask": {"num_patches": 6, "min_block": 2, "exact": False},
    "train": {"global_batch": 4, "micro_batch": 4, "precision": "fp32"},
    "loader": {"workers": 2},
    "finetune": {"input_size": 64, "global_batch": 4, "micro_batch": 4},
}


def config_of(folder: Path) -> Config:
    data = {name: str(folder / name) for name in ("images", "tokens", "heldout_images", "heldout_tokens", "tokenizer")}
    data |= {"labelled_images": data["images"], "labelled_test": data["heldout_images"]}
    return from_dict({**SHAPE, "data": data, "train": {**SHAPE["train"], "run": str(folder / "run")}}, "test")


def make_sets(folder: Path) -> Config:
    """Real shards, labelled by folder, tokens and a tokenizer; returns a config that reads them in this process."""
    config = config_of(folder)
    draw = np.random.default_rng(0)
    for name, count in (("images", 12), ("heldout_images", 9)):
        for i in range(count):
            there = folder / f"{name}-images" / ("even", "odd")[i % 2]
            there.mkdir(parents=True, exist_ok=True)
            small = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            data = codec.encode(codec.resize(small, (60, 80), "bicubic"), "png", 0)
            (there / f"{name}-{i:02}.png").write_bytes(data)
        pack(folder / f"{name}-images", folder / name, PackOptions(samples_per_shard=5), "0", 1)
    save_dvae(folder / "tokenizer", Dvae(config.tokenizer, seed=0), config.tokenizer)
    single = dataclasses.replace(config, loader=dataclasses.replace(config.loader, workers=0))
    assert tokenize.run(single) == 0
    return single


def write_run(folder: Path, config: Config, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "environment.json").write_text(json.dumps({"host": "box", "world": 2, "versions": {"torch": "2.13"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(folder: Path, config: Config, step: int) -> Beit:
    """A checkpoint as ZeRO stage 0 writes it."""
    beit = Beit(config.model, config.tokenizer.vocabulary, seed=1)
    _write_weights(folder, beit, step)
    return beit


def _write_weights(folder: Path, module: torch.nn.Module, step: int) -> None:
    there = folder / "checkpoints" / f"step-{step}"
    there.mkdir(parents=True)
    torch.save({"module": module.state_dict()}, there / "mp_rank_00_model_states.pt")
    files = {path.name: path.stat().st_size for path in there.iterdir()}
    state = {"step": step, "samples_seen": 4 * step, "world": 1, "zero_stage": 0, "precision": "fp32"}
    state |= {"images": "other", "tokens": "other", "config": "", "files": files}
    (there / "state.json").write_text(json.dumps(state))


def start(step: int, steps: int, time: float) -> dict:
    return {"step": step, "kind": "start", "time": time, "world": 2, "steps": steps, "epoch_samples": 12}


def lines_of(until: int, steps: int, begin: int = 0, every: int = 2, time: float = 1e9) -> list[dict]:
    """A start and its train and held-out lines, ten seconds apart."""
    lines = [start(begin, steps, time)]
    for step in range(begin + every, until + 1, every):
        values = {"loss": 3.5 - step / steps, "masked_accuracy": step / steps / 2, "data_wait_share": 0.25}
        values |= {"lr": 1e-3, "gradient_norm": 2.0, "images_per_second": 100.0 + step, "memory_bytes": 2**30}
        lines.append({"step": step, "kind": "train", "time": time + 10 * (step - begin), **values})
        if step % (5 * every) == 0:
            apart = {"loss": 3.0 - step / steps, "masked_accuracy": step / steps / 4, "samples": 9}
            lines.append({"step": step, "kind": "heldout", "time": time + 10 * (step - begin), **apart})
    return lines


def measured(lines: list[dict], every: int = 10) -> list[dict]:
    """The lines with everything a run may measure beside: views, surveys, an update left out and a return."""
    found = list(lines)
    for line in [line for line in lines if line["kind"] == "train" and line["step"] % every == 0]:
        step, time, loss = line["step"], line["time"], line["loss"]
        at = {"step": step, "time": time + 1}
        found.append({**at, "kind": "new_view", "loss": loss + 0.05, "masked_accuracy": 0.2, "samples": 9})
        found.append({**at, "kind": "seen_view", "loss": loss + 0.01, "masked_accuracy": 0.21, "samples": 9})
        found.append({**at, "kind": "heldout", "loss": loss + 0.1, "masked_accuracy": 0.18, "samples": 9})
        survey = {"knn": 0.3 + 0.4 * (1 - math.exp(-step / 100)), "knn_samples": 12, "entropy": 3 - step / 1e4}
        survey |= {
            "predicted_used": 20.0,
            "predicted_perplexity": 14.5,
            "targets_used": 22.0,
            "targets_perplexity": 18.0,
        }
        survey |= {"attention_distance_1": 12.0 + step / 100, "attention_distance_2": 30.0 - step / 100}
        found.append({**at, "kind": "survey", **survey, "seconds": 3.0, "share": 0.04})
    middle = found[len(lines) // 2]
    there = {"step": middle["step"] + 1, "time": middle["time"] + 1}
    found += [{**there, "kind": "skip", "row": 1.0}, {**there, "kind": "return", "to": 1.0}]
    return sorted(found, key=lambda line: line["time"])


def tuned_lines(until: int, time: float = 1e9) -> list[dict]:
    """A fine-tuning's."""
    lines = [start(0, until, time)]
    for step in range(2, until + 1, 2):
        at = {"step": step, "time": time + step}
        values = {"loss": 2.0 - step / until, "accuracy": step / until / 2, "lr": 1e-3, "gradient_norm": 1.0}
        lines.append({**at, "kind": "train", **values, "images_per_second": 50.0, "data_wait_share": 0.0})
        if step % 10 == 0:
            tested = {"loss": 2.1 - step / until, "accuracy": 0.9 * step / until, "top5": 0.95, "samples": 9}
            lines.append({**at, "kind": "test", **tested})
    return lines


def words(html: str) -> str:
    """What a page says, without its style and script."""
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(style|script).*?</\1>|(?<=src=)\"data:[^\"]*\"", "", html)))


def images_of(html: str, section: str) -> int:
    """How many images a section of the page shows."""
    found = re.search(rf'(?s)<section id="{section}">.*?</section>', html)
    return found.group().count("<img") if found else 0


def write_classifier(folder: Path, config: Config, step: int) -> Classifier:
    """As write_checkpoint, of a fine-tuning over two classes, a bias table in every layer."""
    model = dataclasses.replace(config.model, positions="relative", input_size=config.finetune.input_size)
    classifier = Classifier(model, classes=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    _write_weights(folder, classifier, step)
    return classifier
