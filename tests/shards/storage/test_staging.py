"""Only what beitforge wrote, unchanged since, is ever replaced or removed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.staging import MARKER, check_made, leftovers, refuse_other_file, staged_folder


def made(out: Path, text: str = "one", replace: bool = True) -> None:
    with staged_folder(out, "export", replace=replace) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/data").write_text(text)


def test_a_folder_appears_whole_and_is_replaced_only_as_it_was_written(tmp_path):
    out = tmp_path / "x"
    made(out)
    made(out, "two")
    assert (out / "inner/data").read_text() == "two"
    assert json.loads((out / MARKER).read_text())["made_by"] == "beitforge export"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "x").mkdir()
    made(tmp_path / "x", replace=False)
    assert (tmp_path / "x/inner/data").exists()


STRANGERS = {
    "a file beside": lambda out: (out / "thesis.tex").write_text("years"),
    "a changed file": lambda out: (out / "inner/data").write_text("edited"),
    "a file in a folder of ours": lambda out: (out / "inner/notes").write_text("mine"),
    "an empty folder": lambda out: (out / "plans").mkdir(),
    "a link": lambda out: (out / "link").symlink_to("/etc"),
    "no marker": lambda out: (out / MARKER).unlink(),
    "a marker of another": lambda out: (out / MARKER).write_text(json.dumps({"made_by": "cookiecutter", "files": {}})),
    "a damaged marker": lambda out: (out / MARKER).write_text("{" * 100_000),
    "a marker that is a pipe": lambda out: ((out / MARKER).unlink(), os.mkfifo(out / MARKER)),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_anything_else_in_the_folder_is_left_alone(tmp_path, stranger):
    out = tmp_path / "x"
    made(out)
    STRANGERS[stranger](out)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(ShardError, match="so it stays"):
        made(out, "two")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_comes_while_we_write_is_left_alone(tmp_path):
    out = tmp_path / "x"
    with pytest.raises(ShardError, match="notes"), staged_folder(out, "export", replace=True) as folder:
        (folder / "data").write_text("one")
        out.mkdir()
        (out / "notes").write_text("mine")
    assert (out / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_is_no_folder(tmp_path, replace):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ShardError, match="is a file"):
        made(tmp_path / "x", replace=replace)


def test_without_leave_to_replace_even_ours_stays(tmp_path):
    made(tmp_path / "x")
    with pytest.raises(ShardError, match="not empty"):
        made(tmp_path / "x", "two", replace=False)


KILLED = """
import os, signal, sys
from pathlib import Path
from beitforge.shards.storage.staging import check_made, staged_folder
with staged_folder(Path(sys.argv[1]), "export", replace=True) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_a_killed_call_is_swept_a_live_one_and_strangers_are_not(tmp_path):
    out = tmp_path / "x"
    command = [sys.executable, "-c", KILLED, str(out)]
    dead = subprocess.run([*command, "dies"], stdout=subprocess.PIPE, text=True, check=False)
    assert dead.returncode == -signal.SIGKILL
    left = Path(dead.stdout.strip())
    assert (left / "half").exists()
    strange = [tmp_path / name for name in ("x.partial", "x.before", f".x.beitforge-{'0' * 32}", ".x.beitforge-mine")]
    for path in strange:
        path.mkdir()
        (path / "data").write_text("mine")
    with subprocess.Popen([*command, "lives"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as live:
        assert live.stdout is not None
        staged = Path(live.stdout.readline().strip())
        made(out)
        assert not left.exists()
        assert (staged / "half").exists()
        assert all((path / "data").read_text() == "mine" for path in strange)
        live.kill()


def test_leftovers_are_told_by_their_whole_name(tmp_path):
    ours = ["shard-000000.tar.partial-0badc0de", "manifest.json.partial-12345678"]
    others = ["notes.partial-1", "notes.txt.partial-12345678", "a.tar.partial-", "a.tar.partial-123456789", "a.partial"]
    for name in ours + others:
        (tmp_path / name).write_text("x")
    (tmp_path / "b.tar.partial-12345678").mkdir()
    assert [path.name for path in leftovers(tmp_path)] == sorted(ours)


def test_only_a_file_with_our_words_is_ours(tmp_path):
    path = tmp_path / "page.html"
    refuse_other_file(path, b"beitforge")
    for content in (b"", b"a beitforge page"):
        path.write_bytes(content)
        refuse_other_file(path, b"beitforge")
    path.write_bytes(b"mine")
    with pytest.raises(ShardError, match="stays"):
        refuse_other_file(path, b"beitforge")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ShardError, match="stays"):
        refuse_other_file(path, b"beitforge")


def test_what_was_changed_since_is_found(tmp_path):
    """By whoever asks before he uses a folder; nothing outside it is read."""
    with staged_folder(tmp_path / "out", "export", replace=False) as folder:
        for name in ("whole", "changed", "gone"):
            (folder / name).write_text(name)
    findings: list[str] = []
    assert check_made(tmp_path / "out", findings.append) == 3 and not findings
    (tmp_path / "out" / "changed").write_text("chanced")
    (tmp_path / "out" / "gone").unlink()
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    marker["files"] |= {"../elsewhere": "0" * 32, "/etc/hostname": "0" * 32}
    (tmp_path / "out" / MARKER).write_text(json.dumps(marker))
    assert check_made(tmp_path / "out", findings.append) == 5
    told = sorted(line.rpartition("/")[2].partition(":")[0] for line in findings)
    assert len(findings) == 4 and "changed is damaged or was changed" in told and "gone is missing" in told
    assert sum("leads out of the folder" in line for line in findings) == 2
    assert check_made(tmp_path, findings.append) is None
