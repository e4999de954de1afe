"""The batch script of a job, written into the job's folder from a template, and submitted.

The script is the whole job: it can be read, changed, and submitted again with sbatch. Must not need torch, nor SLURM
where the script is only written.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import beitforge
from beitforge.pipeline.cluster.signals import begin
from beitforge.pipeline.config.derived import refuse_world, work_folder
from beitforge.pipeline.config.loading import load_config, to_yaml
from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.pipeline.console import program_name
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import operand, plain, shown
from beitforge.shards.storage.files import write_text

VERBS = ("pretrain", "finetune", "tokenizer", "tokenize", "pack")
_PACKAGES = Path(beitforge.__file__).absolute().parent.parent  # for PYTHONPATH: src of a checkout, or site-packages
_PROGRAM = (sys.executable, "-u", "-m", "beitforge")
_BLANK = re.compile(r"\{\{(\w+)\}\}")
_MOST = 1_000_000  # of nodes, tasks, seconds
_TICK_SECONDS = 60  # SLURM signals up to so much early


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """What is asked of SLURM. Empty or 0: not said, the cluster's default."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    time: str
    partition: str
    account: str
    array: str
    signal_seconds: int
    doctor: bool  # before a pretraining
    more: tuple[str, ...]  # sbatch options as they are

    @property
    def tasks(self) -> int:
        """On each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass(frozen=True)
class SlurmJob:
    """One job. `home`: the folder whose `slurm/` holds script and log; `run`: of a training, which can be stopped."""

    verb: str
    name: str
    home: Path
    run: Path | None
    blanks: dict[str, str]
    config: Config | None = None

    @property
    def folder(self) -> Path:
        return self.home / "slurm"


def run(words: list[str], wanted: SlurmRequest, dry_run: bool, shards_of: Callable[[list[str]], Path]) -> int:
    """Write and submit; returns the exit code. shards_of: the folder that `pack` with these words writes. Raises
    ConfigError before anything is written or submitted."""
    for word in [*words, *wanted.more]:
        plain(word, "a word of the command line")
    verb, rest = (words[0], words[1:]) if words and words[0] in VERBS else ("pretrain", words)
    _check(verb, wanted)
    if not dry_run and shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch on this machine; submit from a login node, or only write with --dry-run")
    work = _packing(rest, wanted, shards_of(rest)) if verb == "pack" else _configured(verb, rest, wanted)
    script = _write(work, wanted)
    if dry_run:
        print(f"written, not submitted: {script}\nsubmit with: sbatch {_quoted(script)}")
        return 0
    if work.run is not None:
        begin(work.run)
    done = subprocess.run(["sbatch", "--parsable", _word(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    sys.stderr.write(done.stderr)  # what the site has to say
    print(_advice(work, wanted, script, operand(done.stdout.strip().partition(";")[0], "the job's number by sbatch")))
    return 0


def _check(verb: str, wanted: SlurmRequest) -> None:
    counts = {"--nodes": wanted.nodes, "--signal-seconds": wanted.signal_seconds}
    counts |= {"--gpus-per-node": wanted.gpus_per_node or 1, "--tasks-per-node": wanted.tasks_per_node or 1}
    for option, count in {**counts, "--cpus-per-task": wanted.cpus_per_task or 1}.items():
        if not 1 <= count <= _MOST:
            raise ConfigError(f"{option} is {shown(count)}; it must be at least 1 and at most {_MOST:,}")
    for option in ("time", "partition", "account", "array"):
        operand(getattr(wanted, option), f"--{option}")
    if verb == "pack" and (wanted.nodes > 1 or wanted.tasks > 1 or wanted.array):
        raise ConfigError("pack runs as one task on one node; give it CPUs with --cpus-per-task")
    if verb in ("pretrain", "finetune", "tokenizer") and not (wanted.gpus_per_node or wanted.tasks_per_node):
        raise ConfigError("--gpus-per-node is required (one process per GPU); on CPU nodes use --tasks-per-node")
    if wanted.gpus_per_node and wanted.tasks_per_node not in (0, wanted.gpus_per_node) and verb != "tokenize":
        raise ConfigError(
            f"--tasks-per-node is {wanted.tasks_per_node} and --gpus-per-node {wanted.gpus_per_node}; there is one "
            f"process per GPU: leave --tasks-per-node out"
        )
    seconds = _seconds(wanted.time)
    if seconds and wanted.signal_seconds + _TICK_SECONDS >= seconds:
        raise ConfigError(
            f"--signal-seconds {wanted.signal_seconds} leaves nothing of --time {wanted.time}: SLURM may signal "
            f"{_TICK_SECONDS} s early; ask for more time, or for less lead with --signal-seconds"
        )


def _seconds(time: str) -> int:
    """SLURM's ways to write a time: 90, 90:00, 1:30:00, 1-2, 1-2:30, 1-2:30:00; 0 for none and for UNLIMITED."""
    if not time or time.upper() in ("UNLIMITED", "INFINITE"):
        return 0
    found = re.fullmatch(r"(?:([0-9]{1,9})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", time)
    if not found:
        raise ConfigError(
            f"--time is {shown(time)}; write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
        )
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1]:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return (first * 60 + second) * 60 + third if found[4] else first * 60 + second


