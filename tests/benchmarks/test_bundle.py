"""The folder for a machine with a GPU and no network: what is in it, and that it plans its work there."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from benchmarks.gpu import bundle
from tests.conftest import ROOT

RUN = ROOT / "benchmarks" / "gpu" / "run.sh"


def wheel(folder: Path, *needs: str) -> Path:
    path = folder / "made-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made-1.dist-info/METADATA", "Name: made\n" + "".join(f"Requires-Dist: {n}\n" for n in needs))
        archive.writestr(f"{bundle.HEADERS[0]}cutlass/cutlass.h", "")
    return path


def test_needs_are_those_of_the_other_machine(tmp_path):
    asked = ["NumPy>=1", 'tomli; python_version < "3.11"', 'colorama; sys_platform == "win32"', 'x; extra == "y"']
    assert bundle.needs(wheel(tmp_path, *asked, 'uvloop; python_version >= "3.12"')) == ["numpy", "uvloop"]


def test_versions_are_those_of_the_constraints():
    pins = bundle.pinned()
    assert {"deepspeed", "timm", "transformers", "numpy", "huggingface-hub"} <= set(pins)
    assert (pins["numpy"], pins["networkx"]) == ("2.3.5", "3.6.1")


def test_everything_needed_is_carried(tmp_path, monkeypatch):
    """What a wheel asks for is fetched in its turn, once; what the machine has is not."""
    asked = {"deepspeed": ["torch", "tqdm"], "tqdm": ["numpy"], bundle.CUTLASS: ["scipy"]}
    fetched: list[str] = []

    def download(name: str, version: str, wheels: Path) -> Path:
        fetched.append(name)
        return wheel(wheels, *asked.get(name, []))

    monkeypatch.setattr(bundle, "download", download)
    (tmp_path / "wheels").mkdir()
    carried = bundle.fetch(tmp_path / "wheels")
    assert sorted(carried) == sorted(fetched) == sorted({*bundle.ROOTS, *bundle.PINNED, "tqdm"})
    with tarfile.open(tmp_path / "cutlass.tar.xz") as headers:
        assert "cutlass/include/cutlass/cutlass.h" in headers.getnames()  # run.sh's CUTLASS_PATH


@pytest.mark.parametrize("words", [[], ["--out"], ["full"]])
def test_what_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(SystemExit) as ended:
        bundle.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ")


def test_it_plans_from_an_offline_install(tmp_path):
    """Our wheel installed without an index into a folder, the benchmarks beside it, away from the checkout."""
    (tmp_path / "wheels").mkdir()
    bundle.own_wheel(tmp_path / "wheels")
    bundle.copy_benchmarks(tmp_path)
    (made,) = (tmp_path / "wheels").iterdir()
    site = tmp_path / "site"
    offline = ["--no-index", "--no-deps", "--no-compile", "--target", str(site), str(made)]
    bundle.pip("install", *offline)
    path = os.pathsep.join(map(str, (tmp_path, site, sysconfig.get_path("purelib"))))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "HOME": str(tmp_path)}
    code = "import beitforge, benchmarks.gpu.gpu as gpu; print(beitforge.__file__); gpu.main(['--estimate'])"
    done = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", code], cwd=site, env=environment, capture_output=True, text=True
    )
    first, *lines = done.stdout.splitlines()
    assert done.returncode == 0 and first.startswith(str(site)), done.stderr
    assert lines[0].startswith("bench gpu: 8 minutes") and lines[-1].startswith("  in all ")


def test_its_script_refuses_another_python(tmp_path):
    assert subprocess.run(["bash", "-n", str(RUN)], check=False).returncode == 0
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(old)}
    done = subprocess.run(
        ["bash", str(RUN), "--estimate"], env=environment, capture_output=True, text=True, check=False
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "is not Python 3.12" in line


@pytest.mark.skipif(os.environ.get("BEITFORGE_BUNDLE") != "1", reason="downloads 60 MB: BEITFORGE_BUNDLE=1 runs it")
def test_the_whole_folder(tmp_path):
    """With the package index: small enough, complete, and each wheel for the other machine."""
    bundle.main([str(tmp_path / "out")])
    wheels = list((tmp_path / "out" / "wheels").iterdir())
    carried = {parse_wheel_filename(path.name)[0] for path in wheels}
    wanted = {need for path in wheels for need in bundle.needs(path)}
    unused_of_ours = {"webdataset"}  # readers of images
    assert wanted - carried <= bundle.LEFT_OUT | unused_of_ours
    assert {"beitforge", "deepspeed", "timm", "transformers", "numpy", "liger-kernel"} <= carried
    assert all("none-any" in path.name or "x86_64" in path.name for path in wheels)
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file()) < bundle.LARGEST
