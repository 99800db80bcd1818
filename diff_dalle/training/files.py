"""Files that appear whole or not at all, and the room for them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from diff_dalle.errors import UsageError

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)


class HashingFile:
    """A binary file to write to, which sums up size and SHA-256 on the way."""

    def __init__(self, file: BinaryIO) -> None:
        """Pass everything on to ``file``."""
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None  # torch.save turns it into an obscure RuntimeError

    def write(self, data: Any) -> int:
        """Write bytes or anything that has their interface."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    def summary(self) -> dict[str, Any]:
        """Size in bytes and SHA-256 of what was written."""
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}


def aside(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".tmp")


def write_aside(path: Path, write: Callable[[HashingFile], object]) -> dict[str, Any]:
    """Write ``path``'s content beside it and bring it to the disk; nothing is replaced yet.

    Returns:
        Size and SHA-256, as `HashingFile.summary` gives them.
    Raises:
        OSError: the disk is full, say; the piece that was written is removed.
    """
    try:
        with open(aside(path), "wb") as raw:
            file = HashingFile(raw)
            try:
                write(file)
            except RuntimeError:
                if file.error is not None:
                    raise file.error from None
                raise
            raw.flush()
            os.fsync(raw.fileno())
    except BaseException:
        aside(path).unlink(missing_ok=True)
        raise
    return file.summary()


def publish(path: Path) -> None:
    """Give a file that was written aside its name; the folder is synced."""
    os.replace(aside(path), path)
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Put a small file in the place of another, whole or not at all, whatever happens."""
    write_aside(path, lambda file: file.write(content))
    publish(path)


def sync_folder(folder: Path) -> None:
    """Bring new names and deletions in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def require_room(
    folder: str | Path, checkpoint_size: int, checkpoints: int = 2, *, make: bool = True
) -> None:
    """Make the folder, and refuse it where checkpoints cannot be written.

    Args:
        folder: the run's folder.
        checkpoint_size: bytes of one checkpoint.
        checkpoints: how many of them must fit.
        make: False makes no folder: where there is none, its nearest parent is tried.
    Raises:
        UsageError: the folder cannot be made or written, or the disk is too full.
    """
    folder = Path(folder)
    if not make:
        folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): give another --log_dir"
        ) from error
    needed = checkpoint_size * checkpoints
    if free < needed:
        raise UsageError(
            f"{folder} has {free / 2**30:.2f} GiB free, but {checkpoints} checkpoints need "
            f"{needed / 2**30:.2f} GiB: make room, or give another --log_dir"
        )


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()
