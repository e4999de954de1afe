"""A folder that runs `bench gpu` on a machine with a GPU and no network: wheels, benchmarks and run.sh.

    ./launch.sh bundle OUT                   # where the package index is
    OUT/run.sh --minutes 8 --out DIR         # there

The machine has Python 3.12, torch, Triton and Pillow, which are not carried; what else the benchmarks need is, ours as
a wheel and each library at the version of constraints.txt.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.harness import refuse

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 64 * 10**6  # bytes of the whole folder
PLATFORMS = tuple(f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_12", "2010"))
TARGET = {
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "extra": "",
}
# what the benchmarks import; peers that constraints.txt does not know have their version here
ROOTS = ("deepspeed", "timm", "transformers", "numpy", "pyyaml", "safetensors", "xxhash", "simplejpeg")
PINNED = {
    "liger-kernel": "0.8.5",
    "nvidia-cudnn-frontend": "1.14.1",
    "nvidia-cutlass": "4.2.0.0",
    "nvidia-nvimgcodec-cu13": "0.9.0.20",
    "nvidia-nvjpeg": "13.3.2.43",
}
# torch, Triton and Pillow are there; the others are for reading images, downloads and commands of theirs
LEFT_OUT = {"torch", "triton", "pillow", "torchvision", "hf-xet", "typer"}
CUTLASS = "nvidia-cutlass"  # DeepSpeed compiles its attention against these headers; nothing else of it is used
HEADERS = ("cutlass_library/source/include/", "cutlass_library/source/tools/util/include/")
# of nvImageCodec's 25 MB what decodes JPEGs under that Python
CODEC = "nvidia-nvimgcodec-cu13"
CODEC_PARTS = re.compile(r".*(\.py|dist-info/.*|libnvimgcodec\.so.*|cpython-312-.*|lib(nvjpeg|jpeg_turbo)_ext\.so.*)")
COPIED = ("__init__.py", "harness.py", "results.py", "kernels", "training", "gpu")


def main(words: list[str]) -> None:
    """Make the folder; one line and code 2 for what is wrong with it."""
    if len(words) != 1 or words[0].startswith("-"):
        refuse(f"bundle takes the folder to make, not {' '.join(words) or 'nothing'}")
    out = Path(words[0])
    if out.exists() and any(out.iterdir()):
        refuse(f"{out} is not empty; name a new folder")
    (out / "wheels").mkdir(parents=True, exist_ok=True)
    try:
        own_wheel(out / "wheels")
        carried = fetch(out / "wheels")
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "no message").strip().splitlines()[-1]
        refuse(f"bundle needs the package index; pip {error.cmd[3]} said: {last}")
    copy_benchmarks(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > LARGEST:
        refuse(f"{out} takes {size / 1e6:.0f} MB; it must stay under {LARGEST / 1e6:.0f}")
    print(f"{out}: {size / 1e6:.1f} MB, {len(carried)} wheels; there: {out.name}/run.sh --minutes 8 --out DIR")


def own_wheel(wheels: Path) -> None:
    """Ours, built from a copy, so that nothing is left behind in the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        copy.mkdir()
        for name in ("src", "pipeline", "kernels", "shards", "configs"):
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy / name)
        pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(copy))


def fetch(wheels: Path) -> list[str]:
    """The libraries and what they need for the other machine; their names. Raises CalledProcessError of pip's."""
    pins, wanted, carried = {**pinned(), **PINNED}, [*ROOTS, *PINNED], []
    while wanted:
        name = wanted.pop()
        if name in carried or name in LEFT_OUT:
            continue
        wheel = download(name, pins.get(name, ""), wheels)
        carried.append(name)
        if name == CUTLASS:
            headers_of(wheel, wheels.parent / "cutlass.tar.xz")
            continue
        if name == CODEC:
            slim(wheel, CODEC_PARTS)
        wanted += needs(wheel)
    return carried


def slim(wheel: Path, kept: re.Pattern) -> None:
    """Leave in a wheel only the files whose names match."""
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as slimmed,
    ):
        for info in source.infolist():
            if kept.fullmatch(info.filename):
                slimmed.writestr(info, source.read(info))
    whole.unlink()


def headers_of(wheel: Path, out: Path) -> None:
    """CUTLASS's headers out of its wheel, a fifth of which they take; the wheel goes."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as whole:
            whole.extractall(folder, [name for name in whole.namelist() if name.startswith(HEADERS)])
        with tarfile.open(out, "w:xz", preset=9) as packed:
            packed.add(Path(folder) / "cutlass_library" / "source", arcname="cutlass")
    wheel.unlink()


def pinned() -> dict[str, str]:
    """Versions of constraints.txt for Python 3.12."""
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    here = (each for each in found if each.marker is None or each.marker.evaluate(TARGET))
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in here}


def download(name: str, version: str, wheels: Path) -> Path:
    """One wheel for the other machine. Of DeepSpeed only the source is published: it is built without its operators."""
    what, before = f"{name}=={version}" if version else name, set(wheels.iterdir())
    if name == "deepspeed":
        pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), what, DS_BUILD_OPS="0")
    else:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        only = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
        pip("download", "--no-deps", *only, "-d", str(wheels), what)
    (made,) = set(wheels.iterdir()) - before
    return made


def needs(wheel: Path) -> list[str]:
    """What a wheel asks for on the other machine, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    asked = (Requirement(line) for line in lines)
    return [canonicalize_name(each.name) for each in asked if each.marker is None or each.marker.evaluate(TARGET)]


def pip(*words: str, **environment: str) -> None:
    """Quietly. Raises CalledProcessError with what it says."""
    command = [sys.executable, "-m", "pip", *words, "-q", "--disable-pip-version-check"]
    kept = {**os.environ, **environment}
    subprocess.run(command, check=True, env=kept, capture_output=True, text=True)


def copy_benchmarks(out: Path) -> None:
    """The benchmarks beside the wheels, with the module that finds the packages, and run.sh."""
    for name in COPIED:
        source, target = ROOT / "benchmarks" / name, out / "benchmarks" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    (out / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "__init__.py", out / "tests" / "__init__.py")
    shutil.copy(Path(__file__).with_name("run.sh"), out / "run.sh")


if __name__ == "__main__":
    main(sys.argv[1:])
