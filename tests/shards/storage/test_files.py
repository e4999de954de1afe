"""Partial files: held while they are written, swept once they are not."""

import os
import signal
import threading
from pathlib import Path

from beitforge.shards.storage.files import PARTIAL, atomic_path, sweep_partials, write_text


def partials(folder: Path) -> list[Path]:
    return list(folder.glob(f"*{PARTIAL}*"))


def test_what_is_being_written_is_not_swept(tmp_path):
    with atomic_path(tmp_path / "a") as partial:
        partial.write_text("half")
        sweep_partials(partials(tmp_path))
        assert partial.exists()
        with open(partial, "wb") as file:  # as most writers open it
            sweep_partials(partials(tmp_path))
            file.write(b"whole")
    assert (tmp_path / "a").read_text() == "whole" and not partials(tmp_path)


def test_what_a_killed_process_left_is(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with atomic_path(tmp_path / "a") as partial:
            partial.write_text("half")
            os.write(write, b"x")
            signal.pause()
    assert os.read(read, 1) == b"x"
    sweep_partials(partials(tmp_path))
    assert len(partials(tmp_path)) == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / f"of an earlier version{PARTIAL}00000000").write_text("half")
    sweep_partials(partials(tmp_path))
    assert not list(tmp_path.iterdir())
    os.close(read)
    os.close(write)


def test_many_write_while_one_sweeps(tmp_path):
    """Between the making of a partial file and its lock it may be swept: then it is made again."""
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            sweep_partials(partials(tmp_path))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for number in range(300):
            write_text(tmp_path / f"{number}", str(number))
    finally:
        done.set()
        sweeper.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(n): str(n) for n in range(300)}
