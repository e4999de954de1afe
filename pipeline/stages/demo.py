"""`demo [DIR]`: the whole job on this machine, by the same commands a user would type. Each is printed before it runs.

Every step ends in files that say it is finished, so the same command goes on wherever it was interrupted.
"""

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import beitforge
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import program_name, say
from beitforge.pipeline.data.demo_images import write_tiles
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.checkpoints import newest
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.runs.record import token_use
from beitforge.shards.format.manifest import NAME as MANIFEST
from beitforge.shards.format.manifest import read_image_manifest
from beitforge.shards.storage.files import write_text

_CONFIG = Path(beitforge.__file__).absolute().parent / "configs" / "demo.yaml"
_TRAIN_TILES, _TEST_TILES = 150, 30  # of each photograph
_TEST_SHARE = 0.1  # of the user's own images


@dataclass(frozen=True)
class Step:
    """One command of the demo, and how to tell that it is finished."""

    label: str
    finished: Callable[[], bool]
    command: list[str]


def run(source: Path | None, out: Path, overrides: list[str]) -> int:
    """Run what is not finished yet; print where things are and the numbers that matter. Returns the exit code.

    overrides: section.key=value settings over configs/demo.yaml.
    """
    if source is not None and not source.is_dir():
        raise ConfigError(f"{source} is not a folder; give one with images in it, or none for the sample photographs")
    out = out.resolve()
    _same_source(out, source)
    started = time.monotonic()
    steps = _pack_steps(source, out)
    for step in steps:
        _do(step)
    for step in _learn_steps(out, overrides):
        _do(step)
    _summary(load_config(str(_CONFIG), _settings(out, overrides)), out, time.monotonic() - started)
    return 0


def _same_source(out: Path, source: Path | None) -> None:
    """One folder belongs to one set of images."""
    note, name = out / "pictures.txt", str(source.resolve()) if source else "sample photographs"
    if note.exists() and note.read_text(encoding="utf-8").strip() != name:
        raise ConfigError(f"{out} holds a demo of {note.read_text().strip()}; give another --out, or remove it")
    if not note.exists() and out.is_dir() and (others := sorted(path.name for path in out.iterdir())):
        raise ConfigError(f"{out} holds {others[0]} and no demo: give a new or an empty folder as --out")
    write_text(note, name + "\n")


def _pack_steps(source: Path | None, out: Path) -> list[Step]:
    shards = out / "shards"
    if source is not None:
        command = ["pack", str(source), str(shards), "--split", f"test={_TEST_SHARE}", "--workers", "2"]
        command += ["--samples-per-shard", "500"]
        return [Step("pack", lambda: all(map(_closed, (shards / "train", shards / "test"))), command)]
    tiles = out / "pictures"
    if not (tiles / "done").exists():
        say("== cutting tiles of the sample photographs")
        photos = write_tiles(tiles, _TRAIN_TILES, _TEST_TILES, seed=0)
        write_text(tiles / "done", f"{photos} photographs\n")
    return [
        Step(
            f"pack {part}",
            lambda part=part: (shards / part / MANIFEST).exists(),  # type: ignore[misc]
            ["pack", str(tiles / part), str(shards / part), "--samples-per-shard", "500", "--workers", "2"],
        )
        for part in ("train", "test")
    ]


def _closed(shards: Path) -> bool:
    """Whether a part is packed: closed by its manifest, or never begun because no image fell to it."""
    return (shards / MANIFEST).exists() or (shards.name == "test" and shards.parent.exists() and not shards.exists())


def _tested(out: Path) -> bool:
    """Whether there are held-out images; a handful of the user's own may leave none."""
    shards = out / "shards" / "test"
    return (shards / MANIFEST).exists() and read_image_manifest(shards).samples >= 2


def _probed(out: Path) -> bool:
    """Whether encoders can be judged by labels: held-out images in at least two classes."""
    return _tested(out) and len(read_image_manifest(out / "shards" / "train").classes) > 1


def _settings(out: Path, overrides: list[str]) -> list[str]:
    """Where everything lies, as settings over configs/demo.yaml."""
    paths = {"images": "shards/train", "tokens": "tokens/train", "tokenizer": "tokenizer"}
    if _tested(out):
        paths |= {"heldout_images": "shards/test", "heldout_tokens": "tokens/test"}
    if _probed(out):
        paths |= {"labelled_images": "shards/train", "labelled_test": "shards/test"}
    return [*(f"data.{name}={out / path}" for name, path in paths.items()), f"train.run={out / 'pretrain'}", *overrides]


