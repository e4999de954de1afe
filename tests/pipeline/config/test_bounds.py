"""What no config is: refused in one line, at once and in little memory; and numbers that nobody can mean."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from beitforge.pipeline.cli import main
from beitforge.pipeline.config.fields import Duration, Size
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.yaml_text import read_yaml, write_yaml
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.reading import parse_json, read_regular
from tests.conftest import ROOT
from tests.pipeline.config.loading import load, refusal
from tests.pipeline.config.test_settings import FIELDS

SECONDS = 2.0  # on a machine that does other things as well; each takes a tenth
LINKS = ["deepspeed:", "  a: &a [x,x,x,x,x,x,x,x,x]"]
LINKS += [f"  {new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
MERGES = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], y{i}: 1}}" for i in range(1, 25))]
BOMBS = {
    "deep list": "deepspeed: " + "[" * 3000 + "]" * 3000,
    "deep mapping": "deepspeed: " + "{a: " * 3000 + "}" * 3000,
    "deep block": "\n".join(" " * depth + "a:" for depth in range(300)),
    "deep dashes": "a: " + "- " * 3000,
    "questions": "? " * 5000,
    "45,000 digits": "train: {global_batch: " + "9" * 45_000 + "}",
    "45,000 hex digits": "train: {global_batch: 0x" + "f" * 45_000 + "}",
    "digits to the base of 60": "train: {global_batch: " + ":".join(["59"] * 20_000) + "}",
    "aliases": "\n".join([*LINKS, "model:", "  layers: *i"]),
    "merges": "\n".join(MERGES),
    "an alias in itself": "deepspeed: &a {x: *a}",
    "an alias in a list": "deepspeed: {x: &a [*a]}",
    "a million values": "deepspeed: {x: [" + "1," * 60_000 + "]}",
    "many keys": "\n".join(f"k{number}: 1" for number in range(12_000)),
    "a long text": "x: " + "y" * 10**6,
    "a python object": "train: {run: !!python/object/apply:os.system [touch ran]}",
    "a python name": "train: {run: !!python/name:os.system }",
    "binary": "train: {run: !!binary aGVsbG8=}",
    "a set": "deepspeed: {x: !!set {a, b}}",
    "a forced number": "model: {layers: !!int x}",
    "keys that are lists": "? [a, b]\n: 1",
    "keys that are numbers": "deepspeed: {x: {1: 2}}",
    "not a number": "deepspeed: {x: .nan}",
    "infinite": "deepspeed: {x: [-.inf]}",
    "1e308 epochs": "train: {duration: 1e308 epochs}",
    "9e999 epochs": "train: {duration: 9e999 epochs}",
    "infinite epochs": "train: {duration: inf epochs}",
    "a NUL": 'train: {run: "a\\0b"}',
    "a raw NUL": "train: {run: a\0b}",
    "two documents": "a: 1\n---\nb: 2",
    "a key given twice": "train: {run: a, run: b}",
    "a key given twice, quoted": "train: {run: a, 'run': b}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    begun = time.process_time()
    line = refusal(tmp_path, BOMBS[name])
    assert time.process_time() - begun < SECONDS and len(line) < 700


@pytest.mark.parametrize("content", [b"\xff\xfe\0\0", b"train: {run: \x80}", bytes(range(256)) * 100], ids=str)
def test_what_is_no_text(tmp_path, content):
    path = tmp_path / "some.yaml"
    path.write_bytes(content[:2000])
    with pytest.raises(ConfigError):
        load_config(str(path), [])


def test_files_that_are_none(tmp_path):
    """A FIFO keeps its reader waiting, a device may never end, a sparse file is larger than memory."""
    os.mkfifo(tmp_path / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (*(tmp_path / name for name in ("fifo", "socket", "sparse", "link", "loop")), tmp_path, "/dev/zero"):
        begun = time.monotonic()
        with pytest.raises(ConfigError):
            load_config(str(path), [])
        assert time.monotonic() - begun < SECONDS, path
    listening.close()


def test_files_outside_of_a_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret").write_text("x")
    (run / "inside").write_text("y")
    (run / "out").symlink_to("../secret")
    (run / "in").symlink_to("inside")
    (run / "folder").symlink_to("..")
    assert read_regular(run / "in", within=run) == b"y" and read_regular(run / "out") == b"x"
    for name in ("out", "folder/secret", "../secret"):
        with pytest.raises(ConfigError, match="leads out of"):
            read_regular(run / name, within=run)


def test_a_bomb_takes_little_memory(tmp_path):
    """In a process of its own: the time of its imports and 300 MB, whatever the config says."""
    names = ("aliases", "merges", "deep list", "a million values", "45,000 digits", "1e308 epochs")
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(BOMBS[name])
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))\n"
    code += "from beitforge.pipeline.cli import main\n"
    code += "print([main(['plan', name, '--gpus', '8']) for name in sys.argv[1:]])"
    words = [str(tmp_path / f"{name}.yaml") for name in names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.stdout == f"{[2] * len(names)}\n", done.stderr
    assert len(done.stderr.splitlines()) == len(names)


def test_plain_scalars():
    """YAML 1.1's sexagesimal numbers, octal numbers and dates are texts, as in YAML 1.2; its words for true stay."""
    read = read_yaml(
        "[1:30, 1:30.5, 010, 0o10, 2024-01-01, 2024-01-01 10:00:00, 0x1f, 0b11, 1_000, =, 1e5, 1.5, -7, +7]"
    )
    assert read == [
        "1:30",
        "1:30.5",
        "010",
        "0o10",
        "2024-01-01",
        "2024-01-01 10:00:00",
        31,
        3,
        1000,
        "=",
        "1e5",
        1.5,
        -7,
        7,
    ]
    assert read_yaml("[yes, no, on, off, true, False, ~, null, '1', \"no\"]") == [
        *(True, False, True, False, True, False, None, None, "1", "no")
    ]
    assert read_yaml("b: &b {x: 1}\na: {<<: *b, y: 2}") == {"b": {"x": 1}, "a": {"x": 1, "y": 2}}
    for text in ("1:30", "2024-01-01", "010", "yes", "1e5", "0x1f", "null", "", "a: b", "'", "#x", "=", "1_0", "<<"):
        assert read_yaml(write_yaml({"x": text})) == yaml.safe_load(write_yaml({"x": text})) == {"x": text}


