"""A watched run for tests: lines as a run writes them, and a real `watch` process that is asked over HTTP."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beitforge.pipeline.config.loading import from_dict, to_yaml
from beitforge.pipeline.config.settings import Config
from tests.conftest import ROOT


@dataclass
class Watch:
    """A `watch` process."""

    process: subprocess.Popen
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/"

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer and its content."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    def page(self) -> str:
        answer, content = self.ask()
        assert answer.status == 200
        return content.decode()

    def live(self, since: str = "") -> dict[str, Any]:
        answer, content = self.ask(f"/live?since={since}")
        assert answer.status == 200 and answer.getheader("Content-Type") == "application/json"
        return json.loads(content)

    def until(self, holds: Callable[[dict], bool], seconds: float = 180) -> dict[str, Any]:
        """Everything, once something holds of it. Images come late on a busy machine: they yield to everything."""
        end = time.monotonic() + seconds
        while not holds(found := self.live()):
            assert time.monotonic() < end, {**found, "sections": list(found["sections"])}
            time.sleep(0.1)
        return found


@contextlib.contextmanager
def watching(run: Path, *words: str, port: int = 0, before: tuple[str, ...] = (), data: bool = True) -> Iterator[Watch]:
    """`watch RUN`, ended by Ctrl-C; that is no error, and nothing was complained about. before: what starts it."""
    command = [
        *before,
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "beitforge",
        "watch",
        str(run),
        "--port",
        str(port),
        *(["--data"] if data else []),
        *words,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at http://(\S+):(\d+)/", line)
        if found is None:
            raise AssertionError(line + process.communicate(timeout=10)[1])
        yield Watch(process, found[1], int(found[2]))
        if process.poll() == -signal.SIGKILL:
            return  # by the test
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=20)
        assert process.returncode == 0 and complaints == "", complaints
    finally:
        process.kill()
        process.communicate()


def config_of(folder: Path) -> Config:
    """Of a small run whose data would lie in `folder`."""
    data = {name: str(folder / name) for name in ("images", "tokens", "heldout_images", "heldout_tokens", "tokenizer")}
    return from_dict({"data": data, "train": {"run": str(folder / "run"), "global_batch": 4}}, "test")


def write_run(folder: Path, lines: list[dict]) -> Path:
    """A run folder with these lines, below `folder`."""
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config_of(folder)))
    (run / "environment.json").write_text(json.dumps({"host": "box", "world": 2, "versions": {"torch": "2.13"}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def write_marker(run: Path, step: int) -> None:
    """What says that a checkpoint is whole, of one without files."""
    state = {"step": step, "samples_seen": 4 * step, "world": 1, "zero_stage": 0, "precision": "fp32", "images": ""}
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({**state, "tokens": "", "config": ""}))


def start(step: int, steps: int, when: float) -> dict:
    return {"step": step, "kind": "start", "time": when, "world": 2, "steps": steps, "epoch_samples": 12}


def lines_of(until: int, steps: int, every: int = 2, seconds: float = 10.0) -> list[dict]:
    """A start, and lines up to step `until`, which is now; held-out ones at every fifth."""
    begun = time.time() - seconds * until
    lines = [start(0, steps, begun)]
    for step in range(every, until + 1, every):
        values = {"loss": 3.5 - step / steps, "masked_accuracy": step / steps / 2, "images_per_second": 100.0 + step}
        lines.append(train_line(step, begun + seconds * step, **values))
        if step % (5 * every) == 0:
            apart = {"loss": 3.0 - step / steps, "masked_accuracy": step / steps / 4, "samples": 9}
            lines.append({"step": step, "kind": "heldout", "time": begun + seconds * step, **apart})
    return lines


def append(run: Path, *lines: dict | str) -> None:
    """Onto metrics.jsonl; a text as it is, without an end of line."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        for line in lines:
            file.write(line if isinstance(line, str) else json.dumps(line) + "\n")


def train_line(step: int, when: float, **values: float) -> dict:
    """As pipeline.training.loop logs it."""
    usual = {"loss": 3.0, "masked_accuracy": 0.1, "data_wait_share": 0.2, "lr": 1e-3, "gradient_norm": 2.0}
    usual |= {"images_per_second": 100.0, "memory_bytes": 2**30}
    return {"step": step, "kind": "train", "time": when, **usual, **values}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of change."""
    return {
        str(path.relative_to(folder)): (status.st_size if path.is_file() else 0, status.st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
        for status in [path.stat()]
    }


def wait_for(holds, process: subprocess.Popen | None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
