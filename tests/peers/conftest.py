"""Peers are test dependencies, the extra `peers`. Where BEITFORGE_PEERS=1 says they are there, a skip is a failure."""

import os

import pytest

from tests.peers.stand_in import torchvision


def pytest_configure() -> None:
    torchvision()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("BEITFORGE_PEERS") == "1":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but BEITFORGE_PEERS=1 says that its peer is installed"
