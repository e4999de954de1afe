"""What is compiled at run time is loaded from folders that nobody else can write."""

import os
import tempfile

import pytest

from beitforge.pipeline.cluster.compiled_code import EXTENSIONS, keep_compiled_code_private
from beitforge.shards.errors import ShardError
from beitforge.shards.storage.own_folder import default_folder


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    default_folder.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    yield
    default_folder.cache_clear()


def test_the_compilers_folder_is_not_the_predictable_one(tmp_path):
    keep_compiled_code_private()
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert folder == str(tmp_path / "cache" / "beitforge" / "torchinductor")
    assert os.stat(folder).st_mode & 0o077 == 0


def test_what_the_user_names_stays(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    for name in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "shared"))
    keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "shared")


def test_a_launchers_folder_that_somebody_laid_is_refused(tmp_path, monkeypatch):
    """Its name can be guessed: a process's number and a port, or a job's."""
    laid = tmp_path / f"{EXTENSIONS}123-29500"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(laid))
    keep_compiled_code_private()
    assert laid.stat().st_mode & 0o077 == 0
    laid.chmod(0o777)
    with pytest.raises(ShardError, match=r"can be written by others.*set TORCH_EXTENSIONS_DIR to"):
        keep_compiled_code_private()


def test_a_laid_compilers_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    laid = tmp_path / f"beitforge-torchinductor-{os.getuid()}"
    laid.mkdir()
    laid.chmod(0o777)
    with pytest.raises(ShardError, match=r"can be written by others.*TORCHINDUCTOR_CACHE_DIR=FOLDER"):
        keep_compiled_code_private()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
