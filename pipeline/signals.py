"""Being asked to stop: signals, a vanished launcher. The loop asks between steps; nothing is done in the handler.

SIGTERM, SIGINT and SIGUSR1 ask for a save and an orderly end. A second one, three seconds or more later, ends the
process at once. Installed before torch is imported, so that an early signal is not lost.
"""

import os
import signal
import threading
import time

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, saved, run again to go on
_SAME_REQUEST_SECONDS = 3.0  # a launcher that passes a terminal's Ctrl-C on is not a second request


class StopRequest:
    """Why this process should stop, or ''."""

    def __init__(self) -> None:
        self.reason = ""
        self._since = 0.0

    def install(self) -> None:
        """Take over the signals, and watch the launcher where there is one."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        if "LOCAL_RANK" in os.environ:
            threading.Thread(target=self._watch_launcher, args=(os.getppid(),), daemon=True).start()

    def _on_signal(self, number: int, _: object) -> None:
        if self.reason and time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        if not self.reason:
            self.reason, self._since = reason, time.monotonic()

    def _watch_launcher(self, launcher: int) -> None:
        """Stop when the process that started this one is gone, or was itself orphaned: nobody could stop us then."""
        grandparent = _parent(launcher)
        while not self.reason:
            time.sleep(1.0)
            if os.getppid() != launcher or _parent(launcher) != grandparent:
                self._ask("the launcher is gone")


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
