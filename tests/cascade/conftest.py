"""One tiny cascade for all tests of this folder."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from diff_dalle import Cascade

TINY = runpy.run_path(str(Path(__file__).parents[1] / "programs" / "tiny_cascade.py"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["write_cascade"](tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="session")
def cascade(folder: Path) -> Cascade:
    return Cascade.load(str(folder))


@pytest.fixture(scope="session")
def guided(folder: Path) -> Cascade:
    """A cascade whose first stage has a noised CLIP beside it."""
    return Cascade.load(str(folder), str(folder / "clip.pt"))


@pytest.fixture(scope="session")
def guided_base(folder: Path) -> Cascade:
    """Its first stage alone, for what needs many steps."""
    return Cascade.load(str(folder / "base.pt"), str(folder / "clip.pt"))
