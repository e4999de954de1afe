"""A run folder that somebody else made: reading it is reading bounded regular files of it, and nothing else."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from beitforge.pipeline.config.loading import from_dict, to_yaml
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reports import components
from beitforge.pipeline.runs import jsonl
from beitforge.pipeline.runs.formatting import utc_time
from beitforge.pipeline.runs.jsonl import JsonlTail, metric_line, read_lines, value
from beitforge.pipeline.runs.record import read_config, read_record
from beitforge.pipeline.runs.status import Follower
from beitforge.pipeline.stages import import_encoder, report
from beitforge.pipeline.watch import terminal
from beitforge.pipeline.weights.encoder import load_encoder, trained_weights
from tests.conftest import ROOT
from tests.pipeline.runs.made_runs import lines_of, words
from tests.pipeline.watch.watching import watching

nightly = pytest.mark.skipif(os.environ.get("BEITFORGE_NIGHTLY") != "1", reason="minutes: BEITFORGE_NIGHTLY=1")
PLACES = ["file:///etc/passwd", "/proc/self/mem", "//server/share", "s3://bucket/x", "/dev/zero", "../../x", "{fifo}"]


@pytest.fixture
def server():
    """The address of a server that counts who comes, and answers nobody."""
    listening = socket.create_server(("127.0.0.1", 0))
    came: list[object] = []

    def wait() -> None:
        while True:
            try:
                came.append(listening.accept())
            except OSError:
                return

    threading.Thread(target=wait, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/x", came
    listening.close()


def received(folder: Path, where: str, lines: list[dict] | None = None) -> Path:
    """A run folder whose config names `where` for everything."""
    run = folder / "run"
    run.mkdir(parents=True)
    data = dict.fromkeys(("images", "tokens", "heldout_images", "heldout_tokens"), where)
    if "://" not in where:
        data |= {"tokenizer": where, "cache": where}
    (run / "config.yaml").write_text(to_yaml(from_dict({"data": data}, "x")))
    text = "".join(json.dumps(line) + "\n" for line in lines or lines_of(20, 20))
    (run / "metrics.jsonl").write_text(text)
    return run


def opened(run: Path, *verb: str) -> tuple[int, str, str]:
    """Exit code, output and the paths that `beitforge VERB` opened, by an audit hook."""
    code = "import sys; seen = []\n"
    code += "sys.addaudithook(lambda name, a: seen.append(str(a[0])) if name in ('open', 'socket.connect') else None)\n"
    code += "from beitforge.pipeline.cli import main\ncode = main(sys.argv[1:])\n"
    code += "print(code, *[p for p in seen if isinstance(p, str)], sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code, *verb], cwd=run.parent, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    first, *paths = done.stdout.splitlines()
    return int(first), "\n".join(paths), done.stderr


@pytest.mark.parametrize("place", [*PLACES, "{server}"])
def test_what_a_config_names_is_not_read(tmp_path, server, place):
    url, came = server
    os.mkfifo(tmp_path / "fifo")
    run = received(tmp_path, place.format(server=url, fifo=tmp_path / "fifo"))
    begun = time.monotonic()
    record = read_record(run, read_config(run))
    assert report.run([run]) == 0 and report.run([run, received(tmp_path / "b", "x")], tmp_path / "both.html") == 0
    follower = Follower(run)
    follower.refresh()
    assert terminal.render(follower, 80) and record.tokens is None and not came
    assert time.monotonic() - begun < 5
    assert "--data" in words((run / "report.html").read_text())


def test_a_report_opens_no_path_that_the_config_names(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "manifest.json").write_text("{}")
    run = received(tmp_path, str(tmp_path / "elsewhere"))
    code, paths, _ = opened(run, "report", "run")
    assert code == 0 and "run/metrics.jsonl" in paths and "elsewhere" not in paths


def test_watch_asks_nobody(tmp_path, server):
    url, came = server
    run = received(tmp_path, url)
    with watching(run, data=False) as watch:
        begun = time.monotonic()
        assert "--data" in words(watch.page()) and watch.live()["status"]["state"] == "finished"
        time.sleep(1.2)
        watch.page()
        assert time.monotonic() - begun < 10 and not came


ODD = [
    "config.yaml",
    "metrics.jsonl",
    "bad_samples.jsonl",
    "environment.json",
    "probe.json",
    "ranks.json",
    "ended",
    "stop",
]


def plant(path: Path, kind: str, outside: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to({"link": outside, "device": "/dev/zero", "loop": path}[kind])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "sparse", "link", "device", "loop"])
def test_odd_files_are_a_note(tmp_path, kind, monkeypatch):
    """Not a hang, not what stands outside; a config that cannot be read is one line."""
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    outside.write_text('{"job": "SECRET", "host": "SECRET"}')
    for name in ODD:
        run = received(tmp_path / name, "x")
        plant(run / name, kind, outside)
        follower = Follower(run)
        follower.refresh()
        assert "SECRET" not in "".join([*terminal.render(follower, 80), follower.status().summary])
        if name == "config.yaml":
            assert follower.refused or follower.trouble or kind == "loop"
            with pytest.raises(ConfigError):
                read_config(run)
            continue
        record = read_record(run, read_config(run))
        assert "SECRET" not in str(record)
        if name.endswith((".jsonl", ".json")) and name != "ranks.json":
            assert any(name in note for note in record.notes), (kind, name, record.notes)


def test_lines_that_no_run_writes(tmp_path):
    """Times of no calendar, steps that are none, values that are none."""
    line = {"kind": "train", "loss": 1.0}
    odd = [{"step": 2, "time": 1e99}, {"step": 2, "time": float("nan")}, {"step": -1}, {"step": 1e300}, {"step": "3"}]
    odd += [{"step": True}, {"step": None}, {"step": 10**30}, {"step": 3, "time": "x"}, {"step": 3, "kind": [1]}, {}]
    run = received(tmp_path, "x", [*lines_of(20, 20), *({**line, **values} for values in odd)])
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(
            "[" * 10_000
            + "\n"
            + '{"step": 5, "x": "'
            + "y" * jsonl.LONGEST
            + '"}\n'
            + '{"step": 5, "a": '
            + "[" * 40
            + "]" * 40
            + "}\n"
        )
    record = read_record(run, read_config(run))
    assert record.step == 20 and sum("lines that no run writes" in note for note in record.notes) == 1
    huge = [
        {**line, "step": 22, "time": 1e9, "loss": number, "lr": number}
        for number in (1e308, 10**400, float("inf"), "a")
    ]
    follower = Follower(run)
    for number, each in enumerate(huge):
        run = received(tmp_path / str(number), "x", [*lines_of(20, 20), each, {**each, "step": 24, "loss": -1e308}])
        assert report.run([run]) == 0
        follower = Follower(run)
        follower.refresh()
        assert terminal.render(follower, 80)
    assert value({"a": 1e308}, "a") == float("inf") and value({"a": True}, "a") == 1 and value({"a": 5e-324}, "a") == 0
    assert utc_time(1e99) == utc_time(float("nan")) == "no time"


def test_many_lines(tmp_path, monkeypatch):
    """The last of them, in bounded memory."""
    monkeypatch.setattr(jsonl, "MOST", 1000)
    monkeypatch.setattr(jsonl, "LARGEST", 100_000)
    monkeypatch.setattr(jsonl, "LONGEST", 50_000)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(20_000)))
    found = read_lines(path, tmp_path, metric_line)
    assert [line["step"] for line in found.lines] == list(range(19_000, 20_000)) and len(found.notes) == 2
    tail = JsonlTail(path, tmp_path, metric_line)
    assert tail.read() and not tail.read()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 20000}\n' + "x" * 90_000)
    assert tail.read() and tail.lines[-1]["step"] == 20_000 and len(tail.lines) == 1000
    with open(path, "a", encoding="utf-8") as file:
        file.write('\n{"step": 20001}\n')
    assert tail.read() and tail.lines[-1]["step"] == 20_001


@nightly
def test_a_million_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train", "loss": 1}\n' * 1_000_000)
    begun = time.monotonic()
    found = read_lines(path, tmp_path, metric_line)
    assert len(found.lines) == jsonl.MOST and found.notes and time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", "javascript:alert(1)", "</title>"]
)
def test_nothing_of_a_folder_is_html(tmp_path, text):
    lines = [{**line, "device": text, f"x{text}": 1} for line in lines_of(20, 20)]
    run = received(tmp_path / text.replace("/", "_"), "x", [*lines, {**lines[-1], "kind": text}])
    (run / "environment.json").write_text(
        json.dumps({"host": text, text: text, "versions": {text: text}, "commit": text})
    )
    result = {"knn": 0.5, "linear": 0.5, "features": text}
    (run / "probe.json").write_text(json.dumps({"results": {text: result, "trained": result}, "step": text}))
    (run / "bad_samples.jsonl").write_text(
        json.dumps({"shard": text, "key": text, "reason": [text], "sample": text}) + "\n"
    )
    (run / "checkpoints" / f"step-4{text.replace('/', '_')}").mkdir(parents=True)
    assert report.run([run, received(tmp_path / "other", "x")], tmp_path / "both.html") == 0
    assert report.run([run]) == 0
    for page in ((run / "report.html").read_text(), (tmp_path / "both.html").read_text()):
        body = page.partition("<body>")[2]
        for planted in ("<script>alert", "<img src=x", "</title>"):
            assert planted not in body
        assert "default-src 'none'" in page and 'href="javascript' not in page
    assert components.page("</title><script>", []).count("<script>") == 1


def test_weights_that_are_no_file(tmp_path):
    """A FIFO in the place of a library's file keeps it waiting for ever."""
    (tmp_path / "config.json").write_text(json.dumps({"kind": "beit", "config": {}}))
    os.mkfifo(tmp_path / "model.safetensors")
    for read in (load_encoder, trained_weights):
        with pytest.raises(ConfigError, match="FIFO"):
            read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match="damaged"):
        load_encoder(tmp_path)
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="FIFO"):
        import_encoder.run(tmp_path / "a.pth", tmp_path / "out", [])
