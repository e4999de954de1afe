"""Starts the processes of trainings in no time: forked from one process that has imported what they need.

`python -m tests.rank_server` reads one job a line from stdin, {"words", "environment", "folder", "stdout", "stderr"},
and runs `python -m` with these words in that folder. It answers {"started": pid}, and {"ended": pid, "code": code} when
that process has ended.
tests.ranks is its user. It must start no thread and touch no GPU: a fork would inherit neither in working order.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
from types import FrameType

# What takes longest of the ranks' imports. Not deepspeed: tests.pipeline.plan.plan_ranks changes torch before that.
PRELOADED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "beitforge.pipeline.stages.pretrain",
    "beitforge.pipeline.stages.finetune",
    "beitforge.pipeline.stages.tokenize",
)


def ignore(number: int, frame: FrameType | None) -> None:
    """Only to be woken by the signal."""


def serve() -> dict | None:
    """Start jobs until stdin ends, then return None. In a started process returns its job."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, ignore)
    alive: set[int] = set()
    while True:
        readable, _, _ = select.select([sys.stdin, woken], [], [])
        if sys.stdin in readable:
            line = sys.stdin.buffer.raw.readline()  # unbuffered, so that select sees every line
            if not line:
                break
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return json.loads(line)
            alive.add(pid)
            print(json.dumps({"started": pid}), flush=True)
        if woken in readable:
            os.read(woken, 4096)
        for pid in tuple(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.remove(pid)
                print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return None


def become(job: dict) -> None:
    """Turn this forked process into `python -m words` of the job."""
    os.setsid()
    for number, path in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    module, *arguments = job["words"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what is imported stays: collections in the started processes need not go through it
    received = serve()
    if received is not None:
        become(received)
