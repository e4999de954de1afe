"""Files of one JSON object a line, read whole or as they grow, within bounds. Must not know torch, runs or stages."""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from beitforge.pipeline.reading import OddFile, open_regular, parse_json
from beitforge.shards.errors import about_file

LARGEST = 64 << 20  # bytes of a file that are read, its last ones
LONGEST = 1 << 20  # bytes of a line
MOST = 250_000  # lines that are kept, the last ones
_TAIL = 256  # bytes before the place reached that are compared, to notice a file that was written anew
_COUNT = 10**12  # of anything
_LAST_TIME = 253_402_300_799  # the end of the year 9999, in seconds since 1970
_EXTREME = 1e100  # a value beyond is not drawn, below 1 / this it is 0: sums and quotients stay numbers


@dataclass
class Lines:
    """The objects of a file in its order, and what is odd about the file."""

    lines: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_line(text: bytes) -> dict | None:
    """The JSON object of a line, or None: a line that a kill cut short is none."""
    try:
        values = parse_json(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def metric_line(values: dict) -> bool:
    """Whether an object is what metrics.jsonl holds: a step, and a time of this era where it has one."""
    time, step = values.get("time", 0.0), values.get("step")
    return (
        isinstance(step, int)
        and not isinstance(step, bool)
        and 0 <= step <= _COUNT
        and isinstance(time, int | float)
        and 0 <= time <= _LAST_TIME
        and isinstance(values.get("kind", ""), str)
    )


def count(values: dict, name: str, default: int = 0) -> int:
    """A number of steps, samples or processes; the default when it is missing or none."""
    found = values.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= _COUNT else default


def value(values: dict, name: str) -> float:
    """A number of a line; NaN when it is missing or none, infinite when nobody can draw it."""
    found = values.get(name)
    if not isinstance(found, int | float):
        return math.nan
    number = float(found)
    size = abs(number)
    return math.copysign(math.inf, number) if size > _EXTREME else 0.0 if size < 1 / _EXTREME else number


def latest(lines: Iterable[dict], kind: str) -> list[dict]:
    """The lines of one kind in step order. Of a step logged again after a restart, the last counts."""
    by_step = {values["step"]: values for values in lines if values.get("kind") == kind and "step" in values}
    return [by_step[step] for step in sorted(by_step)]


def read_metrics(run: Path, kind: str) -> list[dict]:
    """`latest` of metrics.jsonl; empty when there is none."""
    return latest(read_lines(run / "metrics.jsonl", run, metric_line).lines, kind)


def read_lines(path: Path, within: Path | None = None, fits: Callable[[dict], bool] | None = None) -> Lines:
    """The objects of a file, those that `fits` says no to left out; a file that is odd or not there has none."""
    tail = JsonlTail(path, within, fits)
    try:
        tail.read()
    except OSError as error:
        return Lines(notes=[f"{path}: {error.strerror}"])
    return Lines(tail.lines, tail.notes)


class JsonlTail:
    """The objects of a file that another process appends to, `lines`; `notes`: what is odd about it. Reads only what is
    new; locks nothing.

    A last line without its end waits. A file that shrank, is another one, or is gone is read anew. The file is opened
    at every look: over NFS that is what makes a client ask the server how long it is by now.
    """

    def __init__(self, path: Path, within: Path | None = None, fits: Callable[[dict], bool] | None = None):
        """within: the folder that the file must lie in once links are followed; fits: which objects are kept."""
        self.path, self._within, self._fits = path, within, fits or bool
        self.lines: list[dict] = []
        self.changed_at = 0  # of the file, in nanoseconds; 0 when there is none
        self._inode, self._reached, self._tail = 0, 0, b""
        self._refused, self._passed, self._odd, self._dropped = "", 0, 0, 0

    @property
    def notes(self) -> list[str]:
        """What could not be read of the file, and why."""
        name = self.path.name
        said = [self._refused] if self._refused else []
        said += [f"{name}: the first {self._passed:,} bytes were not read, it is too large"] if self._passed else []
        said += [f"{name}: of its lines the last {MOST:,} are shown"] if self._dropped else []
        said += [f"{name}: {self._odd:,} lines that no run writes were left out"] if self._odd else []
        return said

    def read(self) -> bool:
        """Take up what is new; whether anything is."""
        refused, self._refused = self._refused, ""
        try:
            with open_regular(self.path, self._within) as file:
                status = os.fstat(file.fileno())
                self.changed_at = status.st_mtime_ns
                anew = not self._goes_on(file.fileno(), status)
                if anew:
                    self._begin(status.st_ino)
                if status.st_size == self._reached:
                    return anew
                file.seek(self._reached)
                if status.st_size - self._reached > LARGEST:
                    file.seek(status.st_size - LARGEST)
                    file.readline(LARGEST)  # the rest of a line
                    self._passed += file.tell() - self._reached
                    self._reached = file.tell()
                added = self._take(file.read(max(0, status.st_size - self._reached)))
                return added or anew
        except (FileNotFoundError, NotADirectoryError):
            gone, self.changed_at = self._reached > 0, 0
            self._begin(0)
            return gone
        except OddFile as error:
            self._begin(0)
            self._refused = str(error)
            return self._refused != refused

    def _goes_on(self, descriptor: int, status: os.stat_result) -> bool:
        """Whether the file is the one read before, and still begins as it did."""
        if self._reached == 0:
            self._inode = status.st_ino
            return True
        if status.st_ino != self._inode or status.st_size < self._reached:
            return False
        return os.pread(descriptor, len(self._tail), self._reached - len(self._tail)) == self._tail

    def _begin(self, inode: int) -> None:
        self.lines = []  # a new list: who holds the old one keeps it as it was
        self._inode, self._reached, self._tail = inode, 0, b""
        self._passed, self._odd, self._dropped = 0, 0, 0

    def _take(self, content: bytes) -> bool:
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and len(content) > LONGEST:
            whole = content  # no end in sight: not a line of a run
        texts = whole.splitlines()
        self._dropped += max(0, len(texts) - MOST)
        found = []
        for text in texts[-MOST:]:
            values = parse_line(text) if len(text) <= LONGEST else None
            if values is not None and self._fits(values):
                found.append(values)
            elif values is not None or len(text) > LONGEST:
                self._odd += 1
        self.lines += found
        if len(self.lines) > MOST:
            self._dropped += len(self.lines) - MOST
            self.lines = self.lines[-MOST:]
        self._reached += len(whole)
        self._tail = (self._tail + whole[-_TAIL:])[-_TAIL:]
        return bool(whole)


def end_cut_line(path: Path) -> None:
    """End the line that a kill cut short, so that the next one is whole."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            ended = not size or os.pread(file.fileno(), 1, size - 1) == b"\n"
    except (FileNotFoundError, NotADirectoryError):
        return
    if not ended:
        with about_file(path), open(path, "a", encoding="utf-8") as file:
            file.write("\n")
