"""Background work of a server: one process at a time, of low priority, that writes its result into a file.

Must not know runs, torch or any stage.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

THREADS = 2
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(THREADS)}


class BackgroundJob:
    """Runs `command OUT` on request, once per request value and at most half of the time. `result`: what the last
    successful process wrote into OUT; `error`: the last line on stderr of the last one when it failed. The process
    should end when this one is gone."""

    def __init__(self, command: list[str]):
        self.command = command
        self.result, self.error = b"", ""
        self.changes = 0
        self._asked: object = None
        self._begun = self._rests_until = 0.0  # on the monotonic clock
        self._process: subprocess.Popen | None = None

    @property
    def busy(self) -> bool:
        """Whether a process is running."""
        return self._process is not None

    def request(self, what: object) -> None:
        """Start a process when `what` differs from the last request; ignored while one runs or the job rests."""
        now = time.monotonic()
        if self._process is None and what != self._asked and now >= self._rests_until:
            self._asked, self._begun = what, now
            folder = tempfile.TemporaryDirectory(prefix="beitforge-watch-")
            out = Path(folder.name) / "result"
            self._process = subprocess.Popen(
                [*self.command, str(out)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, **_NO_GPU},
            )
            threading.Thread(target=self._wait, args=(self._process, folder, out), daemon=True).start()

    def _wait(self, process: subprocess.Popen, folder: tempfile.TemporaryDirectory, out: Path) -> None:
        _, said = process.communicate()
        with folder:
            if process.returncode == 0 and out.exists():
                self.result, self.error = out.read_bytes(), ""
            else:
                lines = said.decode("utf-8", "replace").strip().splitlines()
                self.error = lines[-1] if lines else f"ended with {process.returncode}"
        now = time.monotonic()
        self._rests_until = now + (now - self._begun)
        self.changes += 1
        self._process = None

    def stop(self) -> None:
        """Kill the running process, if any."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
