"""What a run folder says, read once: metrics, starts, probe, codebook use, bad samples. For reports; writes nothing.

Whatever cannot be read is a line in `notes`, never an error: a report of half a run is still worth having. Must not
know HTML, the model or any stage.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.pipeline.errors import ConfigError
from beitforge.shards.errors import ShardError
from beitforge.shards.format.tokens import TokenSet, token_counts
from beitforge.shards.storage.remote import cache_for, is_url

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
class RunRecord:
    """A run folder. `kinds`: the lines of metrics.jsonl by their kind (pipeline.training.metrics), in step order; of a
    step that was logged again after a restart, the last. `step` is where the run stands, `job` what it does: pretrain,
    finetune or tokenizer."""

    run: Path
    config: Config
    job: str
    kinds: dict[str, list[dict]]
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
    def train(self) -> list[dict]:
        return self.kinds.get("train", [])

    @property
    def heldout(self) -> list[dict]:
        return self.kinds.get("heldout", [])

    @property
    def finished(self) -> bool:
        return 0 < self.planned_steps <= self.step

    @property
    def global_batch(self) -> int:
        config = self.config
        if self.job == "finetune":
            return config.finetune.global_batch
        return (config.tokenizer if self.job == "tokenizer" else config.train).global_batch

    @property
    def samples_seen(self) -> int:
        return self.step * self.global_batch

    @property
    def seconds(self) -> float:
        """Spent running, over all starts."""
        return sum(session.ended - session.started for session in self.sessions)


def read_record(run: Path, config: Config) -> RunRecord:
    """Everything but the config, which the caller has read and checked."""
    lines, bad_samples = json_lines(run / "metrics.jsonl"), json_lines(run / "bad_samples.jsonl")
    return record_of(run, config, lines, bad_samples, lambda: token_use(config))


def record_of(
    run: Path, config: Config, lines: list[dict], bad_samples: list[dict], count: Callable[[], TokenUse] | None
) -> RunRecord:
    """A record of lines that were read already (of metrics.jsonl, in file order), and of the small files.

    count: gives the token statistics, which takes long for a large set; None leaves them out.
    """
    notes: list[str] = []
    lines = [line for line in lines if isinstance(line.get("step"), int)]
    lines = [line for line in lines if isinstance(line.get("time", 0.0), int | float)]
    kinds = by_kind(lines)
    environment = json_object(run / "environment.json", notes)
    job = job_of(environment, kinds)
    starts = [line for line in lines if line.get("kind") == "start"]
    steps = [line["step"] for line in lines if line.get("kind") == "train"]
    last_start = starts[-1] if starts else {}
    tokens, codebook = None, dict[str, object]()
    if job == "pretrain" and count is not None:
        tokens = attempt("Token statistics", notes, count)
    if job != "finetune":
        codebook = json_object(Path(config.data.tokenizer) / "measured.json", notes)
    return RunRecord(
        run=run,
        config=config,
        job=job,
        kinds=kinds,
        sessions=sessions(lines),
        step=steps[-1] if steps else 0,
        planned_steps=int(last_start.get("steps", 0)),
        epoch_samples=int(last_start.get("epoch_samples", 0)),
        environment=environment,
        probe=json_object(run / "probe.json", notes),
        codebook=codebook,
        tokens=tokens,
        bad_samples=bad_samples,
        notes=notes,
    )


def by_kind(lines: list[dict]) -> dict[str, list[dict]]:
    """Lines of metrics.jsonl in file order → in step order by kind. Of a step logged twice, the last counts."""
    found: dict[str, dict[int, dict]] = {}
    for line in lines:
        found.setdefault(str(line.get("kind", "")), {})[line["step"]] = line
    kinds = {kind: [steps[step] for step in sorted(steps)] for kind, steps in found.items()}
    for kind in ("heldout", "new_view", "seen_view", "test"):
        kinds[kind] = [line for line in kinds.get(kind, []) if "loss" in line]
    return kinds


def job_of(environment: dict, kinds: dict[str, list[dict]]) -> str:
    """What environment.json says, or for a run of before it did, what the lines look like."""
    said = str(environment.get("job", ""))
    if said in ("pretrain", "finetune", "tokenizer"):
        return said
    if any("reconstruction_mse" in line for line in kinds.get("train", [])[:1]):
        return "tokenizer"
    return "finetune" if kinds.get("test") else "pretrain"


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
    begun: list[dict] = []

    def close() -> None:
        if begun:
            first, last = begun[0], begun[-1]
            started, ended = (float(line.get("time", 0.0)) for line in (first, last))
            steps = [int(line.get("step", 0)) for line in (first, last)]
            world = int(first.get("world", 1))
            found.append(Session(started=started, ended=ended, first_step=steps[0], last_step=steps[1], world=world))

    for line in lines:
        starts = line.get("kind") == "start"
        if starts and (begun or found) and 0 < line.get("steps", 0) <= line.get("step", 0):
            continue
        if starts:
            close()
            begun = []
        begun.append(line)
    close()
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


def points(lines: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have the value."""
    return [(float(line["step"]), value(line, name)) for line in lines if name in line]


def value(line: dict, name: str) -> float:
    """A number of a line; NaN when it is missing or none."""
    found = line.get(name)
    return float(found) if isinstance(found, int | float) else math.nan
