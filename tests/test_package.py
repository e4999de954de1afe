"""The package as users get it: sdist, wheel, editable install, launch.sh; and no import name but `beitforge`."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_images

NAMES = ("pipeline", "kernels", "shards", "configs")
PROBE = f"import importlib.util as u; print([name for name in {NAMES} if u.find_spec(name)])"
# Hugging Face's names, by which transformers knows it
STAND_IN = {"__init__.py": "def get_kernel(name): return name\n", "layer.py": "class Mode: pass\n"}
TORCH_VERBS = {
    "tokenizer": ["c.yaml"],
    "tokenize": ["c.yaml"],
    "pretrain": ["c.yaml"],
    "probe": ["run", "set"],
    "evaluate": ["run", "set"],
    "export": ["run", "out"],
    "import": ["there", "out"],
    "import-tokenizer": ["encoder.pkl", "out"],
    "finetune": ["c.yaml"],
    "demo": [],
}


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run in an environment that does not lead to this checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "BEITFORGE_COMMAND")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=120)


def pip(*words: object, cwd: Path) -> None:
    done = run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *words], cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def tracked(*where: str) -> set[str]:
    """Files of the checkout that git knows, with the package's top folders under beitforge/."""
    listed = subprocess.run(["git", "ls-files", *where], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name.removeprefix("src/beitforge/") for name in listed.split()]
    return {f"beitforge/{name}" for name in names if not (ROOT / "src" / "beitforge" / name).is_symlink()}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the sdist, which is made from the files that git knows."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("package")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(f"tar -C {ROOT} --null -T - -cf - | tar -xf -", shell=True, input=listed, cwd=folder, check=True)
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"
    done = run([sys.executable, "-W", "error", "-c", build], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(folder / done.stdout.split()[-1]) as sdist:
        sdist.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder / "wheel", source, cwd=folder)
    (made,) = (folder / "wheel").iterdir()
    return made


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel; its dependencies are those of the tests' environment."""
    return environment(tmp_path_factory.mktemp("installed"), wheel, Path(sysconfig.get_path("purelib")))


def environment(folder: Path, wheel: Path, packages: Path) -> Path:
    """The Python of a fresh environment with the wheel, and with the dependencies in `packages`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-deps", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # addsitedir would read the tests' own .pth files, and an editable install with them
    (site / "dependencies.pth").write_text(f"{packages}\n")
    return python


def test_the_wheel_holds_the_packages_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"beitforge"}
    modules = {name for name in tracked("src", "pipeline", "kernels", "shards") if name.endswith(".py")}
    assert {name for name in names if name.endswith(".py")} == modules
    data = {name for name in tracked("src", *NAMES) if not name.endswith((".py", ".md"))}
    assert {name for name in names if name.startswith("beitforge/") and not name.endswith(".py")} == data
    assert {"beitforge/py.typed", "beitforge/configs/demo.yaml"} <= data
    assert any(name.endswith(".sbatch") for name in data)


def test_commands_work_in_an_empty_folder(installed, tmp_path):
    beitforge = installed.parent / "beitforge"
    done = run([beitforge, "--version"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "beitforge 0.1.0\n"), done.stderr
    write_images(tmp_path / "images", 6, 2)
    done = run([beitforge, "pack", "images", "set", "--workers", "2"], tmp_path)
    assert done.returncode == 0 and (tmp_path / "set" / "manifest.json").exists(), done.stderr
    done = run([beitforge, "plan", "beit_base", "--gpu", "h100", "--gpus", "8"], tmp_path)
    assert done.returncode == 0 and "h100" in done.stdout.lower(), done.stderr
    slurm = ["slurm", "pretrain", "configs/beit_base.yaml", "--nodes", "2", "--gpus-per-node", "8", "--dry-run"]
    done = run([beitforge, *slurm], tmp_path)
    assert done.returncode == 0, done.stderr
    (script,) = tmp_path.rglob("pretrain.sbatch")
    assert "#SBATCH --nodes=2" in script.read_text()
    done = run([beitforge, "demo", "--help"], tmp_path)
    assert done.returncode == 0 and "usage: beitforge demo" in done.stdout
    assert run([installed, "-c", PROBE], tmp_path).stdout == "[]\n"


@pytest.fixture(scope="session")
def preprocessing(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has everything but torch and what needs it."""
    folder = tmp_path_factory.mktemp("preprocessing")
    packages = folder / "packages"
    packages.mkdir()
    for found in Path(sysconfig.get_path("purelib")).iterdir():
        if not found.name.startswith(("torch", "functorch", "deepspeed", "triton", "__editable__", "beitforge")):
            (packages / found.name).symlink_to(found)
    return environment(folder, wheel, packages)


