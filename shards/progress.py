"""How far a long step has come: a bar on a terminal, plain lines in a log file."""

import sys
import time

from tqdm import tqdm


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Count `total` units with rate and time left; use as a context manager.

    On a terminal a tqdm bar; otherwise a line every `seconds_per_line`, and one at the end. `done` units were finished
    before this process began and do not count towards the rate.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, seconds_per_line: float = 15.0):
        self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
        self.seconds_per_line = seconds_per_line
        self.started = self.last_line = time.monotonic()
        self.note = ""
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` (loss, rejects, …) is shown behind the rate."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.last_line >= self.seconds_per_line:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        elapsed = self.last_line - self.started
        rate = (self.done - self.first) / elapsed if elapsed > 0 else 0.0
        left = _clock((self.total - self.done) / rate) if rate > 0 else "?"
        share = 100 * self.done / self.total if self.total else 100
        text = f"{self.label}: {self.done}/{self.total} {self.unit} ({share:.0f} %), {rate:.1f} {self.unit}/s, "
        text += f"{_clock(elapsed)} elapsed, {left} left"
        print(f"{text}, {self.note}" if self.note else text, file=sys.stderr, flush=True)


class Silent:
    """The progress of a process that shows none."""

    def __init__(self) -> None:
        self.done = 0

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count, and say nothing."""
        self.done += count
