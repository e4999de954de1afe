"""Peers are test dependencies, the extra `peers`. Where BEITFORGE_PEERS=1 says they are there, a skip is a failure."""

import importlib
import os

import pytest

from beitforge.pipeline.torchvision_stub import install

REQUIRED = os.environ.get("BEITFORGE_PEERS") == "1"


def pytest_configure() -> None:
    install()
    for name in ("transformers", "timm", "dall_e", "triton") if REQUIRED else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            pytest.exit(f"BEITFORGE_PEERS=1, but {name} cannot be imported: {error}", returncode=1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and REQUIRED:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but BEITFORGE_PEERS=1 says that its peer is installed"
