"""`slurm` writes what it should and refuses what cannot be, without SLURM; tests/cluster runs it under a real one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from beitforge.pipeline.cli import parse_arguments
from beitforge.pipeline.cluster.slurm_script import _seconds, render
from beitforge.pipeline.config.loading import load_config
from tests.conftest import ROOT
from tests.pipeline.commands.test_help import HEAVY, command, imported, said


def slurm(*words: object, folder: Path) -> subprocess.CompletedProcess:
    """`python -m beitforge slurm … --dry-run` in a folder, as ./launch.sh calls it."""
    program = [sys.executable, "-m", "beitforge", "slurm", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "some.yaml"
    tree = {"train": {"run": "runs/some run", "precision": "fp32"}, "data": {"tokens": "data/tokens"}}
    tree["data"] |= {"heldout_images": "data/test", "heldout_tokens": "data/tokens test"}
    path.write_text(yaml.safe_dump(tree))
    return path


def options(script: Path) -> list[str]:
    """Its #SBATCH lines, as sbatch reads them: until the first line that is no comment."""
    found = []
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH "):
            found += shlex.split(line.removeprefix("#SBATCH "))
        elif line and not line.startswith("#"):
            break
    return found


def test_the_script_of_a_training(tmp_path, config):
    """Every option where sbatch reads it, the user's own last; the resolved config beside it; bash can parse it."""
    words = [config, "--nodes", 4, "train.zero_stage=3", "--gpus-per-node", 8, "--cpus-per-task", 12, "--time", "1-0"]
    words += [
        "--partition",
        "gpu",
        "--account",
        "us",
        "--signal-seconds",
        300,
        "--dry-run",
        "--",
        "--qos",
        "a b",
        "-x",
        "n7",
    ]
    done = slurm(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "runs" / "some run" / "slurm" / "pretrain.sbatch"
    assert "not submitted" in done.stdout
    assert shlex.quote(str(script.relative_to(tmp_path))) in done.stdout
    assert options(script) == [
        "--job-name=some run",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output=runs/some run/slurm/pretrain-%j.out",
        f"--chdir={tmp_path}",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--time=1-0",
        "--partition=gpu",
        "--account=us",
        *("--qos", "a b", "-x", "n7"),
    ]
    text = script.read_text()
    assert "{{" not in text
    assert f"{sys.executable} -u -m beitforge pretrain --rank 'runs/some run/slurm/pretrain.yaml'" in text
    assert f"export PYTHONPATH={ROOT}/src" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert load_config(str(script.with_suffix(".yaml")), []) == load_config(str(config), ["train.zero_stage=3"])


def test_every_task_is_python_itself(tmp_path, config):
    """Where SLURM tracks by cgroup a signal reaches what srun started: bash must have become python, signals kept."""
    slurm(config, "--gpus-per-node", 1, "--dry-run", folder=tmp_path)
    text = (tmp_path / "runs" / "some run" / "slurm" / "pretrain.sbatch").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^srun .*$", text, re.MULTILINE)
    shell = """srun() { while [ "$1" != bash ]; do shift; done; exec "$@"; }\n"""
    show = "import signal, os; print([signal.getsignal(n) == signal.SIG_IGN for n in (10, 15)], os.getppid())"
    line = re.sub(r"task\s+\S+ -u -m .*$", f"task {shlex.join([sys.executable, '-c', show])}", line)
    done = subprocess.run(["bash", "-c", shell + line], capture_output=True, text=True, check=True)
    assert done.stdout.split("] ")[0] == "[True, True"
    assert done.stdout.split("] ")[1].strip() == str(os.getpid())


def test_the_script_of_tokenize(tmp_path, config):
    done = slurm("tokenize", config, "--array", "0-7%4", "--gpus-per-node", 1, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "data" / "tokens" / "slurm" / "tokenize.sbatch"
    assert {"--array=0-7%4", "--signal=B:USR1@120", "--output=data/tokens/slurm/tokenize-%A_%a.out"} <= set(
        options(script)
    )
    text = script.read_text()
    assert f"{sys.executable} -u -m beitforge tokenize --rank data/tokens/slurm/tokenize.yaml" in text
    assert "find data/tokens 'data/tokens test' -name" in text
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_script_of_finetune(tmp_path, config):
    """A training like pretrain's, in its own run folder, without the doctor, which looks at a pretraining."""
    done = slurm("finetune", config, "finetune.run=runs/tuned", "--gpus-per-node", 8, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "runs" / "tuned" / "slurm" / "finetune.sbatch"
    assert {"--job-name=tuned", "--ntasks-per-node=8"} <= set(options(script))
    assert f"{sys.executable} -u -m beitforge finetune --rank runs/tuned/slurm/finetune.yaml" in script.read_text()
    refused = slurm("finetune", config, "finetune.global_batch=12", "--gpus-per-node", 8, "--dry-run", folder=tmp_path)
    assert refused.returncode == 2 and "finetune.global_batch 12" in refused.stderr
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_script_of_pack(tmp_path):
    """Its own options go through, wherever they stand, and --workers follows the CPUs."""
    (tmp_path / "my images").mkdir()
    words = ["pack", "my images", "shards", "--split", "heldout=0.1", "--cpus-per-task", 16, "--short-side", 320]
    done = slurm(*words, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "shards" / "slurm" / "pack.sbatch"
    pack = "-m beitforge pack 'my images' shards --split heldout=0.1 --short-side 320 --workers 16"
    assert pack in script.read_text()
    assert {"--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=16"} <= set(options(script))
    subprocess.run(["bash", "-n", str(script)], check=True)


def batch(
    tmp_path: Path, config: Path, ended: str, code: int = 0, seconds: float = 60, doctor: int | None = None
) -> tuple[int, str]:
    """Exit code and output of the script of a training whose ranks end with `code` and the word `ended`, after a
    doctor that ends with its code, if there is one.

    srun and scontrol are stand-ins: a requeue kills the script, as SLURM would.
    """
    script = tmp_path / "runs" / "some run" / "slurm" / "pretrain.sbatch"
    if not script.exists():
        slurm(config, "--gpus-per-node", 1, "--dry-run", folder=tmp_path)
    word = f"echo '{ended}' >'runs/some run/ended'; " if ended else ""
    word = f'echo "srun $*"; case "$*" in *" doctor "*) exit {doctor} ;; esac; {word}'
    for name, does in (("srun", f"{word}exit {code}"), ("scontrol", 'echo "scontrol $*"; kill -KILL $PPID')):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{does}\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment["SLURM_JOB_NODELIST"] = "n1"
    environment |= {"DOCTOR": "no"} if doctor is None else {}
    done = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return done.returncode, done.stdout


def test_requeues_are_bounded_by_progress(tmp_path, config):
    """SIGUSR1 puts the job back in the queue as long as it gets further; a job too short for a step ends."""
    for step in (5, 9):
        code, output = batch(tmp_path, config, f"{step} SIGUSR1")
        assert (code, "scontrol requeue 7" in output) == (-9, True), output
    code, output = batch(tmp_path, config, "9 SIGUSR1", 143)
    assert (code, "scontrol" in output) == (1, False), output
    assert "no step further than at the last requeue" in output


@pytest.mark.parametrize(
    ("ended", "code", "expected"),
    [
        ("24 finished", 143, 0),  # what srun answers when one rank ends before the others
        ("9 stop file", 143, 0),
        ("", 2, 2),
        ("", 0, 1),
    ],
    ids=str,
)
def test_a_job_is_judged_by_the_word_of_its_run(tmp_path, config, ended, code, expected):
    found, output = batch(tmp_path, config, ended, code)
    assert found == expected, output
    assert "scontrol" not in output


@pytest.mark.parametrize(("doctor", "expected"), [(0, 0), (1, 0), (2, 2), (137, 137)])
def test_the_doctor_comes_first(tmp_path, config, doctor, expected):
    """What must stop the job stops it before a rank of the training is started; warnings do not."""
    code, output = batch(tmp_path, config, "24 finished", doctor=doctor)
    started = [line for line in output.splitlines() if line.startswith("srun ")]
    assert code == expected, output
    assert "-m beitforge doctor --rank" in started[0]
    assert ("-m beitforge pretrain --rank" in started[-1]) == (doctor < 2)
    assert ("doctor ended with" in output) == (doctor > 1)


def test_no_doctor(tmp_path, config):
    """By the option, and for verbs it does not know."""
    for words in ((config, "--no-doctor"), ("tokenizer", config)):
        done = slurm(*words, "--tasks-per-node", 2, "--dry-run", folder=tmp_path)
        assert done.returncode == 0, done.stderr
    for script in (tmp_path / "runs/some run/slurm/pretrain.sbatch", tmp_path.glob("data/**/tokenizer.sbatch")):
        (path,) = [script] if isinstance(script, Path) else script
        assert 'if [ "${DOCTOR:-no}" = yes ]' in path.read_text()


def test_after_sigterm_the_script_waits_for_slurm(tmp_path, config):
    """Ending first would turn a preemption into an ordinary end; requeueing would undo a scancel."""
    with pytest.raises(subprocess.TimeoutExpired) as waiting:
        batch(tmp_path, config, "9 SIGTERM", seconds=3)
    assert b"SIGTERM at step 9" in (waiting.value.stdout or b"")
    assert b"scontrol" not in (waiting.value.stdout or b"")


def test_a_tokenizers_script_lies_with_its_training(tmp_path, config):
    done = slurm("tokenizer", config, "--tasks-per-node", 2, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "tokenizer" / "training" / "slurm" / "tokenizer.sbatch").exists()


REFUSALS = [
    (["{}", "--nodes", "0", "--gpus-per-node", "8"], "--nodes is 0"),
    (["{}", "--nodes", "2", "--gpus-per-node", "-1"], "--gpus-per-node is -1"),
    (["{}", "--nodes", "2"], "--gpus-per-node is required (one process per GPU)"),
    (["{}", "--gpus-per-node", "8", "--tasks-per-node", "4"], "one process per GPU"),
    (["{}", "--nodes", "3", "--gpus-per-node", "7"], "train.global_batch 2048 does not divide over 21"),
    (["tokenizer", "{}", "--nodes", "3", "--gpus-per-node", "7"], "tokenizer.global_batch 512"),
    (["{}", "--gpus-per-node", "8", "--time", "2"], "--signal-seconds 120 leaves nothing of --time 2"),
    (["{}", "--gpus-per-node", "8", "--time", "soon"], "--time is 'soon'"),
    (["{}", "train.zero_stag=2", "--gpus-per-node", "8"], "did you mean zero_stage?"),
    (["nowhere.yaml", "--gpus-per-node", "8"], "nowhere.yaml does not exist"),
    (["--gpus-per-node", "8"], "needs a CONFIG"),
    (["tokenize", "{}", "data.tokens=online"], "data.tokens is online"),
    (["pack", "a", "b", "--nodes", "2"], "one task on one node"),
    (["pack", "nowhere", "shards"], "nowhere is not a folder; give the folder that holds the images"),
    (["pack", "some.yaml", "shards"], "some.yaml is not a folder"),
    (["pack", ".", "shards", "--split", "heldout"], "--split is 'heldout', it must be NAME=FRACTION"),
    (["pack", ".", "shards", "--quality", "0"], "--quality is 0"),
    (["pack", ".", "."], "lie inside the shard folder"),
    (["pack", ".", "some.yaml"], "some.yaml is a file; give a folder for the shard set"),
    (["pack", ".", "s3://bucket/set"], "is a URL"),
]


@pytest.mark.parametrize(
    ("words", "expected"), REFUSALS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_cannot_be_is_one_line(tmp_path, config, words, expected):
    """Exit code 2 and nothing written."""
    done = slurm(*(word.replace("{}", str(config)) for word in words), "--dry-run", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert [path.name for path in tmp_path.iterdir()] == ["some.yaml"]


def test_without_sbatch_it_says_so(tmp_path, config, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = slurm(config, "--gpus-per-node", "8", folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no sbatch on this machine" in done.stderr


@pytest.mark.parametrize("words", [["--gpu", "8"], ["--workers", "3"], ["pack", "a", "b", "--split-it"]])
def test_unknown_options(tmp_path, config, words):
    """Usage and exit code 2; options are never abbreviated, since pack has its own."""
    done = slurm(*words, *([] if "pack" in words else [config]), "--dry-run", folder=tmp_path)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_times():
    """As sbatch's manual lists them."""
    minutes = {
        "90": 90,
        "90:30": 90.5,
        "1:30:00": 90,
        "1-2": 26 * 60,
        "1-2:30": 26.5 * 60,
        "1-2:30:30": 26.5 * 60 + 0.5,
    }
    assert {text: _seconds(text) for text in minutes} == {text: value * 60 for text, value in minutes.items()}
    assert _seconds("") == _seconds("UNLIMITED") == 0


def test_a_blank_that_nobody_fills():
    assert render("a {{b}} ${c} {d}", {"b": "B"}) == "a B ${c} {d}"
    with pytest.raises(KeyError):
        render("{{e}}", {"b": "B"})


@pytest.mark.parametrize("verb", ["slurm", "stop"])
def test_help_is_instant(verb):
    result = command("beitforge", verb, "--help")
    assert result.returncode == 0
    assert said(result) == []
    assert not imported(result) & {*HEAVY, "numpy"}


def stop(folder: Path) -> subprocess.CompletedProcess:
    return command("beitforge", "stop", str(folder))


def test_stop(tmp_path):
    """No run: refused. A run, or a tokenizer's folder: the file is there. A finished one: says so."""
    result = stop(tmp_path)
    assert result.returncode == 2
    assert "holds no run" in said(result)[0]
    for folder in (tmp_path / "run", tmp_path / "tokenizer" / "training"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    result = stop(tmp_path / "run")
    assert result.returncode == 0
    assert (tmp_path / "run" / "stop").exists()
    assert not imported(result) & {*HEAVY, "numpy"}
    assert stop(tmp_path / "tokenizer").returncode == 0
    assert (tmp_path / "tokenizer" / "training" / "stop").exists()


def test_nothing_to_stop(tmp_path):
    """By the run's last word, or by the checkpoint of its last step."""
    for name in ("ended", "saved"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").touch()
    (tmp_path / "ended" / "ended").write_text("24 finished\n")
    (tmp_path / "saved" / "metrics.jsonl").write_text('{"step": 0, "kind": "start", "steps": 24}\n{"step": 24, "ki')
    (tmp_path / "saved" / "checkpoints" / "step-24").mkdir(parents=True)
    assert stop(tmp_path / "saved").returncode == 0
    assert (tmp_path / "saved" / "stop").exists(), "without state.json it is not saved"
    (tmp_path / "saved" / "stop").unlink()
    (tmp_path / "saved" / "checkpoints" / "step-24" / "state.json").touch()
    for name in ("ended", "saved"):
        result = stop(tmp_path / name)
        assert result.returncode == 0
        assert "is finished" in result.stdout
        assert not (tmp_path / name / "stop").exists()


@pytest.mark.parametrize(
    ("words", "job", "more"),
    [
        ("pack IN OUT --workers 3 -- --mem=1", "pack IN OUT --workers 3", ("--mem=1",)),
        ("pack --workers 3 IN OUT --time 1:00 --quality 90", "pack --workers 3 IN OUT --quality 90", ()),
        ("--dry-run pack IN OUT --force-jpeg", "pack IN OUT --force-jpeg", ()),
        ("pack IN OUT -- -- x", "pack IN OUT", ("--", "x")),
        ("--nodes 2 some.yaml a.b=c --dry-run", "some.yaml a.b=c", ()),
        ("--partition pack c.yaml --gpus-per-node 2", "c.yaml", ()),
    ],
)
def test_words_in_any_order(words, job, more):
    """Options of slurm may stand anywhere before --; what `pack` takes is left to it in its order."""
    arguments = parse_arguments(["slurm", *words.split()])
    assert arguments.words == job.split()
    assert arguments.more == more


@pytest.mark.parametrize("words", ["some.yaml --workers 3", "--partition pack c.yaml --workers 3"])
def test_only_pack_takes_options_of_its_own(words):
    with pytest.raises(SystemExit):
        parse_arguments(["slurm", *words.split()])
