"""A run in a terminal: lines of text of any width, and a screen that is drawn over in place.

Must not know HTML, torch or any stage.
"""

import contextlib
import math
import os
import select
import shutil
import signal
import statistics
import sys
import termios
import time
import tty
import unicodedata
from collections.abc import Callable
from types import FrameType

from beitforge.pipeline.runs.formatting import duration
from beitforge.pipeline.runs.jsonl import latest, value
from beitforge.pipeline.runs.status import Follower, RunStatus, seconds_a_step

NARROWEST = 40  # columns
_WIDEST = 110
_LABEL = 11  # columns of the names at the left
_WORST = 4  # ranks that are listed
_SPARKS = "▁▂▃▄▅▆▇█"
_PLAIN_SPARKS = "_.-=+*%#"
_KEY_SECONDS = 0.2
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"  # other screen, no cursor, no wrapping


def render(follower: Follower, width: int, plain: bool = False) -> list[str]:
    """What there is to say about a run, each line at most `width` columns. plain: in ASCII."""
    width = max(NARROWEST, min(width, _WIDEST))
    stand = follower.status()
    lines = [_title(follower), _state(stand)]
    trained = latest(follower.lines, "train")
    if trained:
        rows = [
            *_progress(stand, follower, width - _LABEL, plain),
            *_learning(follower, trained, width - _LABEL, plain),
        ]
        rows += [*_machine(follower, trained), *_past(follower), *(("note", note) for note in follower.notes)]
        lines += ["", *(f"{name:<{_LABEL}}{text}" for name, text in rows)]
    return [cut(line, width, plain) for line in lines]


def _title(follower: Follower) -> str:
    return f"{follower.run.resolve().name}  ({follower.run.resolve().parent})"


def _state(stand: RunStatus) -> str:
    if math.isnan(stand.silent):
        return stand.summary
    return f"{stand.summary} · wrote {duration(stand.silent)} ago"


Rows = list[tuple[str, str]]


def _progress(stand: RunStatus, follower: Follower, width: int, plain: bool) -> Rows:
    """Steps with a bar, rate, and the time that is left."""
    count = f" {stand.step:,} / {stand.planned:,}" if stand.planned else f" {stand.step:,}"
    share = min(1.0, stand.step / stand.planned) if stand.planned else 0.0
    count = f" {share:.1%}{count}" if stand.planned else count
    full, empty = ("#", ".") if plain else ("█", "░")
    room = max(4, min(40, width - len(count)))
    done = math.floor(share * room)
    rows = [("steps", full * done + empty * (room - done) + count)]
    each = seconds_a_step(follower.lines)
    speeds = [value(line, "images_per_second") for line in latest(follower.lines, "train")[-10:]]
    speeds = [speed for speed in speeds if 0 < speed < math.inf]
    rate = [f"{statistics.harmonic_mean(speeds):,.4g} images/s"] if speeds else []
    if math.isfinite(each):
        rate.append(f"{each:.3g} s a step" if each >= 1 else f"{1 / each:.3g} steps/s" if each > 0 else "")
    rows.append(("rate", " · ".join(word for word in rate if word) or "–"))
    if math.isfinite(stand.left):
        rows.append(("left", f"{duration(stand.left)}, until {_when(time.time() + stand.left)}"))
    return rows


def _when(moment: float) -> str:
    try:
        there, now = time.localtime(moment), time.localtime()
    except (OverflowError, ValueError, OSError):  # of no calendar
        return "no time"
    return time.strftime("%H:%M" if there[:3] == now[:3] else "%a %d %b %H:%M", there)


def _learning(follower: Follower, trained: list[dict], width: int, plain: bool) -> Rows:
    """Loss over the run, what was measured apart, learning rate, gradient norm."""
    last = trained[-1]
    spark = sparkline([value(line, "loss") for line in trained], max(8, min(60, width - 9)), plain)
    rows = [("loss", f"{value(last, 'loss'):<8.4g} {spark}")]
    for kind, name in (("heldout", "held-out"), ("new_view", "new view"), ("test", "test"), ("test_ema", "average")):
        found = [line for line in latest(follower.lines, kind) if "loss" in line]
        if found:
            words = [f"{value(found[-1], 'loss'):.4g}", *_accuracies(found[-1]), f"step {found[-1]['step']:,}"]
            rows.append((name, " · ".join(words)))
    survey = [line for line in latest(follower.lines, "survey") if "knn" in line]
    if survey:
        rows.append(("k-NN", f"{value(survey[-1], 'knn'):.1%} · step {survey[-1]['step']:,}"))
    rows += [("accuracy", " · ".join(_accuracies(last)))] if _accuracies(last) else []
    both = [("lr", "lr", ".3g"), ("gradient_norm", "norm", ".3g")]
    words = [f"{name} {value(last, key):{form}}" for key, name, form in both if key in last]
    return [*rows, ("gradient", " · ".join(words))]


def _accuracies(line: dict) -> list[str]:
    names = {"masked_accuracy": "of tokens", "accuracy": "right", "top5": "in the top 5"}
    return [f"{value(line, key):.1%} {name}" for key, name in names.items() if key in line]


