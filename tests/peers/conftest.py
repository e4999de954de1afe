"""Comparisons with other libraries, which the extra `peers` installs. All tests of this folder are marked peers."""

import importlib
from pathlib import Path

import pytest

from beitforge.pipeline.torchvision_stub import install
from tests.conftest import PEERS_REQUIRED

FOLDER = Path(__file__).parent


def pytest_configure() -> None:
    """Fail at once where BEITFORGE_PEERS=1 promises a library that is missing."""
    install()
    for name in ("transformers", "timm", "dall_e", "triton") if PEERS_REQUIRED else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            pytest.exit(f"BEITFORGE_PEERS=1, but {name} cannot be imported: {error}", returncode=1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them before `-m` selects."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("peers")
