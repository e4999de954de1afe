"""What may reach a script, a command line or an environment file: refused at every door in one line, or literal."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from beitforge.pipeline.cluster.deepspeed_launcher import _launcher_setup, _program
from beitforge.pipeline.cluster.environment import rendezvous_variables
from beitforge.pipeline.cluster.hostfile import meeting_port, processes_here, read_hostfile
from beitforge.pipeline.cluster.signals import read_ended
from beitforge.pipeline.cluster.slurm_script import _for_sbatch
from beitforge.pipeline.cluster.ssh_environment import forwarded_lines, remote_words, user_lines, without_leaks
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import address, host_name, operand, plain, shown, whole_number
from tests.conftest import ROOT
from tests.pipeline.config.loading import refusal

CONTROLS = [*map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]), "\udcff"]
AWKWARD = "a b  $HOME `date` \"quoted\" 'single' $(id) 100% %h %n back\\slash; touch x & | < > * ? ~ # ! é"


def slurm(*words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "beitforge", "slurm", *map(str, words)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run(program, cwd=folder, env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda text: f"U+{ord(text):04X}")
def test_a_control_character_is_refused_wherever_it_stands(control, tmp_path):
    """By the one function, and by what asks it."""
    for text in (control, f"a{control}", f"{control}b", f"a{control}touch x"):
        with pytest.raises(ConfigError) as caught:
            plain(text, "the partition")
        line = str(caught.value)
        assert line.startswith("the partition is ") and len(line.splitlines()) == 1
    assert "holds" in refusal(tmp_path, "", f"train.run=a{control}b")
    tree = {"data": {"images": f"a{control}b"}, "deepspeed": {"x": {f"k{control}": 1}}}
    for section in tree:
        assert "holds" in refusal(tmp_path, yaml.safe_dump({section: tree[section]}))
    with pytest.raises(ConfigError):
        forwarded_lines({"NCCL_X": f"a{control}b"}, [])
    with pytest.raises(ConfigError):
        forwarded_lines({}, [f"NCCL_X=a{control}b"])


@pytest.mark.parametrize(
    "name",
    [
        "-oProxyCommand=touch x",
        "-w",
        "a;b",
        "a b",
        "$(id)",
        "`id`",
        "a,b",
        "a[1-3]",
        "exec:a",
        "^file",
        "",
        "a@-b",
        "é",
    ],
)
def test_what_is_no_host(name, tmp_path):
    with pytest.raises(ConfigError):
        host_name(name, "a host")
    path = tmp_path / "hosts"
    path.write_text(f"n1 slots=2\n{name} slots=2\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["n1", "10.0.0.7", "node-07.cluster", "me@n1", "_x"])
def test_hosts(name):
    assert host_name(name, "a host") == name


def test_addresses():
    for text in ("n1", "10.0.0.1", "fe80::1", "fe80::1%eth0", "::1"):
        assert address(text, "x") == text
    for text in ("-x", "a;b", "a b", "$(id)", ""):
        with pytest.raises(ConfigError):
            address(text, "x")
        if text:
            meeting = {"MASTER_ADDR": text, "MASTER_PORT": "7", "RANK": "0", "WORLD_SIZE": "2"}
            with pytest.raises(ConfigError):
                rendezvous_variables(meeting)


@pytest.mark.parametrize("text", ["9" * 5000, "-1", "1e3", "٣", "²", "0x1", "1_0", "1.0", "nan", "", "99999999"])
def test_what_is_no_number_of_processes(text, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        whole_number(text, "NPROC", 1, 1000)
    assert len(str(caught.value)) < 300
    if text:
        monkeypatch.setenv("NPROC", text)
        monkeypatch.setenv("MASTER_PORT", text)
        for read in (processes_here, meeting_port, lambda: rendezvous_variables(dict.fromkeys(["WORLD_SIZE"], text))):
            with pytest.raises(ConfigError):
                read()


def test_long_values_are_cut():
    for value in ("x" * 10**6, 10**40_000, ["x" * 1000] * 5, "\n" * 10**5):
        assert len(shown(value)) < 150 and "\n" not in shown(value)


def test_an_error_is_one_line():
    """Also where it names a file with a line break in it."""
    assert str(ConfigError("a\nb\x1b[2J\u2028")) == "a\\nb\\x1b[2J\\u2028"
    done = subprocess.run(
        [sys.executable, "-m", "beitforge", "report", "no\nwhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("setting", ["data.images", "data.tokens", "train.run", "train.init", "data.tokenizer"])
def test_a_folder_is_no_option(setting, tmp_path):
    """`find -delete …` stood in a script."""
    assert "write ./-delete" in refusal(tmp_path, "", f"{setting}=-delete")


# --- job scripts ---


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({"train": {"run": "run", "precision": "fp32"}}))
    return path


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["train.run=a\ntouch ran; #"], {}),
        (["train.run=a\rb"], {}),
        (["--partition", "gpu\ntouch ran"], {}),
        (["--account", "a\u2028b"], {}),
        (["--account=-x"], {}),
        (["--array", "0-1\n#"], {}),
        (["--time", "1:00\ntouch ran"], {}),
        (["--", "--qos", "a\ntouch ran"], {}),
        ([], {"BEITFORGE_COMMAND": "x\ntouch ran\n#"}),
        (["data.images=a\x85b"], {}),
        (["train.run=back\\slash"], {}),
        (["train.run=100%j"], {}),
        (["--nodes", "9" * 4000], {}),
    ],
    ids=lambda value: " ".join(value)[:20].encode("unicode_escape").decode() if isinstance(value, list) else "",
)
def test_nothing_planted_reaches_a_script(tmp_path, config, words, environment):
    """One line, exit code 2, and nothing is written."""
    done = slurm(config, "--tasks-per-node", 1, "--dry-run", *words, folder=tmp_path, **environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["some.yaml"]


def test_a_working_folder_with_a_line_break(tmp_path, config):
    folder = tmp_path / "a\ntouch ran\n#"
    folder.mkdir()
    done = slurm(config, "--tasks-per-node", 1, "--dry-run", folder=folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "the working folder" in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "x"', "$HOME", "`touch ran`", "$(touch ran)", "a;touch ran", "a&b"]
)
@pytest.mark.parametrize("verb", ["pretrain", "tokenize"])
def test_a_script_takes_names_literally(tmp_path, config, verb, name):
    """The script is really run, with a srun that says what it was given."""
    work = tmp_path / "work"
    (work / "bin").mkdir(parents=True)
    for program in ("srun", "scontrol"):
        path = work / "bin" / program
        path.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >>{shlex.quote(str(tmp_path))}/said\n')
        path.chmod(0o755)
    place = f"train.run=-run {name}" if verb == "pretrain" else f"data.tokens=./-tokens {name}"
    place = place.replace("=-", "=./-")
    done = slurm(
        verb, config, place, "--tasks-per-node", 1, "--dry-run", "--no-doctor", "--", "--qos", name, folder=work
    )
    assert done.returncode == 0, done.stderr
    (script,) = work.glob("*/slurm/*.sbatch")
    environment = {**os.environ, "PATH": f"{work}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NODELIST": "n1", "HOME": str(tmp_path)}
    ran = subprocess.run(["bash", str(script)], cwd=work, env=environment, capture_output=True, text=True, check=False)
    said = (tmp_path / "said").read_text().split("\0")
    assert said[-2] == f"./{script.with_suffix('.yaml').relative_to(work)}", ran.stderr
    assert "ran" not in {path.name for path in work.rglob("*")}
    assert ran.stderr == ""


def test_sbatch_reads_its_lines_by_rules_of_its_own():
    """A backslash escapes inside of quotes, too: as in get_argument of SLURM's src/sbatch/opt.c."""

    def read(line: str) -> list[str]:
        found, quote, escaped, word, inside = [], "", False, "", False
        for character in line:
            if escaped:
                word, escaped = word + character, False
            elif character == "\\":
                escaped = inside = True
            elif quote:
                quote, word = ("", word) if character == quote else (quote, word + character)
            elif character in "'\"":
                quote, inside = character, True
            elif character.isspace():
                found, word, inside = ([*found, word], "", False) if inside else (found, word, inside)
            elif character == "#":
                break
            else:
                word, inside = word + character, True
        return [*found, word] if inside else found

    words = ["plain", "a b", "it's", 'say "x"', "back\\slash", "#5", "a#b", "$HOME `x`", "'", "\\", AWKWARD]
    assert read(" ".join(map(_for_sbatch, words))) == words