def _configured(verb: str, words: list[str], wanted: SlurmRequest) -> SlurmJob:
    """A verb that takes CONFIG and settings. Raises ConfigError when they do not load or do not fit the processes."""
    if not words:
        raise ConfigError(f"slurm {verb} needs a CONFIG, a YAML file such as configs/beit_base.yaml")
    config = load_config(words[0], words[1:])
    world = wanted.nodes * wanted.tasks
    refuse_world(verb, config, world)
    home = work_folder(verb, config)
    if verb == "tokenize":
        if config.data.tokens == ONLINE:
            raise ConfigError("data.tokens is online: `pretrain` makes the tokens itself; name a folder for them")
        made = [home, *(Path(path) for path in [config.data.heldout_tokens] if path not in ("", ONLINE))]
        program = shlex.join([*_PROGRAM, "tokenize", "--rank"])
        blanks = {
            "command": f"{program} {_quoted(home / 'slurm' / 'tokenize.yaml')}",
            "made": " ".join(map(_quoted, made)),
        }
        return SlurmJob(verb, f"tokenize-{home.parent.name}", home, None, blanks, config)
    name = home.name if verb in ("pretrain", "finetune") else f"tokenizer-{home.parent.name}"
    return SlurmJob(verb, name, home, home, {"run": _quoted(home)}, config)


def _packing(words: list[str], wanted: SlurmRequest, shards: Path) -> SlurmJob:
    """`pack IMAGES SHARDS …`."""
    more = [] if "--workers" in words or not wanted.cpus_per_task else ["--workers", str(wanted.cpus_per_task)]
    program = shlex.join([*_PROGRAM, "pack", *words, *more])
    blanks = {"command": program, "made": _quoted(shards)}
    return SlurmJob("pack", f"pack-{shards.name}", shards, None, blanks)


def _write(work: SlurmJob, wanted: SlurmRequest) -> Path:
    """The batch script, and the resolved config it runs with: later changes of the file are another job's."""
    script = work.folder / f"{work.verb}.sbatch"
    config = work.folder / f"{work.verb}.yaml"
    if odd := next((character for character in "\\%" if character in str(work.folder)), ""):
        raise ConfigError(f"{work.folder} holds {odd}, by which SLURM makes another name of its log: rename the folder")
    output = f"{work.folder}/{work.verb}-{'%A_%a' if wanted.array else '%j'}.out"
    blanks = {
        "verb": work.verb,
        "made_by": f"Written by:  {program_name()} {shlex.join(sys.argv[1:])}",
        "script": _quoted(script),
        "signal_seconds": str(wanted.signal_seconds),
        "doctor": "yes" if wanted.doctor and work.verb == "pretrain" else "no",
        "name": _for_sbatch(work.name),
        "nodes": str(wanted.nodes),
        "tasks_per_node": str(wanted.tasks),
        "output": _for_sbatch(output),
        "working_folder": _for_sbatch(str(Path.cwd())),
        "more_options": "\n".join(_options(wanted)),
        "root": shlex.quote(str(_PACKAGES)),
        "python": shlex.quote(sys.executable),
        "config": _quoted(config),
        "folder": _quoted(work.folder),
        **work.blanks,
    }
    for blank, text in blanks.items():
        if blank != "more_options":  # lines, of texts that were looked at
            plain(text, _BLANKS.get(blank, f"the {blank} in the script"))
    name = "work.sbatch" if work.run is None else "training.sbatch"
    template = (resources.files("beitforge.pipeline.cluster") / "templates" / name).read_text(encoding="utf-8")
    work.folder.mkdir(parents=True, exist_ok=True)
    if work.config is not None:
        write_text(config, to_yaml(work.config))
    write_text(script, render(template, blanks))
    script.chmod(0o755)
    return script


# what a blank of a template holds, where a person would not know
_BLANKS = {
    "made_by": "the command line, or BEITFORGE_COMMAND in the environment,",
    "working_folder": "the working folder",
    "root": "the folder of the package",
    "python": "the path of Python",
}


def _quoted(path: Path) -> str:
    """A path for a shell, which no program takes for an option."""
    return shlex.quote(_word(path))


def _word(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)


def _for_sbatch(text: str) -> str:
    """A word of an #SBATCH line: sbatch knows quotes as a shell does, but a backslash escapes inside of them, too."""
    if shlex.quote(text) == text:
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def render(template: str, blanks: dict[str, str]) -> str:
    """The template with each {{name}} replaced; a KeyError is a name that nobody gives."""
    return _BLANK.sub(lambda found: blanks[found[1]], template)


def _options(wanted: SlurmRequest) -> list[str]:
    """#SBATCH lines for what was asked beyond the template's; of an option given twice sbatch takes the last."""
    given = {
        "gpus-per-node": wanted.gpus_per_node,
        "cpus-per-task": wanted.cpus_per_task,
        "time": wanted.time,
        "partition": wanted.partition,
        "account": wanted.account,
        "array": wanted.array,
    }
    lines = [f"#SBATCH --{name}={_for_sbatch(str(value))}" for name, value in given.items() if value]
    return [*lines, f"#SBATCH {' '.join(map(_for_sbatch, wanted.more))}"] if wanted.more else lines


def _advice(work: SlurmJob, wanted: SlurmRequest, script: Path, job: str) -> str:
    """What to type next."""
    log = work.folder / f"{work.verb}-{job}{'_0' if wanted.array else ''}.out"
    tasks = f"{wanted.nodes} nodes × {wanted.tasks} tasks{f', array {wanted.array}' if wanted.array else ''}"
    lines = [f"submitted job {job}: {work.verb} on {tasks}, by {script}"]
    lines += [f"  watch    squeue -j {job}; tail -F {_quoted(log)}"]
    if work.run is not None:
        lines += [f"  stop     {program_name()} stop {_quoted(work.run)}   (saves, and ends the job)"]
        lines += [f"  requeue  scancel -s USR1 {job}   (saves, and waits for its turn again)"]
    lines += [f"  cancel   scancel {job}"]
    return "\n".join(lines)
