"""What `doctor` finds: lines with a cure, a table by node, one verdict. Must not know torch, shards or any stage."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from beitforge.pipeline.console import align_columns

OK, WARNING, STOP = "ok", "warning", "stop"
LEVELS = (OK, WARNING, STOP)
VERDICTS = ("go", "go with warnings", "stop")
MARK = "doctor-line "  # before a finding on the way from the first rank to the launcher
END = "end"
LINES = "BEITFORGE_DOCTOR_LINES"  # set by the launcher: the first rank sends lines, and the launcher makes the table
_SHOWN = 3  # measurements of a kind in the text
HOSTS = "BEITFORGE_DOCTOR_HOSTS"  # HOST=RANKS,… in the order of ranks: who should be there
# Columns of the table and the checks they stand for.
COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("host", ("ssh", "rank", "time", "host name", "versions", "clock", "port", "signals", "limits")),
    ("shm", ("shm",)),
    ("data", ("images", "tokens", "held-out", "digests", "equal")),
    ("disk", ("disk", "cache", "run folder")),
    ("read", ("storage",)),
    ("device", ("device", "kernels")),
    ("memory", ("memory",)),
    ("step", ("step",)),
    ("loader", ("loader",)),
    ("network", ("network",)),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. `rank`: -1 for the whole host. `value`: a word for the table, such as `412 images/s`."""

    level: str
    check: str
    host: str
    what: str
    cure: str = ""
    rank: int = -1
    value: str = ""

    @property
    def where(self) -> str:
        return self.host if self.rank < 0 else f"{self.host} rank {self.rank}"


@dataclass(frozen=True)
class Local:
    """Makes the findings of one process."""

    host: str
    rank: int = -1
    found: list[Finding] = field(default_factory=list)

    def add(self, level: str, check: str, what: str, cure: str = "", value: str = "", whole_host: bool = False) -> None:
        rank = -1 if whole_host else self.rank
        self.found.append(
            Finding(level=level, check=check, host=self.host, what=what, cure=cure, rank=rank, value=value)
        )


def worst(found: Iterable[Finding]) -> int:
    """0, 1 or 2: an exit code, and a place in LEVELS and VERDICTS."""
    return max((LEVELS.index(finding.level) for finding in found), default=0)


def to_line(finding: Finding) -> str:
    return MARK + json.dumps(asdict(finding))


def from_line(line: str) -> Finding | str | None:
    """The finding in a line that may have the host's name before it, END, or None for a line of something else."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    if text.strip() == END:
        return END
    try:
        return Finding(**json.loads(text))
    except (json.JSONDecodeError, TypeError):
        return None


@dataclass
class Report:
    """What the launcher of `doctor` knows: its own findings, then those that the first rank sends."""

    json: bool
    found: list[Finding] = field(default_factory=list)
    ended: bool = False

    def receive_line(self, line: str) -> bool:
        """Take a line that some rank printed; whether it was the last."""
        heard = from_line(line)
        if isinstance(heard, Finding):
            self.found.append(heard)
        elif heard == END:
            self.ended = True
        else:
            print(line, file=sys.stderr, flush=True)
        return self.ended

    def close(self, first: str) -> None:
        """All processes are gone; `first`: the host of the first rank."""
        if not self.ended:
            what = "the first rank ended, or was ended after its time, without a report"
            cure = "its output above says why; when there is none it hung: log in and see where"
            self.found.append(Finding(level=STOP, check="rank", host=first, rank=0, what=what, cure=cure))

    def text(self, seconds: float) -> str:
        return to_json(self.found, seconds) if self.json else to_text(self.found, seconds)


def to_json(found: list[Finding], seconds: float) -> str:
    """The whole report for programs."""
    code = worst(found)
    content = {"verdict": VERDICTS[code], "exit_code": code, "seconds": round(seconds, 1)}
    return json.dumps({**content, "findings": [asdict(finding) for finding in found]}, indent=1)


def to_text(found: list[Finding], seconds: float) -> str:
    """The table by node, every problem with its fix, the measurements, and the verdict."""
    code = worst(found)
    lines = [*_table(found), ""]
    for level in (STOP, WARNING):
        for finding in _merged([f for f in found if f.level == level]):
            lines += [f"{level.upper():8}{finding.check}, {finding.host}: {finding.what}"]
            lines += [f"        → {finding.cure}"] if finding.cure else []
    if code:
        lines += [""]
    measured = _merged([f for f in found if f.level == OK and f.value])
    for check in dict.fromkeys(finding.check for finding in measured):
        alike = [finding for finding in measured if finding.check == check]
        lines += [f"ok      {check}, {finding.host}: {finding.what}" for finding in alike[:_SHOWN]]
        lines += [f"ok      {check}: {len(alike) - _SHOWN} more (--json has them all)"] if len(alike) > _SHOWN else []
    return "\n".join([*lines, "", f"{VERDICTS[code].upper()} (looked for {seconds:.0f} s)"])


def _table(found: list[Finding]) -> list[str]:
    hosts = list(dict.fromkeys(finding.host for finding in found))
    rows = [["node", *(title for title, _ in COLUMNS)]]
    for host in hosts:
        here = [finding for finding in found if finding.host == host]
        rows.append([host, *(_cell([f for f in here if f.check in checks]) for _, checks in COLUMNS)])
    return align_columns(rows)


def _cell(found: list[Finding]) -> str:
    if not found:
        return "-"
    level, value = LEVELS[worst(found)], next((finding.value for finding in found if finding.value), "")
    return (value or OK) if level == OK else level.upper()


def _merged(found: list[Finding]) -> list[Finding]:
    """One for all ranks and hosts that say the same, `host` naming them all."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.check, finding.what, finding.cure), []).append(finding)
    return [
        Finding(level=group[0].level, check=check, what=what, cure=cure, host=_places(group))
        for (check, what, cure), group in groups.items()
    ]


def _places(group: list[Finding]) -> str:
    places = list(dict.fromkeys(finding.where for finding in group))
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
