"""The section of a report that says what ran: settings, machine, data, checkpoints, bad samples.

Must not know torch or any stage.
"""

import json
from collections.abc import Callable
from pathlib import Path

from beitforge.pipeline.config.loading import to_yaml
from beitforge.pipeline.config.settings import ONLINE
from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.components import Section
from beitforge.pipeline.runs.checkpoints import NotWhole, State, candidates, read_state
from beitforge.pipeline.runs.formatting import process_count, utc_time
from beitforge.pipeline.runs.record import RunRecord, attempt, json_object
from beitforge.shards.format.manifest import ImageManifest, TokenManifest, read_image_manifest, read_token_manifest

_BAD_SHOWN = 20
_DIGITS = 16  # of a fingerprint; the whole one is in the manifest


def what_ran(record: RunRecord, state: State | None, passed_over: list[str]) -> Section:
    """Details to unfold. `state`: of the newest complete checkpoint; `passed_over`: why newer ones are not used."""
    bad, checkpoints = record.bad_samples, _checkpoints(record.run)
    parts = [
        ("Configuration", "resolved", components.code(to_yaml(record.config))),
        ("Data", _data_about(record), _data(record, state)),
        ("Environment", _machine(record.environment), components.table([], _environment(record.environment))),
        ("Starts", str(len(record.sessions)), _starts(record)),
        (
            "Checkpoints",
            str(len(checkpoints)),
            components.notes(passed_over) + components.table(_CHECKPOINT_HEAD, checkpoints),
        ),
        ("Bad samples", _bad_in_words(bad), _bad_samples(bad) if bad else ""),
    ]
    shown = [part for part in parts if part[2]]
    return components.section("what-ran", "What ran", "", components.folds(shown))


def _data_about(record: RunRecord) -> str:
    return f"{record.epoch_samples:,} images an epoch" if record.epoch_samples else ""


def _data(record: RunRecord, state: State | None) -> str:
    """Each shard set as it is now, and whether it is the one the checkpoint was trained on."""
    data, missing = record.config.data, list[str]()
    images: Callable[[str], ImageManifest | TokenManifest] = read_image_manifest
    sets = [("training images", data.images, images, state.images if state else "")]
    if record.job == "finetune":
        sets = [("labelled images", data.labelled_images, images, state.images if state else "")]
        sets.append(("labelled test images", data.labelled_test, images, ""))
    elif record.job == "pretrain":
        sets.append(("training tokens", data.tokens, read_token_manifest, state.tokens if state else ""))
        sets.append(("held-out images", data.heldout_images, images, ""))
        sets.append(("held-out tokens", data.heldout_tokens, read_token_manifest, ""))
    sets = [each for each in sets if each[1]]
    rows = []
    for name, folder, read, trained_on in sets:
        if not record.data:
            rows.append([name, folder, "not read", "", trained_on[:_DIGITS]])
            continue
        if folder == ONLINE:
            rows.append([name, "made online, inside every step", "", "", ""])
            continue
        manifest = attempt(name.capitalize(), missing, lambda read=read, folder=folder: read(folder))  # type: ignore[misc]
        if manifest is None:
            rows.append([name, folder, "", "", trained_on[:_DIGITS]])
            continue
        changed = " (changed since training)" if trained_on not in ("", manifest.fingerprint) else ""
        views = f" × {manifest.num_views} views" if isinstance(manifest, TokenManifest) else ""
        counts = [f"{manifest.samples:,}{views}", f"{len(manifest.shards):,}"]
        rows.append([name, folder, *counts, manifest.fingerprint[:_DIGITS] + changed])
    if record.job == "finetune":
        return components.table(["", "folder", "samples", "shards", "fingerprint"], rows) + components.notes(missing)
    tokenizer = json_object(Path(data.tokenizer) / "tokenizer.json", missing) if record.data else {}
    stated = str(tokenizer.get("fingerprint", "not there" if record.data else ""))[:_DIGITS]
    rows.append(["tokenizer", data.tokenizer, "" if record.data else "not read", "", stated])
    return components.table(["", "folder", "samples", "shards", "fingerprint"], rows) + components.notes(missing)


def _machine(environment: dict) -> str:
    said = [
        environment.get("host"),
        environment.get("device"),
        process_count(environment["world"]) if "world" in environment else None,
    ]
    return ", ".join(str(word) for word in said if word)


def _environment(environment: dict) -> list[list[str]]:
    """environment.json as rows; lists as words, an object as one row an entry."""
    rows = []
    for name, content in environment.items():
        if isinstance(content, dict):
            rows += [[str(inner), str(word)] for inner, word in content.items()]
        else:
            rows.append([str(name), " ".join(map(str, content)) if isinstance(content, list) else str(content)])
    return rows


def _starts(record: RunRecord) -> str:
    """Each start, how far it came, and how many of its steps the next one had to do again."""
    following = [session.first_step for session in record.sessions[1:]]
    rows = []
    for i, session in enumerate(record.sessions):
        again = max(0, session.last_step - following[i]) if i < len(following) else 0
        steps = f"{session.first_step:,} → {session.last_step:,}"
        rows.append([utc_time(session.started), utc_time(session.ended), steps, f"{again:,}", str(session.world)])
    return components.table(["started", "last line", "steps", "done again", "processes"], rows) if rows else ""


_CHECKPOINT_HEAD = ["folder", "step", "samples seen", "size", "saved as"]


def _checkpoints(run: Path) -> list[list[str]]:
    """A row for each folder in checkpoints/, newest first."""
    rows = []
    for folder in candidates(run):
        try:
            state = read_state(folder)
        except NotWhole as problem:
            rows.append([folder.name, "", "", "", f"not used: {problem}"])
            continue
        saved = f"{state.precision}, ZeRO {state.zero_stage}, {process_count(state.world)}"
        size = f"{sum(file.bytes for file in state.files.values()) / 2**20:,.1f} MiB"
        rows.append([folder.name, f"{state.step:,}", f"{state.samples_seen:,}", size, saved])
    return rows


def _bad_in_words(bad: list[dict]) -> str:
    known = sum(line.get("known") is True for line in bad)
    return f"{len(bad):,} replaced" + (f", {known:,} known from the sets" if known else "") if bad else "none"


def _bad_samples(bad: list[dict]) -> str:
    names = ["sample", "shard", "key", "reason", "substitute"]
    rows = [[_cell(line.get(name, "")) for name in names] for line in bad[:_BAD_SHOWN]]
    more = [f"and {len(bad) - _BAD_SHOWN:,} more, in bad_samples.jsonl"] if len(bad) > _BAD_SHOWN else []
    return components.table(names, rows) + components.notes(more)


def _cell(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content)
