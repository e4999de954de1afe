"""BEITFORGE_NVME=1 says that install.sh has installed and built what these tests need."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("BEITFORGE_NVME") != "1":
        reason = "needs libaio and DeepSpeed's async_io (tests/nvme/install.sh); BEITFORGE_NVME=1 runs it"
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=reason))
