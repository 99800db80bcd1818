"""Tar shards that grow at the end only, so that a killed run can cut them back and go on.

A shard has the name ``000000.tar.part`` until the journal of the run says that it is whole.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from diff_dalle.errors import UsageError


class GrowingFile:
    """A file whose committed length is remembered elsewhere; what lies beyond it is cut off."""

    def __init__(self, path: Path, length: int) -> None:
        """Open or make the file and cut it to ``length`` bytes.

        Raises:
            UsageError: it is missing or shorter than that.
        """
        self._file: BinaryIO = open(path, "r+b" if length else "wb")
        if self._file.seek(0, io.SEEK_END) < length:
            self._file.close()
            raise UsageError(f"{path} is damaged (under {length} bytes): start in a new folder")
        self._file.truncate(length)
        self._file.seek(length)
        self.length = length

    def append(self, data: bytes) -> None:
        """Add bytes at the end; they may be lost until the next `sync`."""
        self._file.write(data)
        self.length += len(data)

    def sync(self) -> None:
        """Return when the disk has all that was added."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


@dataclass(kw_only=True)
class SplitState:
    """How far a split is written: what the journal holds of it.

    Attributes:
        shards: whole shards, name -> bytes.
        offset: bytes of the shard that is being written.
        samples: how many samples it holds.
        length: samples in all shards.
    """

    shards: dict[str, int] = field(default_factory=dict)
    offset: int = 0
    samples: int = 0
    length: int = 0


class ShardWriter:
    """The shards of one split; call `sync`, save the state, then `publish`."""

    def __init__(
        self, folder: Path, state: SplitState, *, samples_per_shard: int, shard_bytes: int
    ) -> None:
        """Go on where ``state`` says.

        Args:
            folder: made if missing.
            state: kept up to date by the writer.
            samples_per_shard: the most samples of a shard.
            shard_bytes: the most bytes of a shard of more than one sample.
        Raises:
            UsageError: a shard that the state names is missing or damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.state = state
        self._folder = folder
        self._samples_per_shard = samples_per_shard
        self._shard_bytes = shard_bytes
        self._whole: list[GrowingFile] = []  # since the last `sync`
        self._unpublished: list[str] = []
        publish_shards(folder, state.shards)
        require_shards(folder, state.shards)
        self._file: GrowingFile | None = None
        if state.offset:
            self._file = GrowingFile(self._part(), state.offset)

    def append(self, key: str, members: list[tuple[str, bytes]]) -> None:
        """Add a sample, in a new shard where this one would grow beyond its bounds.

        Args:
            key: without a dot.
            members: (extension, content).
        """
        data = b"".join(_member(f"{key}.{extension}", content) for extension, content in members)
        full = self.state.samples >= self._samples_per_shard
        if self.state.samples and (full or self._size_with(len(data)) > self._shard_bytes):
            self.end_shard()
        if self._file is None:
            self._file = GrowingFile(self._part(), 0)
        self._file.append(data)
        self.state.offset = self._file.length
        self.state.samples += 1
        self.state.length += 1

    def end_shard(self) -> None:
        """Make the shard at hand whole, if there is one; it keeps its name until `publish`."""
        if self._file is None:
            return
        name, size = self._name(), self._size_with(0)
        self._file.append(b"\0" * (size - self._file.length))
        self._whole.append(self._file)
        self._file = None
        self._unpublished.append(name)
        self.state.shards[name] = size
        self.state.offset = self.state.samples = 0

    @property
    def has_unpublished(self) -> bool:
        """Whether a shard is whole that the journal does not know yet."""
        return bool(self._unpublished)

    def sync(self) -> None:
        """Return when the disk has all that the state speaks of."""
        for file in self._whole:
            file.sync()
            file.close()
        self._whole.clear()
        if self._file is not None:
            self._file.sync()

    def publish(self) -> None:
        """Give whole shards their names; only when the journal knows them."""
        publish_shards(self._folder, self._unpublished)
        self._unpublished.clear()

    def _name(self) -> str:
        return f"{len(self.state.shards):06d}.tar"

    def _part(self) -> Path:
        return self._folder / f"{self._name()}.part"

    def _size_with(self, more: int) -> int:
        """Bytes of the shard at hand with that many more, and the end that a tar has."""
        return _rounded(self.state.offset + more + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def publish_shards(folder: Path, names: Iterable[str]) -> None:
    """Give whole shards their names, where they do not have them yet."""
    for name in names:
        part = folder / f"{name}.part"
        if part.exists():
            os.replace(part, folder / name)


def require_shards(folder: Path, shards: dict[str, int]) -> None:
    """Refuse a folder in which a shard is missing or has another size."""
    for name, size in shards.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise UsageError(f"{path} is missing or damaged: pack into a new folder")


def _member(name: str, content: bytes) -> bytes:
    entry = tarfile.TarInfo(name)  # mode 0644, time 0, no owner
    entry.size = len(content)
    padding = _rounded(len(content), tarfile.BLOCKSIZE) - len(content)
    return entry.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * padding


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
