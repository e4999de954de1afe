"""Files of one JSON object a line, read whole or as they grow. Must not know torch, runs or any stage."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

_TAIL = 256  # bytes before the place reached that are compared, to notice a file that was written anew


def parse_line(text: bytes) -> dict | None:
    """The JSON object of a line, or None: a line that a kill cut short is none."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def latest(lines: Iterable[dict], kind: str) -> list[dict]:
    """The lines of one kind in step order. Of a step logged again after a restart, the last counts."""
    by_step = {values["step"]: values for values in lines if values.get("kind") == kind and "step" in values}
    return [by_step[step] for step in sorted(by_step)]


def read_metrics(run: Path, kind: str) -> list[dict]:
    """`latest` of metrics.jsonl; empty when there is none."""
    path = run / "metrics.jsonl"
    texts = path.read_bytes().splitlines() if path.exists() else []
    return latest([values for values in map(parse_line, texts) if values is not None], kind)


class JsonlTail:
    """The objects of a file that another process appends to, `lines`. Reads only what is new; locks nothing.

    A last line without its end waits. A file that shrank, is another one, or is gone is read anew. The file is opened
    at every look: over NFS that is what makes a client ask the server how long it is by now.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict] = []
        self.changed_at = 0  # of the file, in nanoseconds; 0 when there is none
        self._inode, self._reached, self._tail = 0, 0, b""

    def read(self) -> bool:
        """Take up what is new; whether anything is."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                self.changed_at = status.st_mtime_ns
                anew = not self._goes_on(file.fileno(), status)
                if anew:
                    self._begin(status.st_ino)
                if status.st_size == self._reached:
                    return anew
                file.seek(self._reached)
                added = self._take(file.read(status.st_size - self._reached))
                return added or anew
        except (FileNotFoundError, NotADirectoryError):
            gone, self.changed_at = self._reached > 0, 0
            self._begin(0)
            return gone

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

    def _take(self, content: bytes) -> bool:
        whole = content[: content.rfind(b"\n") + 1]
        self.lines += [values for values in map(parse_line, whole.splitlines()) if values is not None]
        self._reached += len(whole)
        self._tail = (self._tail + whole)[-_TAIL:]
        return bool(whole)


def end_cut_line(path: Path) -> None:
    """End the line that a kill cut short, so that the next one is whole."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")
