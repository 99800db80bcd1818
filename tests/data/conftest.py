"""Tiny shards and pictures, made inside the tests."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))

Members = Iterable[tuple[str, bytes]]
Picture = Callable[..., bytes]
Pack = Callable[[Path, Members], Path]


def _picture(number: int, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    """A picture whose pixels tell its number; ``size`` is width, height."""
    rng = np.random.default_rng(number)
    low = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    low.resize(size, Image.Resampling.BICUBIC).save(file, kind, quality=90)
    return file.getvalue()


def _pack(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def picture() -> Picture:
    return _picture


@pytest.fixture
def pack() -> Pack:
    return _pack


@pytest.fixture
def pack_many() -> Callable[..., list[str]]:
    """Shards of given sizes in img2dataset's form; returns all keys in order."""

    def make(folder: Path, counts: Iterable[int], size: tuple[int, int] = (20, 16)) -> list[str]:
        keys = []
        for number, count in enumerate(counts):
            members = []
            for row in range(count):
                key = f"{number:05d}{row:04d}"
                caption = f"sample {key}"
                listed = {"caption": caption, "captions": [caption, f"{key} again", f"{key} 세 번"]}
                members += [
                    (f"{key}.jpg", _picture(len(keys), size)),
                    (f"{key}.txt", caption.encode()),
                    (f"{key}.json", json.dumps(listed).encode()),
                ]
                keys.append(key)
            _pack(folder / f"{number:05d}.tar", members)
            (folder / f"{number:05d}_stats.json").write_text("{}")
        return keys

    return make
