"""Three samples in ten are junk of every kind: each is counted once, and a limit stops the run."""

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY = (
    "--image_size 16 --num_channels 16 --num_res_blocks 1 --channel_mult 1 --norm_groups 8 "
    "--attention_resolutions 16 --num_head_channels 16 --enc_attn_dim 16 --enc_depth 1 "
    "--enc_head_channels 16 --text_length 8 --batch_size 100 --iterations 15 --log_interval 5 "
    "--save_interval 15 --num_preview 0 --num_workers 1 --seed 3"
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def bomb() -> bytes:
    """The beginning of a PNG that announces 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def good_kinds() -> list[tuple[str, bytes]]:
    """(extension, file) of whole pictures, usual and unusual."""
    frames = [noise(), noise().transpose(Image.Transpose.ROTATE_180)]
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100)
    return [
        ("jpg", encoded(noise(), "JPEG")),
        ("png", encoded(noise().convert("RGBA"), "PNG")),
        ("jpg", encoded(noise().convert("CMYK"), "JPEG")),
        ("png", encoded(deep, "PNG")),
        ("webp", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])),
        ("jpg", encoded(noise().convert("L"), "JPEG")),
    ]


def bad_kinds() -> list[tuple[str, bytes, bytes | None]]:
    """(reason, picture, caption) of samples that earn it."""
    whole, words = encoded(noise(), "JPEG"), b"words"
    return [
        ("truncated", whole[: len(whole) // 2], words),
        ("not an image", b"<html>502 Bad Gateway</html>", words),
        ("empty file", b"", words),
        ("bomb", bomb(), words),
        ("too small", encoded(noise(1, 10_000), "PNG"), words),
        ("no caption", whole, None),
        ("empty caption", whole, b" \n"),
        ("caption not UTF-8", whole, b"\xff\xfe\xff"),
        ("duplicate key", whole, words),
        ("truncated", encoded(noise(), "PNG")[:-200], words),
    ]


def write(path: Path) -> Counter[str]:
    """A shard of 1,000 samples in which good and bad ones take turns; its bad ones by reason."""
    goods, bads = itertools.cycle(good_kinds()), itertools.cycle(bad_kinds())
    reasons: Counter[str] = Counter()
    before = "", ""  # key and extension of the last good one
    with tarfile.open(path, "w") as archive:
        for number in range(1000):
            key = f"{number:06d}"
            if number % 10 in (2, 5, 8):
                reason, picture, caption = next(bads)
                reasons[reason] += 1
                extension = "jpg"
                if reason == "duplicate key":
                    key, extension = before
            else:
                (extension, picture), caption = next(goods), b"a picture"
                before = key, extension
            for name, data in ((extension, picture), ("txt", caption)):
                if data is not None:
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return reasons


def train(data: Path, runs: Path, flags: str) -> subprocess.CompletedProcess[str]:
    words = f"{TINY} --data_dir {data} --log_dir {runs} {flags}".split()
    return subprocess.run(
        [sys.executable, "scripts/train_generator.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_junk_is_counted_and_trained_around_up_to_the_limit(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    reasons = write(data / "00000.tar")
    assert reasons.total() == 300
    (data / "00001.tar").write_bytes(b"")
    (data / "00002.tar").write_bytes((data / "00000.tar").read_bytes()[:700])

    done = train(data, tmp_path / "run", "--max_bad_share 0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "run" / "bad_samples.jsonl").read_text(encoding="utf-8")
    listed = [json.loads(line) for line in text.splitlines()]
    samples = [line for line in listed if line["key"]]
    # An epoch and a half was visited: what was met twice counts once.
    assert Counter(line["reason"] for line in samples) == reasons
    shards = {Path(line["shard"]).name: line["reason"] for line in listed if not line["key"]}
    assert shards == {"00001.tar": "empty file", "00002.tar": "truncated shard"}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == [500, 1000, 1500]
    assert sum(row["bad_share"] for row in rows[:2]) == pytest.approx(2 * 0.3)

    stopped = train(data, tmp_path / "strict", "")
    assert stopped.returncode != 0
    last = stopped.stderr.strip().splitlines()[-1]
    assert "--max_bad_share 0.1" in last and "300 of the last 1000 samples" in last
    assert (tmp_path / "strict/error.txt").is_file()
