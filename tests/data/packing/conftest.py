"""Captioned folders of tiny pictures, and what was packed of them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diff_dalle.data.packing.pack import PackConfig

Picture = Callable[..., bytes]


def _config(folder: Path, **changes: Any) -> PackConfig:
    return PackConfig(**{"out_dir": str(folder), "num_workers": 0, "val_share": 0.0, **changes})


def _samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of all shards of a split: key, name, txt, bytes of the picture, and facts."""
    samples: dict[str, dict[str, Any]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
                sample = samples.setdefault(key, {"key": key, "shard": shard.name})
                if extension == "json":
                    sample.update(json.loads(content))
                elif extension == "txt":
                    sample["txt"] = content.decode()
                else:
                    sample.update(image=content, extension=extension)
    return list(samples.values())


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _skipped(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["source"], line["reason"]) for line in map(json.loads, lines)]


@pytest.fixture
def config() -> Callable[..., PackConfig]:
    return _config


@pytest.fixture
def samples() -> Callable[[Path], list[dict[str, Any]]]:
    return _samples


@pytest.fixture
def hashes() -> Callable[[Path], dict[str, str]]:
    return _hashes


@pytest.fixture
def skipped() -> Callable[[Path], list[tuple[str, str]]]:
    return _skipped


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
