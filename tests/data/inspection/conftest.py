"""Two small shards of which everything is known: the first is whole, the second cut short."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diff_dalle.data.tokenizer import Tokenizer

Encode = Callable[..., bytes]


def _encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def encode() -> Encode:
    return _encode


@pytest.fixture
def known(tmp_path: Path, pack, picture) -> Path:
    """13 samples, 6 of them good, and a tokenizer that takes a token for each byte."""

    def turned(number: int, size: tuple[int, int], mode: str, kind: str = "PNG") -> bytes:
        small = Image.open(io.BytesIO(picture(number)))
        return _encode(small.resize(size, Image.Resampling.NEAREST).convert(mode), kind)

    framed = np.full((100, 100, 3), 255, np.uint8)
    framed[10:90, 10:90] = 30
    film = np.asarray(Image.open(io.BytesIO(picture(7, (128, 128))))).copy()
    film[:20] = film[-20:] = 0
    twice = picture(0, (100, 80), "JPEG")
    colours = np.random.default_rng(11).integers(0, 256, (4, 4), np.uint8)
    painted = Image.fromarray(np.kron(colours, np.ones((256, 256), np.uint8))).convert("P")
    captions = {"caption": "빨간 원", "captions": ["빨간 원", "a red circle"]}
    members = [
        ("good.jpg", twice),
        ("good.txt", "빨간 원".encode()),
        ("good.json", json.dumps(captions).encode()),
        ("wide.png", turned(1, (300, 64), "L")),
        ("wide.txt", b"a"),
        ("small.png", picture(2, (63, 200))),
        ("small.txt", b"a"),
        ("cut.jpg", picture(3, (128, 128), "JPEG")[:-600]),
        ("cut.txt", b"b"),
        ("text.jpg", b"hello"),
        ("text.txt", b"c"),
        ("empty.jpg", b""),
        ("empty.txt", b"d"),
        ("framed.png", _encode(Image.fromarray(framed))),
        ("framed.txt", b"long " * 40),
        ("film.webp", _encode(Image.fromarray(film), "WEBP", lossless=True)),
        ("film.txt", b"  "),
        ("again.jpg", twice),
        ("glass.png", turned(9, (300, 300), "RGBA")),
        ("glass.txt", b"e"),
        ("print.jpg", turned(10, (600, 512), "CMYK", "JPEG")),
        ("print.txt", b"f"),
        ("painted.png", _encode(painted, compress_level=1)),
        ("painted.json", b"{"),
    ]
    folder = tmp_path / "known"
    pack(folder / "0.tar", members)
    last = [("last.png", picture(12, (64, 64))), ("last.txt", b"g"), ("lost.png", bytes(9999))]
    torn = pack(folder / "1.tar", last)
    with tarfile.open(torn) as archive:
        middle_of_the_lost = archive.getmember("lost.png").offset_data + 5000
    os.truncate(torn, middle_of_the_lost)
    Tokenizer.train([]).save(folder / "tokenizer.json")
    return folder
