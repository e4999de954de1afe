"""What launch.sh installs is pinned: every package that pyproject.toml names, and torch to the version tested with."""

import re
import sys

from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import pip._vendor.tomli as tomllib


def named(requirement: str) -> str:
    """The package of a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=;!~ ]", requirement, maxsplit=1)[0]).lower()


def test_every_named_package_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {named(line): line for line in lines if not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(word for words in project["optional-dependencies"].values() for word in words),
    ]
    assert len(wanted) > 30
    assert not [requirement for requirement in wanted if named(requirement) not in pins]
    assert pins["torch"] == "torch==2.13.0"
    assert all("==" in line for line in pins.values())