@pytest.mark.parametrize(
    "value", ["1:30", "2024-01-01", "yes", "on", "no", "~", "[1]", "{a: 1}", "0o17", "1.5", "١e", "''"]
)
def test_what_is_no_whole_number(tmp_path, value):
    assert "train.global_batch is " in refusal(tmp_path, f"train: {{global_batch: {value}}}")
    assert "train.global_batch" in refusal(tmp_path, "", f"train.global_batch={value}")


def test_a_date_is_a_name_of_a_folder(tmp_path):
    assert load(tmp_path, "train: {run: 2024-01-01}").train.run == "2024-01-01"
    assert "wandb" in refusal(tmp_path, "log: {wandb: no}")


@pytest.mark.parametrize(
    ("section", "name", "default", "rule"), FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_number_is_beyond_all_bounds(tmp_path, section, name, default, rule):
    """Products of settings, such as steps × batch, must stay numbers."""
    if isinstance(default, str | bool):
        return
    for number in ("1e308", "9e999", ".nan", ".inf", "-1e308", "9" * 5000, "1e13"):
        value = f"{number} epochs" if isinstance(default, Duration) else number
        if isinstance(default, tuple) and not isinstance(default, Size):
            value = f"[{', '.join([number] * len(default))}]"
        if number == "1e13" and (rule.at_most or rule.less_than or 0) > 1e13:
            continue
        assert len(refusal(tmp_path, "", f"{section}.{name}={value}")) < 500


@pytest.mark.parametrize(
    "words",
    [
        ["train.duration=1e12 epochs"],
        ["train.duration=1e-300 epochs"],
        ["train.global_batch=999999999999"],
        ["model.width=65536", "model.layers=1024", "model.heads=4096"],
        ["checkpoint.every=1e12 epochs", "optimizer.warmup=1e12 samples"],
        ["--images", "9" * 400],
        ["--images", "999999999999"],
        ["--days", "1e308"],
        ["--days", "1e-300"],
        ["--gpus", "9" * 5000],
        ["--stages", "²"],
        ["--assume", "straggler_cv=1e308"],
        ["--assume", "save_seconds=1e24", "--assume", "restart_seconds=1e24"],
        ["--from", "/dev/zero"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_plan_of_absurd_numbers(words, capsys):
    """Ends in a table of numbers or in one line."""
    begun = time.process_time()
    gpus = [] if "--gpus" in words else ["--gpus", "8"]
    code = main(["plan", str(ROOT / "configs/beit_base.yaml"), *gpus, *words])
    said = capsys.readouterr()
    assert time.process_time() - begun < 10 and code in (0, 2)
    assert len(said.err.splitlines()) == (code == 2) and " nan" not in said.out


def test_overrides_are_bounded(tmp_path):
    for override in (
        "deepspeed" + ".a" * 5000 + "=1",
        "deepspeed.x=" + "[" * 3000,
        "train." + "x" * 10**5 + "=1",
        "x" * 10**6,
    ):
        assert len(refusal(tmp_path, "", override)) < 1000


def test_json(tmp_path: Path):
    assert parse_json('{"a": [1, 2.5, NaN]}')["a"][0] == 1
    assert parse_json("9" * 18) == int("9" * 18) and parse_json("9" * 5000) == float("inf")
    for text in ("[" * 40 + "]" * 40, '{"a":' * 10**5, "[" * 10**5, "", "\0", "{", '{"a": 1}x'):
        with pytest.raises(ValueError):
            parse_json(text)
    assert dataclasses.is_dataclass(load(tmp_path))
