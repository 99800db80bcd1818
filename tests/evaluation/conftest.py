"""One cascade of random models for all tests of this folder."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base.pt``, ``up32.pt``, ``up64.pt`` and ``clip.pt``."""
    return TINY["write_cascade"](tmp_path_factory.mktemp("models"))
