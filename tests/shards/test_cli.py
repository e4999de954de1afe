"""The verbs of shards: every user's error is one line and exit code 2; help is instant; no torch needed."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from beitforge.pipeline.cli import main
from beitforge.shards.format.manifest import read_image_manifest
from tests.shards.made_images import encoded, jpeg, photo, two_classes, write_folder

VERBS = ("pack", "index", "verify", "stats")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return two_classes(tmp_path_factory.mktemp("images"), 5)


@pytest.fixture
def packed(images, tmp_path) -> Path:
    assert main(["pack", str(images), str(tmp_path / "set"), "--workers", "1", "--samples-per-shard", "4"]) == 0
    return tmp_path / "set"


def error_of(arguments: list[str], capsys) -> str:
    """Run; expect code 2 and exactly one line on stderr, `error: …`, progress apart."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.match(r"(pack|index|verify): ", line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("words", [["pack", "IMAGES", "LONG"], *([verb, "LONG"] for verb in VERBS[1:])], ids=" ".join)
def test_a_name_that_no_file_can_have_is_one_line(images, tmp_path, capsys, words):
    long = str(tmp_path / ("n" * 300))
    places = {"IMAGES": str(images), "LONG": long}
    said = error_of([places.get(word, word) for word in words], capsys)
    assert "File name too long; fix this and rerun" in said


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS)])
def test_help_is_instant(arguments):
    """No heavy import stands before --help: not even NumPy, let alone torch."""
    code = (
        "import sys; from beitforge.pipeline.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'numpy', 'torch', 'PIL', 'webdataset'} & set(sys.modules), sys.modules\n"
    )
    started = time.monotonic()
    done = python(code, *arguments, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: beitforge" in done.stdout
    assert time.monotonic() - started < 5


def test_everything_runs_without_torch(images, tmp_path):
    """Preprocessing nodes have neither torch nor deepspeed."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
        "from beitforge.pipeline.cli import main\n"
        "images, folder = sys.argv[1:]\n"
        "assert main(['pack', images, folder, '--workers', '1']) == 0\n"
        "for verb in ('index', 'verify', 'stats'): assert main([verb, folder]) == 0, verb\n"
    )
    done = python(code, str(images), str(tmp_path / "set"))
    assert done.returncode == 0, done.stderr
    assert read_image_manifest(tmp_path / "set").samples == 10


def test_the_verbs_in_turn(images, tmp_path, capsys):
    """What each prints is what a person wants to know next."""
    folder = str(tmp_path / "set")
    write_folder(tmp_path / "in", {"note.txt": b"", "x/bad.jpg": b"no"})
    for source in images.iterdir():
        (tmp_path / "in" / source.name).symlink_to(source)
    pack = ["pack", str(tmp_path / "in"), folder, "--workers", "1", "--samples-per-shard", "4"]
    assert main(pack) == 0
    out = capsys.readouterr().out
    assert "labels: 3 classes, the sub-folder of each image (cat, dog, x); --labels none packs them without" in out
    assert "files passed over, no images: 1 (.txt 1)" in out
    assert "classes none of whose images can be used, which keep their numbers: 1 (x)" in out
    assert "images that cannot be used: 1, with reasons in" in out and "rejected.jsonl" in out
    assert "10 samples in 3 shards" in out and "3 classes" in out
    assert main(pack) == 0
    out = capsys.readouterr().out
    assert "an earlier run had finished all of them; nothing to do" in out
    assert f"could not be used again, pack into another folder, or delete {folder}" in out
    assert main(["verify", folder, "--decode", "--workers", "1"]) == 0
    assert "10 samples in 3 shards, clean" in capsys.readouterr().out
    assert main(["index", folder, "--workers", "1"]) == 0
    assert "10 samples in 3 shards, 3 of 3 tars were indexed already" in capsys.readouterr().out
    assert main(["stats", folder]) == 0
    out = capsys.readouterr().out
    assert "cat 5, dog 5" in out and "jpeg 10" in out and "min 48, median 48.0, max 48" in out


def test_verify_prints_every_finding_and_exits_2(packed, capsys):
    """A script sees the code, a person sees what and where."""
    for name in ("shard-000000.tar", "shard-000002.tar"):
        (packed / name).unlink()
    assert main(["verify", str(packed), "--workers", "1"]) == 2
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" is missing")[0] for line in out[:2]] == [
        str(packed / "shard-000000.tar"),
        str(packed / "shard-000002.tar"),
    ]
    assert out[2].endswith("2 findings in 10 samples in 3 shards")


def test_stats_as_json(packed, images, tmp_path, capsys):
    """The numbers for scripts, exact."""
    write_folder(tmp_path / "in", {"a.png": encoded(photo(20, 30)[..., 0], "PNG"), "b.jpg": jpeg(progressive=True)})
    main(["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "out"), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["samples"] == 2 and stats["classes"] == {}
    assert stats["formats"] == {"jpeg": 1, "png": 1, "webp": 0, "other": 0}
    assert stats["width"] == {"min": 20, "median": 34.0, "max": 48}
    assert stats["flags"]["progressive"] == 1 and stats["flags"]["not 8-bit RGB"] == 1
    assert stats["bytes"] == (tmp_path / "out/shard-000000.tar").stat().st_size


def test_splits_and_image_options_arrive(images, tmp_path):
    """Every option of the command line reaches the plan that the manifest keeps."""
    arguments = "--workers 1 --split val=0.3 --seed 3 --max-side 40 --short-side 16 --quality 80 --reencode webp"
    arguments += " --name pic --labels none --samples-per-shard 3 --max-rejected 5"
    assert main(["pack", str(images), str(tmp_path / "out"), *arguments.split()]) == 0
    options = read_image_manifest(tmp_path / "out/train").made_by["options"]
    assert options == {
        "name": "pic",
        "samples_per_shard": 3,
        "labels": "none",
        "splits": [["val", 0.3]],
        "seed": 3,
        "picture": {"max_side": 40, "short_side": 16, "quality": 80, "reencode": "webp", "to_rgb8": False},
    }
    assert (tmp_path / "out/val/pic-000000.tar").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{tmp}/none", "{tmp}/out"], "none is not a folder"),
        (["pack", "{tmp}/empty", "{tmp}/out"], "holds no image"),
        (["pack", "{images}", "{images}/cat/.."], "lie inside the shard folder"),
        (["pack", "{images}", "{tmp}/out", "--split", "val"], "--split is 'val'"),
        (["pack", "{images}", "{tmp}/out", "--max-rejected", "few"], "--max-rejected is 'few'"),
        (["pack", "{images}", "{tmp}/out", "--workers", "0"], "--workers is 0"),
        (["pack", "{images}", "{tmp}/file"], "file"),
        (["pack", "{images}", "/proc/nowhere"], "/proc/nowhere"),
        (["index", "{tmp}/none"], "none is not a folder"),
        (["index", "{tmp}/empty"], "holds no .tar"),
        (["verify", "{tmp}/empty"], "has no manifest.json, so it is unfinished"),
        (["verify", "{tmp}/none"], "none does not exist: give the folder of a shard set"),
        (["verify", "{images}"], ".jpg) and is no shard set: make one of them with `pack"),
        (["stats", "{images}/cat"], "and is no shard set: make one of them with `pack"),
        (["verify", "{images}/cat/0.jpg"], "0.jpg is a file: give the folder of a shard set"),
        (["verify", "{tmp}/tars"], "holds tars and no manifest.json: `index` adopts them or says what they lack"),
        (["stats", "{tmp}/begun"], "holds an unfinished packing: finish it with `pack`"),
        (["verify", "{tmp}/tokenizer"], "or no shard set (it holds tokenizer.json)"),
        (["pack", "{tmp}/tars", "{tmp}/out"], "holds no image but tars: adopt those that are WebDataset's"),
        (["pack", "{images}", "{tmp}/split"], "holds finished sets already (train, val)"),
        (["stats", "{tmp}/odd"], "give the folder of a shard set"),
        (["stats", "{tmp}/split"], "train, val in it are: give one of them"),
    ],
)
def test_a_users_error_is_one_line(images, tmp_path, arguments, message, capsys):
    """No traceback for what a user, a path or a disk can cause."""
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path, {"file": b"", "odd/manifest.json": b"[1"})
    write_folder(tmp_path, {"split/train/manifest.json": b"{}", "split/val/manifest.json": b"{}"})
    write_folder(tmp_path, {"tars/a.tar": b"", "begun/packing.json": b"{}", "tokenizer/tokenizer.json": b"{}"})
    filled = [argument.format(tmp=tmp_path, images=images) for argument in arguments]
    assert message in error_of(filled, capsys)


def test_a_wrong_verb_or_option_exits_2():
    """argparse's own errors share the code."""
    for arguments in (["pak"], ["pack"], ["stats", "x", "--jsn"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_names_that_are_no_text_are_printed(tmp_path):
    """A foreign tar's Latin-1 key in a finding must not end in UnicodeEncodeError."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("caf\udce9.jpg", "x.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg())
            tar.addfile(info, io.BytesIO(jpeg()))
    assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    raw = bytearray(path.read_bytes())
    raw[700] ^= 1
    path.write_bytes(raw)
    command = [sys.executable, "-m", "beitforge", "verify", str(tmp_path), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert r"row 0 (caf\udce9): the image's bytes are not what was packed" in done.stdout


def test_nothing_of_a_received_set_steers_the_terminal(images, tmp_path, capsys):
    """Names of tar members and of classes are printed, their escape codes and line breaks are not obeyed."""
    source, tars = next(path for path in images.rglob("*") if path.is_file()), tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for name, content in (
            ("a\x1b[2J.jpg", b"no image"),
            ("b\x1b]0;x\x07.txt", b"x"),
            (f"c{source.suffix}", source.read_bytes()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    folders = tmp_path / "classes"
    for name in ("one\x1b[31m", "two\nlines"):
        (folders / name).mkdir(parents=True)
        shutil.copy(source, folders / name)
    for words in (["index", tars], ["verify", tars], ["pack", folders, tmp_path / "set"], ["stats", tmp_path / "set"]):
        workers = [] if words[0] == "stats" else ["--workers", "1"]
        assert main([*map(str, words), *workers]) == 0
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\x07" not in out + err and "\nlines" not in out, words
    assert "one\\x1b[31m" in out and "two\\nlines" in out
