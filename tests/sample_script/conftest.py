"""One tiny cascade for all tests of `scripts/sample.py`, and the script itself."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = runpy.run_path(str(ROOT / "tests" / "programs" / "tiny_cascade.py"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["write_cascade"](tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="session")
def sample() -> Callable[[list[str]], None]:
    return runpy.run_path(str(ROOT / "scripts" / "sample.py"))["sample"]
