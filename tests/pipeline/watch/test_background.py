"""Background work of the watch server: once per request, one at a time, at low priority, ended with the server."""

import signal
import sys
from pathlib import Path

from beitforge.pipeline.watch.background import BackgroundJob
from tests.pipeline.watch.watching import lines_of, wait_for, watching, write_run

WORK = "import pathlib, sys; open(sys.argv[1], 'a').write('x'); pathlib.Path(sys.argv[2]).write_text('done')"


def ended(job: BackgroundJob) -> None:
    wait_for(lambda: not job.busy, None, 30)


def test_work_beside_is_done_once_for_each_and_one_at_a_time(tmp_path):
    job = BackgroundJob([sys.executable, "-c", WORK, str(tmp_path / "count")])
    for _ in range(3):
        job.request(8)
    ended(job)
    job.request(8)
    assert (job.result, job.error, job.changes, job.busy) == (b"done", "", 1, False)
    wait_for(lambda: job.request(12) or job.busy, None, 30)
    ended(job)
    assert (tmp_path / "count").read_text() == "xx" and job.changes == 2


def test_work_beside_that_fails_says_why(tmp_path):
    job = BackgroundJob([sys.executable, "-c", "import sys; sys.exit('no room\\nnot at all')"])
    job.request(1)
    ended(job)
    assert (job.result, job.error, job.changes) == (b"", "not at all", 1)
    job = BackgroundJob([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    job.request(1)
    ended(job)
    assert job.error == "ended with -9"


def test_work_beside_ends_with_the_server(tmp_path):
    job = BackgroundJob([sys.executable, "-c", "import time; time.sleep(600)"])
    job.stop()
    job.request(1)
    process = job._process
    assert process is not None
    job.stop()
    assert process.returncode == -signal.SIGKILL


def children(pid: int) -> dict[int, tuple[str, int]]:
    """Of a process: what each was started with, and how nice it is."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            words = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(fields[1]) == pid:
            found[int(path.name)] = (words, int(fields[16]))
    return found


def test_images_are_made_by_a_process_that_yields(tmp_path):
    """And that ends with the server, however that ends."""
    with watching(write_run(tmp_path, lines_of(20, 100))) as watch:
        watch.page()
        wait_for(lambda: 19 in [nice for _, nice in children(watch.process.pid).values()], watch.process, 30)
        ((pid, (words, _)),) = children(watch.process.pid).items()
        assert "beitforge.pipeline.reports.gallery_worker" in words
        watch.process.kill()
        watch.process.wait()
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), None, 30)
