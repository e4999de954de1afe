"""The one call for a GPU: its plan, its processes, and what is left when a row hangs, dies or finds no time."""

import dataclasses
import json
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.gpu import child, gpu
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.harness import Job
from tests.conftest import ROOT

ORDER = ["correctness", "kernels", "cross_entropy", "fusions", "train", "operations", "decode", "blocks", "evoformer"]
# in the place of benchmarks.gpu.child: rows by number, which end well, hang, or take their process with them
CHILD = """
    import json, os, sys, time
    first, file, ends = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
    def append(line):
        with open(file, "a") as out:
            out.write(json.dumps(line) + "\\n")
    for number in range(first, len(ends)):
        append({"begun": number})
        if ends[number] == "hangs":
            time.sleep(60)
        if ends[number] == "dies":
            os._exit(9)
        append({"done": number, "row": {"row": str(number), "ms": "1.0", "_ms": 1.0}})
        if ends[number] == "breaks":
            sys.exit(3)
    append({"note": "to its end"})
"""


def call(tmp_path: Path, parts: tuple[Part, ...] = (), minutes: float = 1.0) -> gpu.Call:
    return gpu.Call(parts, minutes, tmp_path, False, time.monotonic() + 60 * minutes)


def part(rows: int) -> Part:
    jobs = [Job({"row": str(number)}, ("ms",), 0.1, lambda _: {}) for number in range(rows)]
    return Part("made", "what is left?", 1.0, lambda _: jobs, lambda rows: {"rows": float(len(rows))}, lambda _: "note")


def run(ends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 20.0) -> dict:
    """A part whose rows end like this."""
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))

    def child(name: str, first: int, _: float, made: gpu.Call, *flags: str) -> list[str]:
        return [sys.executable, str(script), str(first), str(made.out / f"{name}.rows.jsonl"), ",".join(ends)]

    monkeypatch.setattr(gpu, "_child", child)
    monkeypatch.setattr(gpu, "LEAST_PATIENCE", 1.0)
    monkeypatch.setattr(gpu, "START", 0.5)
    return gpu.run_part(part(len(ends)), call(tmp_path), time.monotonic() + seconds)


def test_the_plan_says_what_and_how_long(tmp_path):
    lines = list(gpu.plan(call(tmp_path, tuple(PARTS.values()), 8.0)))
    assert [line.split()[0] for line in lines[2:-1]] == ORDER
    total = sum(gpu.START + sum(job.seconds for job in part.jobs(False)) for part in PARTS.values())
    assert f"in all {total / 60:.1f} minutes of 6.8" in lines[-1]
    assert total / 60 < 8.0 * (1 - gpu.AHEAD) + 0.5, "what is planned for eight minutes takes about eight"
    assert sum(part.share for part in PARTS.values()) == pytest.approx(1.0)


def test_the_peers_are_in_the_plan():
    named = {value for part in PARTS.values() for job in part.jobs(False) for value in job.known.values()}
    peers = {"DS4Sci_EvoformerAttention", "TransformerEngine, post_scale_bias", "cuDNN graph, post_scale_bias"}
    peers |= {"FlashBias, SVD", "Liger-Kernel", "transformers, compiled", "timm, compiled", "Flex, table"}
    assert peers | {"unilm's arithmetic, compiled", "base", "large"} <= named


def test_time_that_a_part_leaves_goes_to_those_behind_it(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    halves = (dataclasses.replace(part(1), share=0.25), dataclasses.replace(part(1), share=0.5), part(1))
    made = gpu.Call((*halves[:2], dataclasses.replace(part(1), share=0.25)), 1.0, tmp_path, False, 1060.0)
    ends = []
    for number, (_, until) in enumerate(gpu.deadlines(made)):
        ends.append(until)
        now[0] = 1003.0 if number == 0 else until
    assert ends == [1015.0, 1003.0 + 57 * 0.5 / 0.75, 1060.0]


def test_rows_that_hang_or_die_cost_themselves(tmp_path, monkeypatch):
    """The others are measured, by a process that begins behind the row; a lost context does not lose the next row."""
    content = run(["well", "hangs", "well", "dies", "breaks", "well"], tmp_path, monkeypatch)
    cells = [row["ms"] for row in content["rows"]]
    assert [cells[0], cells[2], cells[4], cells[5]] == ["1.0"] * 4
    assert cells[1].startswith("given up after ") and cells[3] == "its process ended with 9; see made.log"
    assert content["notes"] == ["to its end"] and content["ratios"] == {"rows": 6.0}
    written = json.loads((tmp_path / "made.json").read_text())
    assert written["rows"] == content["rows"] and "_ms" not in written["rows"][0]


def test_when_the_time_is_over_what_is_there_is_written(tmp_path, monkeypatch):
    content = run(["well", "hangs", "well"], tmp_path, monkeypatch, seconds=0.9)
    cells = [row["ms"] for row in content["rows"]]
    assert cells[0] == "1.0" and cells[1].startswith("given up") and cells[2] == "not begun: no time was left"
    assert content["notes"] == ["The part was not finished in its time."]
    gpu.write_all(call(tmp_path), [content])
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert {"date", "machine", "versions", "minutes", "parts"} <= set(whole)
    assert whole["parts"][0]["rows"][0] == {"row": "0", "ms": "1.0"}
    assert "| 0 | 1.0 |" in (tmp_path / "gpu.md").read_text()


def test_all_of_it_on_a_cpu(tmp_path, monkeypatch, capsys):
    """The plan, a part in its own process, the files; of one part: tests/benchmarks/test_rehearsal.py runs all rows."""
    monkeypatch.chdir(ROOT)
    assert gpu.main(["--dry", "--parts", "correctness", "--minutes", "3", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("bench gpu: 3 minutes") and shown[-1].startswith("wrote ")
    (content,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    rows = PARTS["correctness"].jobs(True)
    assert [row["repeatable"] for row in content["rows"]] == ["yes"] * len(rows)
    assert "plain float16 code" in content["notes"][0]
    assert (tmp_path / "out" / "correctness.md").exists()


def test_what_is_compiled_is_compiled_ahead(tmp_path, monkeypatch):
    """Every such row in a process of its own, at once, no longer than the share; one builder is left behind."""

    def child(name: str, first: int, seconds: float, made: gpu.Call, *flags: str) -> list[str]:
        assert flags == ("--ahead",) and 0 < seconds < 12
        mark, seconds = str(tmp_path / f"ahead{first}"), 20 * (first == 2)
        code = f"import pathlib, time; pathlib.Path({mark!r}).touch(); time.sleep({seconds})"
        return [sys.executable, "-S", "-c", code]

    monkeypatch.setattr(gpu, "_child", child)
    jobs = [Job({}, ("ms",), 1.0, lambda _: {}, compiles=number > 0) for number in range(3)]
    made = dataclasses.replace(part(1), name="evoformer", jobs=lambda _: jobs)
    before = time.monotonic()
    (builder,) = gpu.compile_ahead(gpu.Call((made,), 0.2, tmp_path, False, before + 12))
    assert time.monotonic() - before < 0.2 * 60 * gpu.AHEAD + 3
    assert sorted(path.name for path in tmp_path.glob("ahead*")) == ["ahead1", "ahead2"]
    gpu.stop(builder)
    assert builder.poll() is not None


def test_a_run_ahead_writes_no_row(tmp_path):
    assert child.main(["fusions", "0", "60", str(tmp_path / "rows"), "--dry", "--ahead"]) == 0
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("words", [["--parts", "nothing"], ["--minutes", "0"]])
def test_what_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