@pytest.mark.parametrize("verb", TORCH_VERBS)
def test_without_torch_a_verb_says_so(preprocessing, tmp_path, verb):
    (tmp_path / "c.yaml").write_text("{}\n")
    done = run([preprocessing.parent / "beitforge", verb, *TORCH_VERBS[verb]], tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "torch" in line and "beitforge[train]" in line, done.stderr


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A user's folder with folders of our old names, which raise when they are imported."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise AssertionError('the user folder {name} was imported')\n")
    return tmp_path


def test_a_test_process_sees_one_name():
    assert [name for name in NAMES if importlib.util.find_spec(name)] == []


def test_a_rank_of_the_tests_sees_one_name(tmp_path):
    """As `torch.distributed.run -m tests.x` starts it: the checkout's top folder is on its path."""
    done = run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests; {PROBE}"], ROOT)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("where", ["root", "hostile"])
def test_python_m_beitforge_sees_one_name(hostile, where):
    """What `python -m beitforge` does before it runs a verb, from the checkout and from a folder of such names."""
    code = f"import sys; from beitforge.__main__ import forget_working_folder; forget_working_folder(); {PROBE}"
    folder = ROOT if where == "root" else hostile
    done = run([sys.executable, "-c", code], folder, PYTHONPATH=str(ROOT / "src"))
    assert done.stdout == "[]\n", done.stderr


def test_workers_beside_a_users_folders(hostile, tiny):
    """Spawned workers of `pack`, and two ranks of `tokenize`, started in a folder of such names."""
    write_images(hostile / "images", 6, 2)
    command = [sys.executable, "-m", "beitforge"]
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = run([*command, "pack", "images", "set", "--workers", "2"], hostile, **environment)
    assert done.returncode == 0, done.stderr
    environment["NPROC"] = "2"
    words = ["tokenize", tiny.config, f"data.tokens={hostile / 'tokens'}", "data.heldout_images="]
    launcher = [sys.executable, "-m", "beitforge"]
    done = run([*launcher, *words, "data.heldout_tokens=", "loader.workers=1"], hostile, **environment)
    assert done.returncode == 0 and (hostile / "tokens" / "manifest.json").exists(), done.stderr[-2000:]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a package whose import name is `kernels`."""
    folder = tmp_path_factory.mktemp("stand-in") / "kernels-0.1-py3-none-any.whl"
    files = {f"kernels/{name}": text for name, text in STAND_IN.items()}
    info = "kernels-0.1.dist-info"
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return folder


@pytest.mark.parametrize("first", ["beitforge", "kernels"])
def test_beside_a_package_called_kernels(wheel, stand_in, tmp_path, first):
    """Whichever is installed first and removed first, the other one stays whole."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    wheels = {"beitforge": wheel, "kernels": stand_in}
    second = next(name for name in wheels if name != first)
    ours = "import beitforge.kernels, beitforge.pipeline.config.settings"
    theirs = "import kernels.layer; assert kernels.get_kernel('x') == 'x'; kernels.layer.Mode"
    checks = {"beitforge": ours, "kernels": theirs}
    for name in (first, second):
        pip("--python", python, "install", "--no-deps", wheels[name], cwd=tmp_path)
    done = run([python, "-c", f"{ours}; {theirs}"], tmp_path)
    assert done.returncode == 0, done.stderr
    pip("--python", python, "uninstall", "-y", first, cwd=tmp_path)
    assert run([python, "-c", checks[second]], tmp_path).returncode == 0
    assert "ModuleNotFoundError" in run([python, "-c", f"import {first}"], tmp_path).stderr


def test_a_copy_without_links_is_refused(tmp_path):
    (tmp_path / "src" / "beitforge").mkdir(parents=True)
    (tmp_path / "src" / "beitforge" / "pipeline").write_text("../../pipeline")
    (tmp_path / "launch.sh").write_bytes((ROOT / "launch.sh").read_bytes())
    done = run(["bash", "launch.sh", "plan"], tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "lost its symbolic links" in line


def test_an_editable_install_from_the_parent_of_the_checkout(tmp_path):
    """A working folder that holds a checkout called `beitforge`, which is no package, does not hide the package."""
    checkout = tmp_path / "beitforge"
    checkout.mkdir()
    for name in ("src", *NAMES, "pyproject.toml", "README.md", "LICENSE"):
        (checkout / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "beitforge.pth").write_text(f"{checkout / 'src'}\n")  # what pip writes for a layout with src/
    done = run([tmp_path / "venv" / "bin" / "python", "-c", "import beitforge; print(beitforge.__version__)"], tmp_path)
    assert done.stdout == "0.1.0\n", done.stderr
