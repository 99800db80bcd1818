"""Captioned folders of tiny pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Picture = Callable[..., bytes]


@pytest.fixture
def drawings(picture: Picture) -> Callable[..., Path]:
    """A folder of pictures 0 … count − 1, each with a text file of two lines."""

    def make(folder: Path, count: int, *, texts: bool = True) -> Path:
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number:03d}.png").write_bytes(picture(number))
            if texts:
                lines = f"picture {number}\n그림 {number}\n"
                (folder / f"{number:03d}.txt").write_text(lines, encoding="utf-8")
        return folder

    return make
