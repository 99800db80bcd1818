"""Pictures of one stage on their way to an npz file, in constant memory.

Every rank writes its pictures into one ``.npy`` beside the result; at the end rank 0 copies it
into the zip. Plain writes are used, not a memory map: on a full disk a write raises, where a
map kills the process.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from diff_dalle.sampling_io.sizes import Size

Pictures = NDArray[np.uint8]  # [N,H,W,3], or one picture [H,W,3]

_CHUNK = 1 << 22  # bytes copied at once


@dataclass(frozen=True)
class PictureStore:
    """``count`` pictures of ``size`` (H, W) pixels, uint8, RGB, in the file ``path``."""

    path: Path
    count: int
    size: Size

    def create(self) -> None:
        """Write the header and give the file its full length."""
        with open(self.path, "xb") as file:
            file.write(self._header)
            file.truncate(self._bytes)
            file.flush()
            os.fsync(file.fileno())

    def is_whole(self) -> bool:
        """Whether the file is there in its full length."""
        return self.path.is_file() and self.path.stat().st_size == self._bytes

    def write(self, indices: Sequence[int], pictures: Pictures) -> None:
        """Put pictures uint8 [B,H,W,3] in their places and bring them to the disk; any rank."""
        expected = (len(indices), *self.size, 3)
        if pictures.shape != expected or pictures.dtype != np.uint8:
            raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}, not u8 {expected}")
        places = [self._offset(index) for index in indices]
        # Without the right to read, a network file system sends just these bytes, not whole
        # pages, the rest of which another machine may be writing.
        with open(os.open(self.path, os.O_WRONLY), "wb") as file:
            for place, picture in zip(places, pictures, strict=True):
                file.seek(place)
                file.write(picture.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def read(self, index: int) -> Pictures:
        """Picture number ``index``, uint8 [H,W,3]."""
        with open(self.path, "rb") as file:
            file.seek(self._offset(index))
            data = file.read(self._bytes_each)
        return np.frombuffer(data, np.uint8).reshape(*self.size, 3)

    def pack(self, target: Path) -> None:
        """Copy everything into ``target``, an npz with one array ``arr_0``, and fsync it."""
        with open(target, "xb") as out:
            with (
                zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
                archive.open("arr_0.npy", "w", force_zip64=True) as entry,
                open(self.path, "rb") as source,
            ):
                while chunk := source.read(_CHUNK):
                    entry.write(chunk)
            out.flush()
            os.fsync(out.fileno())

    @property
    def _header(self) -> bytes:
        shape = (self.count, *self.size, 3)
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        return buffer.getvalue()

    @property
    def _bytes_each(self) -> int:
        return self.size[0] * self.size[1] * 3

    @property
    def _bytes(self) -> int:
        return len(self._header) + self.count * self._bytes_each

    def _offset(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"picture {index} of {self.count}")
        return len(self._header) + index * self._bytes_each


def read_pictures(path: str | Path) -> Pictures:
    """The array ``arr_0`` of an npz file, uint8 [N,H,W,3], its checksum looked at.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no npz, is damaged, or holds something else.
    """
    with _entry(path) as (_, entry):
        return _checked(np.lib.format.read_array(entry, allow_pickle=False))


def map_pictures(path: str | Path) -> Pictures:
    """As `read_pictures`, but pictures are read when they are used, and no checksum is.

    A compressed array cannot be mapped: it is read whole.
    """
    with _entry(path) as (info, entry):
        if info.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(entry) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(entry)
            start = _data_offset(path, info) + entry.tell()
            order: Literal["F", "C"] = "F" if fortran else "C"
            return _checked(np.memmap(path, dtype, "r", start, shape, order))
    return read_pictures(path)


@contextmanager
def _entry(path: str | Path) -> Iterator[tuple[zipfile.ZipInfo, IO[bytes]]]:
    """The array's entry in the zip, open; what is wrong with it becomes a `ValueError`."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
            yield archive.getinfo("arr_0.npy"), entry
    # What else a zip may raise of damaged, encrypted and unknown entries.
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError, RuntimeError) as problem:
        raise ValueError(str(problem).strip("\"'")) from problem


def _data_offset(path: str | Path, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: its local header ends with two fields of any length."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def _checked(pictures: NDArray[Any]) -> Pictures:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"arr_0 is {pictures.dtype} {pictures.shape}, not uint8 [N,H,W,3]")
    return pictures
