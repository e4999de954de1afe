"""Whether a run folder is as it was written: every byte of its checkpoints, every line of its logs. Repairs nothing.

Must not know torch, engine, model, shards or any stage.
"""

from collections.abc import Callable
from pathlib import Path

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reading import open_regular
from beitforge.pipeline.runs.checkpoints import (
    NO_DIGESTS,
    STATE,
    NotFinished,
    NotWhole,
    candidates,
    checked,
    read_state,
)
from beitforge.pipeline.runs.jsonl import parse_line
from beitforge.shards.progress import Progress
from beitforge.shards.wording import counted

_LOGS = ("metrics.jsonl", "bad_samples.jsonl", "skipped.jsonl")
_LONGEST_LINE = 1 << 20  # bytes

Report = Callable[[str], None]


def is_run(folder: Path) -> bool:
    """Whether this is a run folder, or the folder of one checkpoint, and no shard set."""
    return _is_checkpoint(folder) or (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists()


def _is_checkpoint(folder: Path) -> bool:
    return folder in candidates(folder.parent.parent) or folder.resolve() in candidates(folder.resolve().parent.parent)


def verify_run(folder: Path, say: Report, report: Report) -> str:
    """Check a run folder, or a checkpoint's, telling `report` every finding, one line each, and `say` what is none.

    Returns what was looked at, in words.
    """
    alone = _is_checkpoint(folder)
    folders = [folder.resolve()] if alone else candidates(folder)
    complete = numbers = 0
    for one in folders:
        try:
            state = read_state(one)
        except NotFinished as problem:
            (report if alone else say)(f"{one}: {problem}: a restart takes the one before")
            continue
        except NotWhole as problem:
            report(f"{one}: {problem}")
            continue
        complete, numbers = complete + 1, numbers + len(state.files)
        if not state.has_digests:
            say(NO_DIGESTS.format(one))
        with Progress(f"verify {one.name}", sum(saved.bytes >> 20 for saved in state.files.values()), "MB") as progress:
            for name, damage in checked(one, state, state.files, whole=True):
                progress.advance(state.files[name].bytes >> 20)
                if damage:
                    report(f"{one}: {damage}")
        known = {one / name for name in (*state.files, STATE)}
        for path in sorted(one.rglob("*")):
            if path not in known and (path.is_symlink() or not path.is_dir()):
                report(f"{one}: {path.relative_to(one)} is not of this checkpoint: its {STATE} does not list it")
    if folders and not complete and not alone:
        report(f"{folder} has no complete checkpoint")
    logs = 0 if alone else sum(_check_log(folder, name, report) for name in _LOGS)
    return f"{counted(numbers, 'file')} of {counted(complete, 'checkpoint')}, {counted(logs, 'line')} of logs"


def _check_log(folder: Path, name: str, report: Report) -> int:
    """Lines of a log; one that a kill cut short is no finding if it is the last."""
    number = 0
    try:
        with open_regular(folder / name, within=folder) as file:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if line.endswith(b"\n") and line.strip() and parse_line(line) is None:
                    report(f"{folder / name}: line {number} is no JSON object")
                elif len(line) == _LONGEST_LINE:
                    raise ConfigError(f"{folder / name}: line {number} is longer than {_LONGEST_LINE >> 20} MiB")
    except FileNotFoundError:
        return 0
    except ConfigError as error:
        report(str(error))
    except OSError as error:
        report(f"{folder / name} cannot be read ({error.strerror})")
    return number
