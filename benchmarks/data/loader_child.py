"""The parent's side of loader_peers.child: a loader in its own process and environment, still between rounds."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
_ANSWER_S = 240  # the first answer comes after the peer has made its copy of the images


class PeerFailed(Exception):
    """Why a peer has no numbers, in one line."""


def environment(name: str) -> Path:
    """The Python that `./launch.sh setup loader_peers` made for a peer; this process's own for none. Raises
    PeerFailed."""
    if not name:
        return Path(sys.executable)
    folder = ROOT / f".venv-{name}"
    if (folder / "made-from").exists():
        return folder / "bin" / "python"
    if (folder / "failed").exists():
        raise PeerFailed("does not install here")
    raise PeerFailed("not installed (./launch.sh setup loader_peers)")


@dataclass
class Child:
    """A started loader. `shown`: pixels u8 [B, 3, H, W] and numbers i64 [B] of its first batches, or None."""

    process: subprocess.Popen
    log: Path
    shown: tuple[np.ndarray, np.ndarray] | None = None

    def ask(self, words: str) -> dict:
        """Its answer to a line. Raises PeerFailed."""
        assert self.process.stdin is not None, "started with a pipe"
        os.killpg(self.process.pid, signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(words)
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        """Its next line; then it stands still, and its workers and threads with it."""
        out = self.process.stdout
        assert out is not None, "started with a pipe"
        line = out.readline() if select.select([out], [], [], _ANSWER_S)[0] else None
        if not line:
            why = "gives no answer" if line is None else self._last_words()
            self.end()
            raise PeerFailed(why)
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(line)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"fails: {lines[-1][:100] if lines else 'without a word'}"

    def end(self) -> None:
        """It, its workers and its threads."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self.process.wait()


def start(module: str, variant: str, python: Path, given: Path, core: str) -> Child:
    """Start a loader on one core (`any`: on all) and take its first batch. Raises PeerFailed."""
    log = given.with_name(f"{module}-{variant}.log")
    command = [str(python), "-m", "benchmarks.data.loader_peers.child", module, variant, core, str(given)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    with log.open("w") as complaints:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            cwd=ROOT,
            env={**os.environ, **threads, "PYTHONPATH": paths},
            start_new_session=True,
        )
    child = Child(process, log)
    batch = child.answer()["batch"]
    if batch:
        with np.load(batch) as arrays:
            child.shown = arrays["pixels"], arrays["numbers"]
        Path(batch).unlink()
    return child