# --- over ssh ---


def over_ssh(words: list[str]) -> list[str]:
    """What a program sees of words that DeepSpeed's PDSHRunner, pdsh and a shell have had."""
    passed = ['"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in words]
    line = " ".join(["printf", "'%%s\\0'", *passed]).replace("%%", "\0").replace("%h", "HOST").replace("%n", "7")
    line = line.replace("\0s", "%s").replace("\0", "%")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "word",
    [
        AWKWARD,
        "it's",
        "a'; touch /tmp/x; '",
        "$(id)",
        "`id`",
        "train.run=a b",
        'a "b" \\c',
        "~",
        "*",
        "",
        "a;b",
        "100%h",
        "\\",
    ],
)
def test_words_arrive_over_ssh_as_they_are(word):
    assert over_ssh(remote_words([word, "x"])) == [word, "x"]
    assert _program("pretrain", ["c.yaml", "a.b=it's"], {"n1": 1})[-1] == """'a.b=it'"'"'s'"""
    assert _program("pretrain", ["c.yaml", "a.b=it's"], {})[-1] == "a.b=it's"


@pytest.mark.parametrize("value", [AWKWARD, "$(touch x)", "`id`", 'a"b', "\\", "a b", "x$y"])
def test_values_of_the_environment_arrive_as_they_are(value):
    """Also the user's own lines: a folder that was received may hold a .deepspeed_env."""
    for lines in (forwarded_lines({"NCCL_X": value}, []), forwarded_lines({}, [f"NCCL_X={value}"])):
        name, _, text = lines[0].partition("=")
        quoted = f'"{text}"' if any(c not in "abcxy" for c in text) else text  # as DeepSpeed's add_export does
        line = f'export {name}={quoted}; printf "%s" "$NCCL_X"'.replace("%%", "%")
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd="/")
        assert done.stdout == value


