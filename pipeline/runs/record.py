"""What a run folder says, read once: metrics, starts, probe, codebook use, bad samples. For reports; writes nothing.

Whatever cannot be read is a line in `notes`, never an error: a report of half a run is still worth having. Must not
know HTML, the model or any stage.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from beitforge.pipeline.config.loading import from_dict, load_config
from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reading import read_object
from beitforge.pipeline.runs.jsonl import count, metric_line, read_lines, value
from beitforge.shards.errors import ShardError
from beitforge.shards.format.tokens import TokenSet, token_counts
from beitforge.shards.storage.remote import cache_for, is_url

CLASSIFIER = "beit-classifier"  # kind of a folder of weights, in its config.json
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
    finetune or tokenizer; `data`: whether the sets and the tokenizer that the config names may be read."""

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
    data: bool = False
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


def read_config(run: Path) -> Config:
    """The resolved config of a run folder, or of exported or imported weights; no link out of it is followed.
    Raises ConfigError where there is neither."""
    if (run / "config.yaml").exists():
        return load_config(str(run / "config.yaml"), [], run)
    notes: list[str] = []
    content = json_object(run / "config.json", notes, run)
    if isinstance(content.get("config"), dict):
        return from_dict(content["config"], str(run / "config.json"))
    raise ConfigError(
        notes[0]
        if notes
        else f"{run} is neither a run folder (no config.yaml) nor an encoder or a classifier (config.json): give the "
        f"folder of a run, or what `export` or `import` wrote"
    )


def read_record(run: Path, config: Config, data: bool = False) -> RunRecord:
    """Everything but the config, which the caller has read and checked. data: whether the sets and the tokenizer that
    it names are read as well; nothing else leads out of the run folder."""
    lines = read_lines(run / "metrics.jsonl", run, metric_line)
    bad_samples = read_lines(run / "bad_samples.jsonl", run)
    record = record_of(run, config, lines.lines, bad_samples.lines, (lambda: token_use(config)) if data else None, data)
    record.notes[:0] = [*lines.notes, *bad_samples.notes]
    return record


def record_of(
    run: Path,
    config: Config,
    lines: list[dict],
    bad_samples: list[dict],
    token_statistics: Callable[[], TokenUse] | None,
    data: bool = False,
) -> RunRecord:
    """A record of lines that were read already (of metrics.jsonl, in file order), and of the small files.

    token_statistics: gives those of the token sets, which takes long for a large one; None leaves them out. data:
    whether what the config names may be read.
    """
    notes: list[str] = []
    kinds = by_kind(lines)
    environment = json_object(run / "environment.json", notes, run)
    job = "finetune" if _is_classifier(run) else job_of(environment, kinds)
    starts = [line for line in lines if line.get("kind") == "start"]
    steps = [line["step"] for line in lines if line.get("kind") == "train"]
    last_start = starts[-1] if starts else {}
    tokens, codebook = None, dict[str, object]()
    if job == "pretrain" and token_statistics is not None:
        tokens = attempt("Token statistics", notes, token_statistics)
    if job != "finetune" and data:
        codebook = json_object(Path(config.data.tokenizer) / "measured.json", notes)
    return RunRecord(
        run=run,
        config=config,
        job=job,
        kinds=kinds,
        sessions=sessions(lines),
        step=steps[-1] if steps else 0,
        planned_steps=count(last_start, "steps"),
        epoch_samples=count(last_start, "epoch_samples"),
        environment=environment,
        probe=json_object(run / "probe.json", notes, run),
        codebook=codebook,
        tokens=tokens,
        bad_samples=bad_samples,
        data=data,
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


def _is_classifier(folder: Path) -> bool:
    """Whether a folder holds an exported or imported classifier, and is no run's."""
    alone = not (folder / "config.yaml").exists()
    return alone and json_object(folder / "config.json", [], folder).get("kind") == CLASSIFIER


def attempt(what: str, notes: list[str], work: Callable[[], Value]) -> Value | None:
    """The result of `work`; or None and a line in `notes`, when files are not there or are not what they should be."""
    try:
        return work()
    except (ConfigError, ShardError, OSError) as error:
        notes.append(f"{what}: {' '.join(str(error).split())}")
        return None


def json_object(path: Path, notes: list[str], within: Path | None = None) -> dict:
    """A JSON object; empty when there is none, with a note when it is damaged, no regular file, or leads elsewhere."""
    try:
        return read_object(path, within)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ConfigError as error:
        notes.append(str(error))
    except (OSError, ValueError):
        notes.append(f"{path} is damaged and was left out")
    return {}


def sessions(lines: list[dict]) -> list[Session]:
    """From the lines of metrics.jsonl in file order. A start that found the run finished is none."""
    found: list[Session] = []
    begun: list[dict] = []

    def close() -> None:
        if begun:
            first, last = begun[0], begun[-1]
            started, ended = (float(line.get("time", 0.0)) for line in (first, last))
            steps = [count(line, "step") for line in (first, last)]
            world = count(first, "world", 1)
            found.append(Session(started=started, ended=ended, first_step=steps[0], last_step=steps[1], world=world))

    for line in lines:
        starts = line.get("kind") == "start"
        if starts and (begun or found) and 0 < count(line, "steps") <= count(line, "step"):
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
