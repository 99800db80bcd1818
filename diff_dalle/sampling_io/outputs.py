"""The files of a sampling run: npz, captions, grid, PNG files and manifest.

All are made inside the hidden folder of `writer.OutputWriter` and moved out when whole, so a run
that is stopped leaves no half file under a final name. Repeated outputs are numbered:
``samples_4x64x64x3.npz``, then ``samples_4x64x64x3_2.npz`` with ``grid_2.jpg``, and so on.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.prompts import one_line
from diff_dalle.sampling_io.sizes import Size
from diff_dalle.sampling_io.store import Pictures, PictureStore
from diff_dalle.sampling_io.writer import OutputWriter

_CLAIM = "grid{}.txt"


def make_output_folder(log_dir: str | None) -> Path:
    """``log_dir``, else ``$OPENAI_LOGDIR``, else a new temporary folder; made if missing.

    Raises:
        UsageError: the folder cannot be made.
    """
    chosen = log_dir or os.environ.get("OPENAI_LOGDIR")
    if not chosen:
        return Path(tempfile.mkdtemp(prefix="diff_dalle_samples_"))
    try:
        Path(chosen).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UsageError(
            f"--log_dir {chosen} cannot be made ({problem.strerror}): name a folder to write to"
        ) from problem
    return Path(chosen)


def publish(
    writer: OutputWriter,
    captions: Sequence[str],
    manifest: dict[str, Any],
    *,
    grid_size: int,
    png: bool = False,
) -> list[Path]:
    """Make all files of a run, move them to their places and remove the hidden folder.

    Args:
        writer: holds all pictures.
        captions: N texts, in the order of the images.
        manifest: what JSON can hold; ``files`` is added.
        grid_size: side of the grid in pixels.
        png: also write every image of the last stage as a PNG file.
    Returns:
        The files (and the folder of PNG files, if any), the npz of the last stage first.
    """
    made = _Made(writer)
    made.make_files(captions, grid_size)
    if png:
        made.make_png_files()
    places = made.move(manifest)
    writer.discard()
    return places


def manifest_beside(npz: Path) -> dict[str, Any] | None:
    """The manifest of the run that wrote an npz file, if it lies beside it."""
    for path in sorted(npz.parent.glob("samples_*.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict) and npz.name in manifest.get("files", ()):
            return manifest
    return None


class _Made:
    """The finished files of a run, in a folder inside the hidden one until all are there."""

    def __init__(self, writer: OutputWriter) -> None:
        self.writer = writer
        self.last = writer.stores[-1]
        self.work = writer.work / "made"
        if self.work.exists():  # of a run that was killed while it made them
            shutil.rmtree(self.work)
        self.work.mkdir()
        self.files: dict[str, Path] = {}  # final name, with {} for the number -> file

    def make_files(self, captions: Sequence[str], grid_size: int) -> None:
        """All files but the manifest and the PNG files."""
        rows, columns = grid_shape(self.last.count, self.last.size, grid_size)
        shown = range(min(self.last.count, rows * columns))
        lines = [one_line(caption) + "\n" for caption in captions]
        for store in reversed(self.writer.stores):
            store.pack(self._new(f"{_stem(store)}{{}}.npz"))
            _write_text(self._new(f"{_stem(store)}{{}}.txt"), "".join(lines))
        grid = make_grid([self.last.read(index) for index in shown], rows, columns)
        grid.save(self._new("grid{}.jpg"), quality=95, subsampling=0)
        _write_text(self._new(_CLAIM), "".join(lines[: len(shown)]))

    def make_png_files(self) -> None:
        """A folder with one file a picture."""
        folder = self._new(f"{_stem(self.last)}{{}}")
        folder.mkdir()

        def save(index: int) -> None:
            Image.fromarray(self.last.read(index)).save(folder / f"{index:06d}.png")

        with ThreadPoolExecutor() as pool:  # Pillow compresses outside the interpreter's lock
            list(pool.map(save, range(self.last.count)))

    def move(self, manifest: dict[str, Any]) -> list[Path]:
        """Everything to its place, the claimed one last."""
        number = self._claim([*self.files, f"{_stem(self.last)}{{}}.json"])
        places: list[Path] = []
        try:
            names = [name.format(number) for name in self.files]
            text = json.dumps({**manifest, "files": names}, indent=1) + "\n"
            _write_text(self._new(f"{_stem(self.last)}{{}}.json"), text)
            for name in sorted(self.files, key=lambda name: name == _CLAIM):
                place = self.writer.folder / name.format(number)
                if place.is_dir():
                    shutil.rmtree(place)
                os.replace(self.files[name], place)
                places.append(place)
        except BaseException:
            if not places:
                (self.writer.folder / _CLAIM.format(number)).unlink()
            raise
        _fsync_folder(self.writer.folder)
        return places

    def _new(self, name: str) -> Path:
        """Where the file of that name is made."""
        self.files[name] = self.work / name.format("")
        return self.files[name]

    def _claim(self, names: Sequence[str]) -> str:
        """The first number free for all names, held by a file against other runs.

        It holds the request until its own content comes: a run that was killed while it moved
        files finds its number again.
        """
        folder, mark = self.writer.folder, self.writer.work.name.encode()
        for attempt in itertools.count(1):
            number = "" if attempt == 1 else f"_{attempt}"
            claim = folder / _CLAIM.format(number)
            if claim.is_file() and claim.read_bytes() == mark:
                return number
            if any((folder / name.format(number)).exists() for name in names):
                continue
            try:
                with claim.open("xb") as file:
                    file.write(mark)
            except FileExistsError:  # another run took the number this instant
                continue
            return number
        raise AssertionError("numbers do not end")


def _stem(store: PictureStore) -> str:
    height, width = store.size
    return f"samples_{store.count}x{height}x{width}x3"


def grid_shape(count: int, size: Size, grid_size: int) -> tuple[int, int]:
    """Rows and columns of whole, unscaled pictures that fit; at least one each.

    >>> grid_shape(count=10, size=(64, 48), grid_size=200)
    (3, 4)
    """
    down, across = (max(1, grid_size // side) for side in size)
    columns = min(across, count)
    return min(down, -(-count // columns)), columns


def make_grid(pictures: Sequence[Pictures], rows: int, columns: int) -> Image.Image:
    """Pictures, uint8 [H,W,3] each, row by row; places left over are white."""
    height, width, _ = pictures[0].shape
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
