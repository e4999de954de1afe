"""What a run folder says, read once: metrics, starts, probe, codebook use, bad samples. For reports; writes nothing.

Whatever cannot be read is a line in `notes`, never an error: a report of half a run is still worth having. Must not
know HTML, the model or any stage.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.config import ONLINE, Config, ConfigError
from pipeline.lines import latest
from shards.errors import ShardError
from shards.remote import cache_for, is_url
from shards.tokens import TokenSet, token_counts

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Session:
    """The time between a start of the run and the last line before the next one. Times are seconds since 1970."""

    started: float
    ended: float
    first_step: int
    last_step: int
    world: int


@dataclass(frozen=True, kw_only=True)
class TokenUse:
    """Statistics of a token set. `majority`: accuracy of always guessing the commonest training token, measured on the
    held-out tokens where `measured_apart`. `entropy`: of the training tokens, in nats, the loss of knowing only how
    often each occurs."""

    used: int
    vocabulary: int
    entropy: float
    majority: float
    measured_apart: bool

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.entropy))


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run folder. `train` and `heldout` are lines of metrics.jsonl in step order; `step` is where the run stands."""

    run: Path
    config: Config
    train: list[dict]
    heldout: list[dict]
    sessions: list[Session]
    step: int
    planned_steps: int
    epoch_samples: int
    environment: dict
    probe: dict
    codebook: dict
    tokens: TokenUse | None
    bad_samples: list[dict]
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return 0 < self.planned_steps <= self.step

    @property
    def samples_seen(self) -> int:
        return self.step * self.config.train.global_batch

    @property
    def seconds(self) -> float:
        """Spent running, over all starts."""
        return sum(session.ended - session.started for session in self.sessions)


def read_record(run: Path, config: Config) -> Record:
    """Everything but the config, which the caller has read and checked."""
    notes: list[str] = []
    tokens = attempt("Token statistics", notes, lambda: token_use(config))
    lines, bad_samples = json_lines(run / "metrics.jsonl"), json_lines(run / "bad_samples.jsonl")
    return record_of(run, config, lines, bad_samples, tokens, notes)


def record_of(
    run: Path, config: Config, lines: list[dict], bad_samples: list[dict], tokens: TokenUse | None, notes: list[str]
) -> Record:
    """A record of what was read already, and of the small files: cheap. lines: of metrics.jsonl, in file order."""
    notes = list(notes)
    starts = [line for line in lines if line.get("kind") == "start"]
    train = latest(lines, "train")
    steps = [line["step"] for line in lines if line.get("kind") == "train"]
    last_start = starts[-1] if starts else {}
    return Record(
        run=run,
        config=config,
        train=train,
        heldout=[line for line in latest(lines, "heldout") if "loss" in line],
        sessions=sessions(lines),
        step=steps[-1] if steps else 0,
        planned_steps=int(last_start.get("steps", 0)),
        epoch_samples=int(last_start.get("epoch_samples", 0)),
        environment=json_object(run / "environment.json", notes),
        probe=json_object(run / "probe.json", notes),
        codebook=json_object(Path(config.data.tokenizer) / "measured.json", notes),
        tokens=tokens,
        bad_samples=bad_samples,
        notes=notes,
    )


def attempt(what: str, notes: list[str], work: Callable[[], Value]) -> Value | None:
    """The result of `work`; or None and a line in `notes`, when files are not there or are not what they should be."""
    try:
        return work()
    except (ConfigError, ShardError, OSError) as error:
        notes.append(f"{what}: {' '.join(str(error).split())}")
        return None


def json_object(path: Path, notes: list[str]) -> dict:
    """A JSON object; empty when there is none, with a note when it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path} is damaged and was left out")
        return {}
    return content


def json_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, one a line, in file order; lines that a kill cut short are passed over."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict):
            found.append(values)
    return found


def sessions(lines: list[dict]) -> list[Session]:
    """From the lines of metrics.jsonl in file order. A start that found the run finished is none."""
    found: list[Session] = []
    for line in lines:
        step, time = int(line.get("step", 0)), float(line.get("time", 0.0))
        if line.get("kind") == "start" or not found:
            if line.get("kind") == "start" and 0 < line.get("steps", 0) <= step and found:
                continue
            found.append(
                Session(started=time, ended=time, first_step=step, last_step=step, world=int(line.get("world", 1)))
            )
        else:
            last = found[-1]
            found[-1] = Session(
                started=last.started, ended=time, first_step=last.first_step, last_step=step, world=last.world
            )
    return found


def token_use(config: Config) -> TokenUse:
    """Of the run's token sets, over all their views. Raises ShardError when the training set is not there."""
    if config.data.tokens == ONLINE:
        raise ConfigError("tokens are made online, on a fresh view every time; none are kept to count")
    apart = config.data.heldout_tokens
    kept = apart not in ("", ONLINE) and (is_url(apart) or Path(apart).exists())
    train, heldout = (
        token_counts(TokenSet(where, cache_for(where, config.data.cache, config.data.cache_gb))) if where else None
        for where in (config.data.tokens, apart if kept else "")
    )
    assert train is not None, "data.tokens is never empty"
    judged = train if heldout is None else heldout
    share = train[train > 0] / train.sum()
    return TokenUse(
        used=int((train > 0).sum()),
        vocabulary=len(train),
        entropy=float(-(share * np.log(share)).sum()),
        majority=float(judged[int(np.argmax(train))] / judged.sum()),
        measured_apart=heldout is not None,
    )
