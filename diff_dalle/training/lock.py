"""One run a folder: a second one is refused while the first one lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from diff_dalle.errors import UsageError

LOCK_FILE = ".lock"
_CANNOT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder, which exists, for one process.

    The system gives it free when the process is gone, however it went. Where the file system
    knows no locks, nothing is held.

    Raises:
        UsageError: another process holds it, and which; or the folder cannot be written.
    """
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): give another --log_dir"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                f"{folder} is in use by another run ({holder}): wait for its end, or give another "
                "--log_dir"
            ) from error
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