def _learn_steps(out: Path, overrides: list[str]) -> list[Step]:
    """What follows the shards."""
    shards, run_folder, tested = out / "shards", out / "pretrain", _tested(out)
    settings = [str(_CONFIG), *_settings(out, overrides)]
    last_tokens = out / "tokens" / ("test" if tested else "train")
    steps = [
        Step("tokenizer", lambda: (out / "tokenizer" / "tokenizer.json").exists(), ["tokenizer", *settings]),
        Step("tokenize", lambda: (last_tokens / MANIFEST).exists(), ["tokenize", *settings]),
        Step("pretrain", lambda: _trained(settings, run_folder), ["pretrain", *settings]),
        Step(
            "export",
            lambda: (out / "encoder" / "config.json").exists(),
            ["export", str(run_folder), str(out / "encoder")],
        ),
    ]
    if _probed(out):
        probe = ["probe", str(run_folder), str(shards / "train"), str(shards / "test")]
        steps.append(Step("probe", lambda: (run_folder / "probe.json").exists(), probe))
    steps.append(Step("report", lambda: (run_folder / "report.html").exists(), ["report", str(run_folder), "--data"]))
    return steps


def _trained(settings: list[str], run_folder: Path) -> bool:
    """Whether the newest checkpoint is the last one."""
    found = newest(run_folder, lambda _: None)
    if found is None:
        return False
    config = load_config(settings[0], settings[1:])
    samples = read_image_manifest(config.data.images).samples
    return found[1].step >= config.train.duration.steps(config.train.epoch_samples(samples), config.train.global_batch)


def _do(step: Step) -> None:
    """Run a step unless it is finished. It ends with this process, whatever ends this process."""
    if step.finished():
        say(f"== {step.label}: finished before")
        return
    say(f"== {program_name()} {' '.join(step.command)}")
    command = [sys.executable, "-W", "ignore", "-m", "beitforge", *step.command]
    process = subprocess.Popen(command, preexec_fn=_die_with_parent)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal told it too; it saves and ends
        raise
    if code or not step.finished():
        raise ConfigError(f"the demo stopped in `{step.label}` (exit code {code}); the same command resumes there")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _summary(config: Config, out: Path, seconds: float) -> None:
    """Where things are, and the numbers that matter."""
    run_folder = out / "pretrain"
    codes = json.loads((out / "tokenizer" / "measured.json").read_text())
    losses, apart = read_metrics(run_folder, "train"), read_metrics(run_folder, "heldout")
    rows = [("codebook use", f"{codes['used']} of {codes['vocabulary']} codes, perplexity {codes['perplexity']:.0f}")]
    rows.append(("loss", f"{losses[0]['loss']:.3f} (step {losses[0]['step']}) → {losses[-1]['loss']:.3f}"))
    if apart:
        rows.append(("held-out loss", f"{apart[0]['loss']:.3f} → {apart[-1]['loss']:.3f}"))
    accuracy = (apart or losses)[-1]["masked_accuracy"]
    rows.append(("masked accuracy", f"{accuracy:.1%}, against {token_use(config).majority:.1%} for the majority token"))
    seen, new, survey = (read_metrics(run_folder, kind)[-1] for kind in ("seen_view", "new_view", "survey"))
    rows.append(
        ("of seen images", f"loss {seen['loss']:.3f} on trained views, {new['loss']:.3f} on never-trained ones")
    )
    rows.append(("evaluations", f"{survey['share']:.1%} of the pretraining's time"))
    if (run_folder / "probe.json").exists():
        probe = json.loads((run_folder / "probe.json").read_text())
        for name in ("linear", "knn"):
            values = ", ".join(f"{who} {result[name]:.1%}" for who, result in probe["results"].items())
            rows.append(({"linear": "linear probe", "knn": "k-NN"}[name], values))
    say("")
    for name, text in rows:
        say(f"{name:16} {text}")
    say("")
    for name, path in (("shards", out / "shards"), ("tokenizer", out / "tokenizer"), ("tokens", out / "tokens")):
        say(f"{name:16} {path}")
    say(f"{'run folder':16} {run_folder}")
    say(f"{'encoder':16} {out / 'encoder'}")
    say(f"{'report':16} {run_folder / 'report.html'}")
    say(f"this call took {seconds / 60:.1f} minutes")