def test_what_deepspeed_would_take_along_by_itself():
    """Names and secrets that it puts on command lines unquoted."""
    environment = {
        "PYTHON;touch x": "1",
        "MLFLOW_TRACKING_TOKEN": "s",
        "NCCL_DEBUG": "INFO",
        "HOME": "/",
        "MV2_A": "$(id)",
    }
    assert without_leaks(environment) == {"NCCL_DEBUG": "INFO", "HOME": "/", "MV2_A": "$(id)"}
    assert forwarded_lines(environment, [])[0] == "MV2_A=\\$(id)"


def test_a_folder_that_deepspeed_would_not_quote(tmp_path, monkeypatch):
    folder = tmp_path / "a; touch x"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="the working folder is"):
        _launcher_setup({"n1": 1})


def test_odd_files_of_variables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    os.mkfifo(tmp_path / ".deepspeed_env")
    with pytest.raises(ConfigError, match="FIFO"):
        user_lines({})
    with pytest.raises(ConfigError, match="FIFO"):
        read_hostfile(str(tmp_path / ".deepspeed_env"))
    (tmp_path / "hosts").write_bytes(b"n1 slots=1\xff\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(str(tmp_path / "hosts"))
    for text in (
        "n1 slots=" + "9" * 5000,
        "n1\x0bslots=1",
        "n1 slots=1\x00",
        "n1 slots=1\u2028n2 slots=1",
        "x" * 10**6,
    ):
        (tmp_path / "hosts").write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_hostfile(str(tmp_path / "hosts"))
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


def test_the_last_word_of_a_run_is_a_word(tmp_path):
    for text in ("9" * 5000 + " finished", "5 fin\x1b[2Jished", "-1 x", "a b", "x" * 10**6):
        (tmp_path / "ended").write_text(text)
        assert read_ended(tmp_path) is None
    (tmp_path / "ended").write_text("5 stop file\n")
    assert read_ended(tmp_path) == (5, "stop file")


def test_operands():
    assert operand("a", "x") == "a"
    with pytest.raises(ConfigError, match="option"):
        operand("--config", "CONFIG")
