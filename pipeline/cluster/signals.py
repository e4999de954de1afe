"""Being asked to stop, by a signal, a stop file or a launcher that is gone; and how a process that was asked ends.

SIGTERM, SIGINT and SIGUSR1 ask for a save and an orderly end; nothing is done in the handler, the loop asks between
steps. A second one, three seconds or more later, ends the process at once. Under srun only a second Ctrl-C does:
SLURM repeats itself before it kills (the end of a grace time, the time limit), and a save under way should be finished.
Installed before torch is imported, so that an early signal is not lost.

Two files of the run folder go with it. `stop`, written by `beitforge stop RUN`, is looked for by rank 0 between steps
under every launcher, and is removed when the run has ended by it. `ended` says how the last start came to its end:
exit codes do not arrive (srun answers 143 for a rank that ended first, DeepSpeed's launcher 0 for one that was killed).
"""

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from beitforge.pipeline.cluster.environment import rank_of, under_srun
from beitforge.pipeline.plain_text import plain, whole_number
from beitforge.pipeline.reading import open_regular, read_text

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, saved, run again to go on
STOP_FILE, ENDED_FILE = "stop", "ended"
CONFIG_FILE = "config.yaml"  # likewise; a folder with one is a run
LOCK_FILE = ".lock"  # pipeline.runs.folder's, held while a run is under way
FINISHED, BY_FILE = "finished", "stop file"
OVER_SSH = "BEITFORGE_OVER_SSH"  # set for processes that a launcher started over ssh
ORPHAN_SECONDS = 120.0  # from the launcher's end to that of a process that reached no step boundary since
_SAME_REQUEST_SECONDS = 3.0  # a launcher that passes a terminal's Ctrl-C on is not a second request
_LOOK_SECONDS = 1.0
_LONGEST_WORD = 1000  # bytes of RUN/ended
# Of several reasons the first decides what happens next; SIGUSR1 alone asks for the job to go back to the queue.
_STRONGEST_FIRST = (BY_FILE, "SIGTERM", "SIGINT", "SIGUSR1")


class StopRequest:
    """Why this process should stop, or ''; called at every step boundary."""

    def __init__(self) -> None:
        self.reason = ""
        self._since = 0.0
        self._file = Path()
        self._next_look = float("inf")
        self._in_step = under_srun(os.environ)

    def __call__(self) -> str:
        now = time.monotonic()
        if not self.reason and now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            if self._file.exists():
                self._ask(BY_FILE)
        return self.reason

    def install(self) -> None:
        """Take over the signals, and watch the launcher where there is one."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        if "LOCAL_RANK" in os.environ or self._in_step:
            threading.Thread(target=self._watch_launcher, daemon=True).start()

    def watch_folder(self, run: Path) -> None:
        """From now on rank 0 looks for a stop file there, once a second at most."""
        if rank_of(os.environ) == 0:
            self._file, self._next_look = run / STOP_FILE, 0.0

    def _on_signal(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        impatient = self.reason and time.monotonic() - self._since > _SAME_REQUEST_SECONDS
        if impatient and (number == signal.SIGINT or not self._in_step):
            os._exit(128 + number)
        self._ask(name)
        self.reason = strongest_reason([self.reason, name])

    def _ask(self, reason: str) -> None:
        if not self.reason:
            self.reason, self._since = reason, time.monotonic()

    def _watch_launcher(self) -> None:
        """When what started this process is gone nobody could stop it: save at the next step, or end all the same."""
        wait_for_orphaning()
        self._ask("the launcher is gone")
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)


def wait_for_orphaning() -> None:
    """Return when this process's launcher, or what started the launcher, is gone."""
    chain = _chain()
    while _chain(len(chain)) == chain:
        time.sleep(1.0)


def end_with_launcher() -> None:
    """For work that needs no save: end at once when the launcher is gone."""

    def watch() -> None:
        wait_for_orphaning()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _chain(length: int = 0) -> list[int]:
    """Ids of the processes above this one. `length` 0: as far up as their end means that the launcher is gone.

    Under srun that is the parent, slurmstepd. Else it is DeepSpeed's launch.py and its parent; over ssh all up to the
    session's sshd, which ends with the connection. Not further: what is above may be a shell that is logged out of.
    """
    over_ssh = OVER_SSH in os.environ
    wanted = length or (20 if over_ssh else 2 if "LOCAL_RANK" in os.environ else 1)
    chain = [os.getppid()]
    while len(chain) < wanted and chain[-1] > 1:
        if not length and over_ssh and _name(chain[-1]).startswith("sshd"):
            break
        chain.append(_parent(chain[-1]))
    return chain


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def strongest_reason(reasons: list[str]) -> str:
    """The reason that decides, of those that ranks give; '' when none has one."""
    known = [reason for reason in _STRONGEST_FIRST if reason in reasons]
    return (known or [reason for reason in reasons if reason] or [""])[0]


def write_ended(run: Path, step: int, reason: str) -> None:
    """RUN/ended, one line `STEP REASON`, by rename; a run that ended by the stop file takes that away."""
    if reason == BY_FILE:
        with contextlib.suppress(FileNotFoundError):
            (run / STOP_FILE).unlink()
    partial = run / f"{ENDED_FILE}.partial"
    partial.write_text(f"{step} {reason}\n", encoding="utf-8")
    partial.replace(run / ENDED_FILE)


def read_ended(run: Path) -> tuple[int, str] | None:
    """Step and reason of the last start's end, or None when it left no word."""
    try:
        step, _, reason = read_text(run / ENDED_FILE, _LONGEST_WORD, run).strip().partition(" ")
        return whole_number(step, str(run / ENDED_FILE)), plain(reason, str(run / ENDED_FILE))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def begin(run: Path) -> None:
    """Called by what starts a run: take back a stop file and the last word of an earlier start.

    Whoever starts a run wants it to run. Only while another process holds the run folder its stop file is left alone;
    so is a file of such a name in a folder that holds no run, unless it is empty.
    """
    with contextlib.suppress(FileNotFoundError), open_regular(run / LOCK_FILE) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    for path in (run / STOP_FILE, run / ENDED_FILE):
        if path.is_file() and ((run / CONFIG_FILE).exists() or not path.stat().st_size):
            path.unlink(missing_ok=True)


def exit_code(finished: bool, environment: Mapping[str, str]) -> int:
    """Under srun 0 after a save on request, too: srun kills the other ranks of the first one that ends with another."""
    return 0 if finished or under_srun(environment) else EXIT_STOPPED
