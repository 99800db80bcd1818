"""The files of a sampling run: npz, captions, grid, PNG files and manifest.

All are made inside a hidden temporary folder beside their place and moved out when whole, so a
run that is stopped leaves no half file under a final name (a killed one leaves the hidden
folder, ``.samples_*``, which may be deleted). Repeated outputs are numbered:
``samples_4x64x64x3.npz``, then ``samples_4x64x64x3_2.npz`` with ``grid_2.jpg``, and so on.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.prompts import one_line
from diff_dalle.sampling_io.store import Pictures, PictureStore

_PNG_FOLDER = "png"


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


@dataclass(frozen=True)
class Workshop:
    """The hidden folder in which a run's files grow, shared by all ranks.

    Attributes:
        folder: where the finished files go.
        work: the hidden folder inside it.
        count: N, the number of images.
        sizes: the picture sizes of the stages in pixels, smallest first.
    """

    folder: Path
    work: Path
    count: int
    sizes: tuple[int, ...]

    @classmethod
    def create(cls, folder: Path, count: int, sizes: Sequence[int]) -> Workshop:
        """Make the hidden folder; for one rank only.

        Raises:
            UsageError: the disk is too full or the folder cannot be written.
        """
        bytes_a_stage = [count * size * size * 3 for size in sizes]
        # The last stage is there twice while it is copied into its zip.
        needed = sum(bytes_a_stage) + max(bytes_a_stage)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UsageError(
                f"{folder} has {free / 2**20:.0f} MB left, but {count} images need "
                f"{needed / 2**20:.0f} MB while they are written: name another --log_dir"
            )
        try:
            workshop = cls(
                folder, Path(tempfile.mkdtemp(prefix=".samples_", dir=folder)), count, tuple(sizes)
            )
        except OSError as problem:
            raise UsageError(
                f"{folder} cannot be written to ({problem.strerror}): name another --log_dir"
            ) from problem
        (workshop.work / _PNG_FOLDER).mkdir()
        for store in workshop.stores:
            store.create()
        return workshop

    @property
    def stores(self) -> list[PictureStore]:
        """One store a stage."""
        return [PictureStore(self.work / f"{n}.npy", self.count, n) for n in self.sizes]

    def write(self, indices: Sequence[int], stages: Sequence[Pictures], png: bool) -> None:
        """Keep a batch: ``stages`` holds uint8 [B,H,W,3] a stage; any rank may call it."""
        for store, pictures in zip(self.stores, stages, strict=True):
            for index, picture in zip(indices, pictures, strict=True):
                store.write(index, picture)
        if png:
            for index, picture in zip(indices, stages[-1], strict=True):
                Image.fromarray(picture).save(self.work / _PNG_FOLDER / f"{index:06d}.png")

    def flush(self) -> None:
        """Make what this rank wrote durable, before rank 0 publishes."""
        for store in self.stores:
            store.flush()

    def discard(self) -> None:
        """Remove the hidden folder and all in it."""
        shutil.rmtree(self.work, ignore_errors=True)

    def publish(
        self, captions: Sequence[str], manifest: dict[str, Any], *, grid_size: int
    ) -> list[Path]:
        """Finish all files, move them to their places and remove the hidden folder.

        Args:
            captions: N texts, in the order of the images.
            manifest: what JSON can hold; ``files`` is added.
            grid_size: side of the grid in pixels.
        Returns:
            The files (and the folder of PNG files, if any), the npz of the last stage first.
        """
        made = self._make_files(captions, grid_size)  # name with {} for the number -> made file
        number, claimed = self._claim(list(made))
        names = [name.format(number) for name in made]
        _write_text(
            self.work / "manifest.json",
            json.dumps({**manifest, "files": names}, indent=1) + "\n",
        )
        made[f"{self._stem(self.sizes[-1])}{{}}.json"] = self.work / "manifest.json"
        places = []
        for name, file in made.items():
            place = self.folder / name.format(number)
            os.replace(file, place)
            places.append(place)
        _fsync_folder(self.folder)
        assert claimed in places  # the claim was an empty file that a whole one has replaced
        self.discard()
        return places

    def _stem(self, size: int) -> str:
        return f"samples_{self.count}x{size}x{size}x3"

    def _make_files(self, captions: Sequence[str], grid_size: int) -> dict[str, Path]:
        """Writes all but the manifest; final name -> finished file in the hidden folder."""
        rows, columns = grid_shape(self.count, self.sizes[-1], grid_size)
        shown = range(min(self.count, rows * columns))
        pictures = [self.stores[-1].read(index) for index in shown]
        make_grid(pictures, rows, columns).save(self.work / "grid.jpg", quality=95, subsampling=0)
        lines = [one_line(caption) + "\n" for caption in captions]
        _write_text(self.work / "grid.txt", "".join(lines[: len(shown)]))
        made: dict[str, Path] = {}
        for store in reversed(self.stores):
            stem = self._stem(store.size)
            store.pack(self.work / f"{stem}.npz")
            store.path.unlink()
            _write_text(self.work / f"{stem}.txt", "".join(lines))
            made[f"{stem}{{}}.npz"] = self.work / f"{stem}.npz"
            made[f"{stem}{{}}.txt"] = self.work / f"{stem}.txt"
        made |= {"grid{}.jpg": self.work / "grid.jpg", "grid{}.txt": self.work / "grid.txt"}
        if any((self.work / _PNG_FOLDER).iterdir()):
            made[f"{self._stem(self.sizes[-1])}{{}}"] = self.work / _PNG_FOLDER
        return made

    def _claim(self, names: Sequence[str]) -> tuple[str, Path]:
        """The first number free for all names, and the file that holds it against others."""
        names = [*names, f"{self._stem(self.sizes[-1])}{{}}.json"]
        attempt = 1
        while True:
            number = "" if attempt == 1 else f"_{attempt}"
            attempt += 1
            if any((self.folder / name.format(number)).exists() for name in names):
                continue
            claim = self.folder / f"grid{number}.txt"
            try:
                claim.open("x").close()
            except FileExistsError:  # another run took the number this instant
                continue
            return number, claim


def grid_shape(count: int, size: int, grid_size: int) -> tuple[int, int]:
    """Rows and columns of whole, unscaled pictures that fit; at least one each.

    >>> grid_shape(count=10, size=64, grid_size=200)
    (3, 3)
    """
    each_axis = max(1, grid_size // size)
    columns = min(each_axis, count)
    return min(each_axis, -(-count // columns)), columns


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
