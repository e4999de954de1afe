"""DeepSpeed's launcher as a child process: started here or over ssh to many hosts, asked to stop, and seen to its end.

Must not know torch, shards or any verb.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from beitforge.pipeline.cluster.compiled_code import EXTENSIONS
from beitforge.pipeline.cluster.hostfile import meeting_port, num_gpus, processes_here
from beitforge.pipeline.cluster.signals import EXIT_STOPPED, FINISHED, ORPHAN_SECONDS, STOP_FILE, begin, read_ended
from beitforge.pipeline.cluster.ssh_environment import forwarded_lines, remote_words, user_lines, without_leaks
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import address, operand, shown

_OPTIONS = (
    "--seconds",
    "--step",
    "--from",
    "--to",
    "--page",
    "--json",
    "--by-number",
)  # of our own commands, behind the user's words
_UNQUOTED = re.compile(r"[\w@+=:,./-]+")
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl
_TOGETHER_SECONDS = (
    20.0  # all hosts of a training end within this; where one ended alone, the others wait for it forever
)
_ENDING_SECONDS = ORPHAN_SECONDS + 10  # for processes whose launcher was killed
_LAST_WORD_SECONDS = 5.0  # from a process's last word to its end
_SAME_REQUEST_SECONDS = 0.5
_POLL_SECONDS = 0.2
# A host that vanishes sends nothing: its ssh must notice, in half a minute, or the launcher waits for it for hours.
_SSH_KEEPALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"


def run(verb: str, words: list[str], folder: Path, finished: Callable[[], bool] | None, hosts: dict[str, int]) -> int:
    """Start `python -m beitforge VERB --rank WORDS…` on all hosts ({}: on this machine) and see it to its end; the exit
    code.

    `folder`: of the run, which says how it ended; where `finished` is given, that says whether the work is done, and
    nothing needs to be saved when it is stopped. Raises ConfigError for hosts that cannot be used.
    """
    environment, kept, options = _launcher_setup(hosts)
    if finished is None:
        begin(folder)
    watch = _Launcher(folder, len(hosts), saves=finished is None)
    code = _watched(watch, _program(verb, words, hosts), environment, kept, options)
    return _exit_code(code, watch, folder, finished)


def listen(
    verb: str, words: list[str], folder: Path, hosts: dict[str, int], said: Callable[[str], bool], seconds: float
) -> list[int]:
    """Start the processes of a verb that saves nothing, give `said` every line they print, and end them all when it
    answers that this was the last, or after `seconds`. Returns the signals that this process got meanwhile. Raises
    ConfigError for hosts that cannot be used."""
    watch = _Launcher(folder, len(hosts), saves=False, said=said, until=time.monotonic() + seconds)
    environment, kept, options = _launcher_setup(hosts)
    _watched(watch, _program(verb, words, hosts), environment, kept, options)
    if watch.reader is not None:
        watch.reader.join(_LAST_WORD_SECONDS)
    return watch.asked


def _program(verb: str, words: list[str], hosts: dict[str, int]) -> list[str]:
    """What follows the module: over ssh it goes through shells, which must not see what words hold."""
    others = [word if word in _OPTIONS else operand(word, "an override") for word in words[1:]]
    words = [operand(words[0], "CONFIG"), *others]
    return [verb, "--rank", *(remote_words(words) if hosts else words)]


def _launcher_setup(hosts: dict[str, int]) -> tuple[dict[str, str], tuple[int, ...], list[str]]:
    """Environment, open files and options of DeepSpeed's launcher."""
    environment = {**os.environ, "DS_SKIP_CUDA_CHECK": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # the launcher's own processes: a folder `kernels` where they are started hides no package (from Python 3.11 on)
    environment.setdefault("PYTHONSAFEPATH", "1")
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    port = str(meeting_port())
    # operators that a `deepspeed:` section may ask for are compiled on first use; a kill meanwhile leaves a lock there
    extensions = Path(tempfile.gettempdir()) / f"{EXTENSIONS}{os.getpid()}-{port}"
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    options = ["--log_level", "critical", "--no_local_rank", "--master_port", port]
    kept: tuple[int, ...] = ()
    if hosts:
        for what, path in (("the working folder", os.getcwd()), ("the path of Python", sys.executable)):
            if not _UNQUOTED.fullmatch(path):
                raise ConfigError(
                    f"{what} is {shown(path)}: over ssh DeepSpeed's launcher takes letters, digits and @+=:,./_- "
                    f"alone; use another"
                )
        given = environment.get("MASTER_ADDR")
        meeting = address(given, "MASTER_ADDR in the environment") if given else _address(next(iter(hosts)))
        options += ["--hostfile", os.environ["HOSTFILE"], "--force_multi", "--no_ssh_check", "--master_addr", meeting]
        environment = without_leaks(environment)
        environment["PDSH_SSH_ARGS_APPEND"] = f"{_SSH_KEEPALIVE} {environment.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
        kept = (_carried(environment),)
        environment["DS_ENV_FILE"] = f"/proc/self/fd/{kept[0]}"
    else:
        options += ["--num_gpus", str(processes_here())]
        if not num_gpus() and not Path("/dev/kfd").exists():  # AMD's
            environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment, kept, options


def _watched(
    watch: "_Launcher", words: list[str], environment: dict[str, str], kept: tuple[int, ...], options: list[str]
) -> int:
    """Start the launcher and see it to its end; its exit code."""
    command = [sys.executable, "-W", "ignore", "-m", "deepspeed.launcher.runner", *options, "--module", "beitforge"]
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # processes that lose their launcher become ours, to wait for
    watch.install()
    watch.start([*command, *words], environment, kept)
    return watch.wait()


def _exit_code(code: int, watch: "_Launcher", folder: Path, finished: Callable[[], bool] | None) -> int:
    """What the work says of its end comes before what the launcher answers."""
    ended = read_ended(folder) if finished is None else None
    if ended is not None:
        return 0 if ended[1] == FINISHED else EXIT_STOPPED
    if code == 0 and finished is not None and finished():
        return 0
    if watch.asked:
        return EXIT_STOPPED if finished is not None else 128 + watch.asked[-1]
    if code <= 0:
        print("the launcher ended before its work did; start it again to go on", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code or 1


def _address(host: str) -> str:
    """The first address of a host, asked over ssh: also the test that it can be reached without a password."""
    if shutil.which("pdsh") is None:
        raise ConfigError("HOSTFILE needs pdsh on this machine (Debian: apt-get install pdsh); or start under SLURM")
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", host, "hostname", "-I"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode or not done.stdout.split():
        reason = " ".join(done.stderr.split()) or f"`hostname -I` gives {done.stdout.strip()!r}"
        raise ConfigError(f"HOSTFILE: {host} cannot be used over ssh without a password: {reason}; or set MASTER_ADDR")
    return address(done.stdout.split()[0], f"the first address of {host}, by its `hostname -I`,")


def _carried(environment: dict[str, str]) -> int:
    """A file in memory for DeepSpeed to read, by its descriptor."""
    descriptor = os.memfd_create("deepspeed_env", 0)
    os.write(
        descriptor, "".join(f"{line}\n" for line in forwarded_lines(environment, user_lines(environment))).encode()
    )
    return descriptor


@dataclass
class _Launcher:
    """The launcher's process, and what has been asked of it. `hosts`: how many it reaches over ssh; 0: it is here.

    said: given each line of its output; its answer True, or time.monotonic() beyond `until`, ends everything.
    """

    folder: Path
    hosts: int
    saves: bool
    said: Callable[[str], bool] | None = None
    until: float = float("inf")
    reader: threading.Thread | None = None
    asked: list[int] = field(default_factory=list)
    launcher: int = 0
    _asked_at: float = 0.0
    _told: set[int] = field(default_factory=set)
    _apart_since: float = float("inf")
    _connected: bool = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self.asked or now - self._asked_at > _SAME_REQUEST_SECONDS:
            self.asked.append(number)
            self._asked_at = now

    def start(self, command: list[str], environment: dict[str, str], kept: tuple[int, ...]) -> None:
        """In a session of its own: Ctrl-C in the terminal is for us. It ends with us, whatever ends us."""
        us = os.getpid()

        def before() -> None:
            ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != us:
                os._exit(1)

        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=kept,
            start_new_session=True,
            preexec_fn=before,
            stdout=None if self.said is None else subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.launcher = process.pid
        if process.stdout is not None:
            self.reader = threading.Thread(target=self._listen, args=(process.stdout,), daemon=True)
            self.reader.start()

    def _listen(self, lines: Iterable[str]) -> None:
        assert self.said is not None, "read only where somebody listens"
        for line in lines:
            if self.said(line.rstrip("\n")):
                self.until = min(self.until, time.monotonic() + _LAST_WORD_SECONDS)

    def wait(self) -> int:
        """The launcher's exit code, negative for a signal, once everything it started here is gone."""
        code, over, acted = None, float("inf"), 0
        while True:
            code = self._reap(code)
            if code is not None and not _descendants():
                return code
            if code is not None and over == float("inf"):
                # what is left of a launcher over ssh are connections; here, ranks that have noticed and save
                over = time.monotonic() + (0.0 if self.hosts or not self.saves else _ENDING_SECONDS)
            if time.monotonic() > self.until:
                self.until, over = float("inf"), time.monotonic() + _LAST_WORD_SECONDS
                self._end()
            if time.monotonic() > over or len(self.asked) > 2:
                _signal(_descendants(), signal.SIGKILL)
            asked = len(self.asked)  # what is asked from here on is for the next turn
            if asked and (acted < asked or not self.hosts):
                self._act(acted < asked)
                acted = asked
            if self.hosts and self.saves and code is None:
                self._end_what_is_left()
            time.sleep(_POLL_SECONDS)

    def _act(self, new: bool) -> None:
        """Asked once: save and end. Asked twice: end."""
        if not self.saves or len(self.asked) > 1:
            if new:
                self._end()
            return
        if new:
            print("asked to stop: finishing the step and saving; once more to end at once", file=sys.stderr, flush=True)
        if self.hosts:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / STOP_FILE).touch()
            return
        for rank in _children(_children([self.launcher])):
            if rank not in self._told and _listens(rank):
                self._told.add(rank)
                _signal([rank], self.asked[0])

    def _end(self) -> None:
        """Over ssh DeepSpeed's launcher must live to end the others; it gives them 30 s."""
        if self.hosts:
            _signal([self.launcher], signal.SIGTERM)
        else:
            _signal(_descendants(), signal.SIGKILL if self.saves else signal.SIGTERM)

    def _end_what_is_left(self) -> None:
        """One host's connection is gone and the others' are not: its processes died, or all of it has vanished.

        pdsh waits for the others, which may be waiting in a collective for what is gone: ten minutes by its time limit.
        """
        connections = len(_children(_children([self.launcher])))
        now = time.monotonic()
        self._connected = self._connected or connections == self.hosts
        if not self._connected or connections in (0, self.hosts):
            self._apart_since = float("inf")
            return
        self._apart_since = min(self._apart_since, now)
        if now - self._apart_since > _TOGETHER_SECONDS:
            lost = self.hosts - connections
            print(f"{lost} of {self.hosts} hosts ended alone: ending the others", file=sys.stderr, flush=True)
            self._connected = False
            self._end()

    def _reap(self, code: int | None) -> int | None:
        """Wait for whatever has ended; the launcher's exit code once it is among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code
            if not pid:
                return code
            if pid == self.launcher:
                code = os.waitstatus_to_exitcode(status)


def _children(parents: list[int]) -> list[int]:
    """Ids of the living processes that `parents` have started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if fields and fields[0] != "Z" and int(fields[1]) in parents:
            found.append(int(path.parent.name))
    return found


def _descendants() -> list[int]:
    """All processes below this one, those whose own parents are gone among them: pdsh gives each ssh a session."""
    found: list[int] = []
    generation = [os.getpid()]
    while generation := _children(generation):
        found += generation
    return found


def _signal(processes: list[int], number: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _listens(pid: int) -> bool:
    """Whether a process has taken over SIGTERM; before that a signal would end it without a save."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
