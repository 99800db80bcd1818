"""Captioned pictures into webdataset shards, byte for byte the same however many processes draw.

A shard is a tar file: for each sample ``key.png`` or ``key.jpg``, ``key.txt`` (the first
caption) and ``key.json`` (all captions and what else is known). Times and owners are left out.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diff_dalle.data.json_files import json_bytes
from diff_dalle.data.processes import make_pool
from diff_dalle.errors import UsageError

FORMATS = ("png", "jpg")
_BLOCK = 16  # samples that a drawing process is given at a time


class Picture(Protocol):
    """Something that can be drawn at any size; it travels to other processes (pickle)."""

    def draw(self, size: int) -> NDArray[np.uint8]:
        """RGB [size, size, 3]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture before it is drawn.

    Attributes:
        key: its name in the shard, without a dot.
        captions: at least one; the first goes to ``key.txt``.
        truth: further JSON values for ``key.json``.
        picture: what to draw.
    """

    key: str
    captions: list[str]
    truth: dict[str, Any]
    picture: Picture


def write_shards(
    folder: str | Path,
    sample: Callable[[int], Sample],
    count: int,
    *,
    image_size: int,
    image_format: str = "png",
    samples_per_shard: int = 1000,
    num_workers: int = 0,
) -> dict[str, int]:
    """Write ``00000.tar``, ``00001.tar``, ... and show progress.

    A shard is written aside and renamed when whole; one that is there already is kept, so an
    interrupted run goes on where it was.

    Args:
        folder: made if missing.
        sample: index -> sample, the same at every call.
        count: how many samples.
        image_size: pixels of a picture's side.
        image_format: "png", or "jpg" (quality 95, full colour resolution).
        samples_per_shard: the last shard may hold fewer.
        num_workers: processes that draw; 0 draws in this one.
    Returns:
        shard name -> its size in bytes.
    """
    from tqdm import tqdm

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encode = functools.partial(_encode, size=image_size, image_format=image_format)
    starts = range(0, count, samples_per_shard)
    paths = [folder / f"{number:05d}.tar" for number in range(len(starts))]
    to_draw = not all(path.exists() for path in paths)
    with (
        tqdm(total=count, desc=folder.name, unit="img") as bar,
        make_pool(num_workers) if num_workers and to_draw else nullcontext() as pool,
    ):
        for start, path in zip(starts, paths, strict=True):
            samples = map(sample, range(start, min(start + samples_per_shard, count)))
            if path.exists():
                bar.update(min(samples_per_shard, count - start))
                continue
            drawn = pool.map(encode, samples, chunksize=_BLOCK) if pool else map(encode, samples)
            aside = path.with_suffix(".tar.part")
            with open(aside, "wb") as file:
                _write_tar(file, drawn, on_sample=bar.update)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    return {path.name: path.stat().st_size for path in paths}


def require_same_settings(
    folder: Path, saved: dict[str, Any], settings: dict[str, Any], *, of: str
) -> None:
    """Refuse to go on in a folder that was begun with other settings.

    Raises:
        UsageError: says whose the folder is (``of``) and up to three settings, saved -> given.
    """
    names = sorted(name for name in {*saved, *settings} if saved.get(name) != settings.get(name))
    if names:
        changes = ", ".join(f"{n} {saved.get(n)} -> {settings.get(n)}" for n in names[:3])
        raise UsageError(
            f"--out_dir {folder} holds a data set of {of} ({changes}): "
            "name another folder, or remove this one"
        )


def _encode(sample: Sample, size: int, image_format: str) -> list[tuple[str, bytes]]:
    """(member name, content) of one sample, in the order in which they are written."""
    picture, file = Image.fromarray(sample.picture.draw(size)), io.BytesIO()
    if image_format == "png":
        picture.save(file, "PNG")
    else:
        # Halved colour resolution would blur the edges of flat drawings.
        picture.save(file, "JPEG", quality=95, subsampling=0)
    first = sample.captions[0]
    facts = {"caption": first, "captions": sample.captions, **sample.truth}
    return [
        (f"{sample.key}.{image_format}", file.getvalue()),
        (f"{sample.key}.txt", first.encode()),
        (f"{sample.key}.json", json_bytes(facts)),
    ]


def _write_tar(
    file: io.BufferedWriter,
    encoded: Iterable[list[tuple[str, bytes]]],
    on_sample: Callable[[int], object],
) -> None:
    # The standard library's writer: webdataset's stamps its own owner names and the time.
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for members in encoded:
            for name, content in members:
                entry = tarfile.TarInfo(name)  # mode 0644, time 0, no owner
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            on_sample(1)
