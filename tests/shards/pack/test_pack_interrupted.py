"""Packing killed, interrupted, and out of space: started again, it ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.pack.encode import EncodeOptions
from beitforge.shards.pack.pack import Packed, pack
from beitforge.shards.pack.plan import PackOptions, make_plan
from beitforge.shards.storage.files import PARTIAL
from beitforge.shards.storage.tensors import write_tensors
from tests.shards.made_images import contents, jpeg, stamps, write_folder


def run(images: Path, target: Path, options: PackOptions) -> Packed:
    return pack(images, target, options, "1%", 1)


def start(*arguments: str) -> subprocess.Popen:
    """As from a terminal: Ctrl-C counts even where this test itself was started in the background, deaf to it."""
    return subprocess.Popen(
        [sys.executable, "-m", "beitforge", *arguments],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(done, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert process.poll() is None, f"ended too early: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.005)


def group_of(process: subprocess.Popen) -> list[int]:
    """The processes of the session that `process` leads, and that still run."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == process.pid and fields[0] != "Z":
            alive.append(int(path.parent.name))
    return alive


def until_all_gone(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 20
    while alive := group_of(process):
        assert time.monotonic() < deadline, f"processes {alive} outlive their parent"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def slow_images(tmp_path_factory) -> Path:
    """Enough work that a packing can be caught in the middle."""
    large = jpeg(width=900, height=700)
    return write_folder(tmp_path_factory.mktemp("slow"), {f"{i}.jpg": large for i in range(120)})


SLOW = PackOptions(samples_per_shard=10, encoding=EncodeOptions(max_side=300))
SLOW_FLAGS = ("--samples-per-shard", "10", "--max-side", "300")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_and_started_again_gives_the_same_bytes(slow_images, tmp_path, workers):
    """kill -9 in the middle: no manifest, no orphans; the same command keeps the finished shards and ends the same."""
    target = tmp_path / "set"
    process = start("pack", str(slow_images), str(target), *SLOW_FLAGS, "--workers", workers)
    until(lambda: len(list(target.glob("*.index.safetensors"))) >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    until_all_gone(process)
    assert not (target / "manifest.json").exists()
    (target / f"shard-000011.tar{PARTIAL}0123abcd").write_bytes(b"half")
    finished = {name: stamp for name, stamp in stamps(target).items() if name.endswith(".safetensors")}
    again = run(slow_images, target, SLOW)
    assert 3 <= again.kept == len(finished) < 12
    assert {name: stamps(target)[name] for name in finished} == finished
    run(slow_images, tmp_path / "whole", SLOW)
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("workers", "moment"), [("1", "packing"), ("2", "packing"), ("2", "workers starting")])
def test_ctrl_c_ends_cleanly(slow_images, tmp_path, workers, moment):
    """A terminal's Ctrl-C reaches every process of the group: one line, code 130, nothing half-written left."""
    target = tmp_path / "set"
    process = start("pack", str(slow_images), str(target), *SLOW_FLAGS, "--workers", workers)
    if moment == "packing":
        until(lambda: list(target.glob("*.index.safetensors")), process)
    else:
        until(lambda: len(group_of(process)) == 4, process)  # two workers, and Python's tracker of their resources
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted; run the same command again to resume"
    until_all_gone(process)
    assert not list(target.glob(f"*{PARTIAL}*")) and not (target / "manifest.json").exists()


def test_an_index_damaged_meanwhile_is_made_again(tmp_path):
    """Its bits decide keys, labels and what was rejected; it must not be taken over into the manifest."""
    images = write_folder(tmp_path / "in", {**{f"{i}.jpg": jpeg(i) for i in range(4)}, "no.jpg": b"no image"})
    options = PackOptions(samples_per_shard=4)
    run(images, tmp_path / "set", options)
    whole, marker = contents(tmp_path / "set"), json.dumps(make_plan(images, tmp_path / "set", options).describe())
    path = tmp_path / "set/shard-000000.index.safetensors"
    good = path.read_bytes()
    for place in range(8, len(good), 61):
        path.write_bytes(good[:place] + bytes([good[place] ^ 2]) + good[place + 1 :])
        (tmp_path / "set/manifest.json").unlink()
        (tmp_path / "set/packing.json").write_text(marker)
        run(images, tmp_path / "set", options)
        assert contents(tmp_path / "set") == whole, f"byte {place}"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_packing_goes_on_after(tiny_disk, tmp_path, capfd):
    """No half shard is taken for a whole one, and with room again the finished shards are kept."""
    images = write_folder(tmp_path / "in", {f"{i}.jpg": jpeg(i, 300, 200) for i in range(40)})
    with pytest.raises(
        ShardError, match=r"no space left while writing .*tar; free some and run the same command again"
    ):
        run(images, tiny_disk / "set", PackOptions(samples_per_shard=4))
    assert not list(tiny_disk.rglob(f"*{PARTIAL}*"))
    assert not (tiny_disk / "set/manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", tiny_disk], check=True)
    assert 0 < run(images, tiny_disk / "set", PackOptions(samples_per_shard=4)).kept < 10
    run(images, tmp_path / "whole", PackOptions(samples_per_shard=4))
    assert contents(tiny_disk / "set") == contents(tmp_path / "whole")


def test_a_full_disk_under_an_index_is_the_same_line(tiny_disk):
    """safetensors' own writer reports a full disk as an error of its own that would be a traceback."""
    with pytest.raises(ShardError, match="no space left while writing"):
        write_tensors(tiny_disk / "x", {"a": np.zeros(2**20, np.uint8)}, {})
    assert not list(tiny_disk.iterdir())
