"""Configs from a text and overrides."""

from pathlib import Path

import pytest

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError


def load(folder: Path, text: str = "", *overrides: str) -> Config:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(str(path), list(overrides))


def refusal(folder: Path, text: str = "", *overrides: str) -> str:
    """The one line of the ConfigError."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line