def _machine(follower: Follower, trained: list[dict]) -> Rows:
    """Memory and what ranks wait for data."""
    said = follower.ranks.get("ranks")
    ranks = [rank for rank in said if isinstance(rank, dict)] if isinstance(said, list) else []
    memory = [size for size in (value(rank, "memory_bytes") for rank in ranks) if math.isfinite(size)]
    fullest = max(memory, default=value(trained[-1], "memory_bytes"))
    rows = []
    if math.isfinite(fullest):
        rows.append(("memory", f"{fullest / 2**30:.3g} GiB{' on the fullest rank' if len(memory) > 1 else ''}"))
    waits = [(value(rank, "data_wait"), rank) for rank in ranks if math.isfinite(value(rank, "data_wait"))]
    if not waits:
        share = value(trained[-1], "data_wait_share")
        return [*rows, ("data wait", f"{share:.1%} (mean of ranks)")] if math.isfinite(share) else rows
    waits.sort(key=lambda pair: -pair[0])
    shown = waits if len(waits) <= _WORST else waits[:_WORST]
    if len(waits) > _WORST:
        middle = statistics.median(share for share, _ in waits)
        rows.append(("data wait", f"{middle:6.1%}  median of {len(waits):,} ranks"))
    for share, rank in shown:
        name = "" if rows and rows[-1][0] in ("data wait", "") else "data wait"
        rows.append((name, f"{share:6.1%}  rank {rank.get('rank', '?')} on {rank.get('host', '?')}"))
    return rows


def _past(follower: Follower) -> Rows:
    """Starts, bad samples, updates left out, and the last checkpoint."""
    starts = sum(line.get("kind") == "start" for line in follower.lines)
    skipped = sum(line.get("kind") == "skip" for line in follower.lines)
    bad = len(follower.bad_samples.lines)
    words = [_counted(max(0, starts - 1), "restart"), _counted(bad, "bad sample")]
    words += [f"{_counted(skipped, 'update')} left out"] if skipped else []
    rows = [("so far", " · ".join(words))]
    if follower.saved is None:
        return [*rows, ("checkpoint", "none yet")]
    age = duration(max(0.0, time.time() - follower.saved_at))
    return [*rows, ("checkpoint", f"step {follower.saved.step:,}, {age} ago")]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sparkline(values: list[float], width: int, plain: bool = False) -> str:
    """Values as a line of bars, the mean of each of `width` equal parts; a space where none is finite."""
    sparks = _PLAIN_SPARKS if plain else _SPARKS
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        finite = [number for number in part if math.isfinite(number)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(sparks) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(mean) else sparks[round((mean - low) * scale)] for mean in means)


def cut(text: str, width: int, plain: bool = False) -> str:
    """At most `width` columns of a text, and nothing in it that a terminal would obey."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    if plain:
        text = text.replace("·", "-").replace("–", "-").encode("ascii", "replace").decode("ascii")
    columns = 0
    for place, character in enumerate(text):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else not unicodedata.combining(character)
        if columns > width:
            return text[:place]
    return text


def show(draw: Callable[[int], list[str]], seconds: float) -> None:
    """Draw again and again, in place, until q or Ctrl-C. draw: the lines for a width in columns.

    When the output is no terminal, once.
    """
    if not sys.stdout.isatty():
        print("\n".join(draw(shutil.get_terminal_size().columns)), flush=True)
        return
    with _Screen() as screen:
        drawn, size = -math.inf, os.terminal_size((0, 0))
        while not screen.asked_to_end():
            now, at = time.monotonic(), os.get_terminal_size(sys.stdout.fileno())
            if now - drawn >= seconds or at != size:
                drawn, size = now, at
                screen.put(draw(size.columns), size)
    with contextlib.suppress(OSError):
        print("\n".join(draw(size.columns)), flush=True)


class _Screen:
    """The terminal's other screen, and its keys one by one; everything is put back, also when a signal ends it."""

    def __enter__(self) -> "_Screen":
        self.keys = sys.stdin.isatty()
        self.before = termios.tcgetattr(sys.stdin) if self.keys else None
        self.handlers = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
        self.handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        self._enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._leave()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        return kind is KeyboardInterrupt

    def _enter(self) -> None:
        if self.keys:
            tty.setcbreak(sys.stdin)
        _write(_ENTER)

    def _leave(self) -> None:
        with contextlib.suppress(OSError, termios.error):  # the terminal is gone
            if self.before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.before)
            _write(_LEAVE)

    def _pause(self, *_: object) -> None:
        """Ctrl-Z: the terminal is the shell's until it goes on."""
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()

    def asked_to_end(self) -> bool:
        """Wait a moment for a key; whether it was q, or the terminal is gone."""
        if not self.keys:
            time.sleep(_KEY_SECONDS)
            return False
        ready, _, _ = select.select([sys.stdin], [], [], _KEY_SECONDS)
        if not ready:
            return False
        typed = os.read(sys.stdin.fileno(), 64)
        return not typed or b"q" in typed.lower()

    def put(self, lines: list[str], size: os.terminal_size) -> None:
        """Draw over what is there; what does not fit below is left out."""
        shown = [cut(line, size.columns) for line in lines[: max(1, size.lines)]]
        if shown and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            shown[0] = f"\x1b[1m{shown[0]}\x1b[0m"
        _write("\x1b[H" + "\x1b[K\r\n".join(shown) + "\x1b[K\x1b[J")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
